"""What a torch module's files lack or has twice: weights in lists."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
pytest.importorskip("torchax", reason="needs the extra `torch`")

import torch_modules

from gdiff_jax.victims import TorchModel, torch_files

STATE_DICT = r"save module\.state_dict\(\), which has buffers and what is frozen too$"


def save(tensors, path):
    tensors = [tensor.detach() for tensor in tensors]
    np.savez(path, *[tensor.numpy() for tensor in tensors]) if path.suffix == ".npz" else torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("file", ["list.npz", "list.pt"])
def test_weights_in_a_list_without_the_buffers_are_refused(file, tmp_path):
    """The module's own statistics must not stand in for the client's."""
    module = torch_modules.normed()
    path = save(module.parameters(), tmp_path / file)
    words = r"is a list of 10 arrays without names, .*; missing: 1\.running_mean, 1\.running_var, .* and 1 more; " + STATE_DICT
    with pytest.raises(ValueError, match=words):
        torch_files.with_weights(TorchModel(module), path)


def test_weights_in_a_list_without_what_is_frozen_are_refused(tmp_path):
    module = torch_modules.Mixed()
    path = save([p for p in module.parameters() if p.requires_grad], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"missing: frozen\.weight, frozen\.bias; " + STATE_DICT):
        torch_files.with_weights(TorchModel(module), path)
    torch.save({name: p for name, p in module.named_parameters() if p.requires_grad}, path)
    with pytest.raises(ValueError, match=r"missing: frozen\.weight, frozen\.bias; " + STATE_DICT):
        torch_files.with_weights(TorchModel(module), path)


LISTS = {
    "all parameters": lambda module: module.parameters(),
    "the state dict": lambda module: module.state_dict().values(),
}


@pytest.mark.parametrize("how", LISTS)
def test_a_list_that_has_all_is_taken(how, tmp_path):
    module, other = torch_modules.Mixed(), torch_modules.Mixed()
    said = []
    taken = torch_files.with_weights(TorchModel(module), save(LISTS[how](other), tmp_path / "list.pt"), said.append).module
    for name, value in other.state_dict().items():
        assert torch.equal(taken.state_dict()[name], value), name
    assert not any("left aside" in line for line in said)


def test_a_list_with_tied_arrays_that_differ_is_refused(tmp_path):
    module = torch_modules.Mixed()
    state = dict(module.state_dict()) | {"tied.weight": module.tied.weight + 1}
    with pytest.raises(ValueError, match=r"does not fit the victim; tied, but not equal: tied\.weight, second\.weight; save"):
        torch_files.with_weights(TorchModel(module), save(state.values(), tmp_path / "list.pt"))
