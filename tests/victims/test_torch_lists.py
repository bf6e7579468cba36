"""What a torch module's files lack: weights that are no whole state dict, and None for gradients that autograd never made."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
pytest.importorskip("torchax", reason="needs the extra `torch`")

import jax.numpy as jnp
import torch_modules
from torch import nn

from gdiff_jax.victims import TorchModel, own, saved_trees, torch_files
from gdiff_jax.victims.reached import reached

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


class Pooled(nn.Module):
    """With a layer of which no gradient comes: its output is thrown away, as a pooler's that no head reads, or detached."""

    def __init__(self, how):
        super().__init__()
        self.how, self.body, self.pool, self.head = how, nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = torch.tanh(self.body(x.flatten(1)))
        pooled = torch.tanh(self.pool(h))
        return self.head(h + pooled.detach() if self.how == "detached" else h)


@pytest.mark.parametrize("how", ["thrown away", "detached"])
def test_none_of_what_autograd_never_reaches_is_zero(how, tmp_path):
    module = Pooled(how)
    nn.functional.cross_entropy(module(torch.rand(1, 3, 8, 8)), torch.tensor([1])).backward()
    victim, params = own.module_victim(TorchModel(module.eval()), 4)
    path, said = str(tmp_path / "leak.pt"), []

    def fit():
        torch.save({name: p.grad for name, p in module.named_parameters()}, path)
        arguments = dict(module=torch_files.files_of(module), say=said.append)
        ask = lambda: reached(victim.loss, params, jnp.zeros((8, 8, 3)), jnp.asarray(1))
        return saved_trees.fit(path, params, {}, reached=ask, **arguments)

    leak = fit()
    assert said == [f"{path}: None is a gradient of zero of what the loss does not use, or detaches: pool.weight, pool.bias"]
    for name, p in module.named_parameters():
        np.testing.assert_array_equal(leak[name], np.zeros(p.shape) if p.grad is None else p.grad)
    module.body.bias.grad = None
    with pytest.raises(ValueError, match=r"None, though the loss has a gradient of it: body\.bias; what the client does not"):
        fit()
