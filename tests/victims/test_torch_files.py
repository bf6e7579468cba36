"""Files of a torch module, as its users save them, and audits of one by command: `pip install -e ".[torch]"`."""

import re
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
pytest.importorskip("torchax", reason="needs the extra `torch`")

import torch_modules
from safetensors.torch import save_file
from tiny import audit_config
from torch import nn

import gdiff_jax.victims
from gdiff_jax.auditing import load
from gdiff_jax.auditing.load import audit_named
from gdiff_jax.errors import ConfigError
from gdiff_jax.sweeping.records import Store
from gdiff_jax.victims import TorchModel, own, torch_checks

MODULES = torch_modules.__file__
VICTIM = f"{MODULES}:normed"


@pytest.fixture
def plan_of(monkeypatch, tiny_prior):
    """What would be run, of changes to the usual settings; the module is `normed`, the first image's label 0."""
    monkeypatch.setattr(load, "run", lambda plan, *_: plan)
    usual = dict(victim=VICTIM, mechanism="none", num_images=1, methods=())
    return lambda **changes: audit_named(audit_config(tiny_prior, "unused", **{**usual, **changes}))


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return torch_modules.normed()


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def gradient_of(module, tiny_prior):
    """Of the first image, a tensor a parameter, by torch alone."""
    with np.load(tiny_prior / "images.npz") as file:
        image, label = file["images"][0], int(file["labels"][0])
    pixels = torch.tensor(image / np.float32(255)).permute(2, 0, 1)[None]
    loss = nn.functional.cross_entropy(module(pixels), torch.tensor([label]))
    return torch.autograd.grad(loss, list(module.parameters()))


@pytest.fixture(scope="module")
def gradient(module, tiny_prior):
    return gradient_of(module, tiny_prior)


def named(module, tensors, before=""):
    return {before + name: tensor for (name, _), tensor in zip(module.named_parameters(), tensors, strict=True)}


def of_opacus(module, tensors):
    return {"step": 3, "grads": named(module, tensors, "_module.")}


def as_flower(module, tensors):
    """NDArrays in the order of the state dict, whose buffers have changed too."""
    by_name = named(module, tensors)
    return [np.asarray(by_name.get(name, value)) for name, value in module.state_dict().items()]


SAVED = {
    "list.pt": lambda module, tensors: list(tensors),
    "tuple.pt": lambda module, tensors: tuple(tensors),
    "within.pt": lambda module, tensors: {"round": 1, "grads": list(tensors)},
    "named.pt": named,
    "named.safetensors": named,
    "parallel.pt": lambda module, tensors: named(module, tensors, "module."),
    "compiled.pt": lambda module, tensors: named(module, tensors, "_orig_mod."),
    "opacus.pt": of_opacus,
    "arrays.npz": lambda module, tensors: [tensor.numpy() for tensor in tensors],
    "flower.npz": as_flower,
}


@pytest.mark.parametrize("name", SAVED)
def test_a_gradient_is_taken_as_torchs_users_save_it(name, plan_of, module, gradient, tmp_path):
    path, saved = tmp_path / name, SAVED[name](module, gradient)
    if path.suffix == ".npz":
        np.savez(path, *saved)
    elif path.suffix == ".safetensors":
        save_file(saved, path)
    else:
        torch.save(saved, path)
    plan = plan_of(gradient=str(path))
    assert plan.leak.keys() == named(module, gradient).keys()
    for key, value in named(module, gradient).items():
        np.testing.assert_array_equal(plan.leak[key], value)


def test_a_list_in_another_order_is_refused(plan_of, gradient, tmp_path):
    torch.save(list(gradient[::-1]), tmp_path / "leak.pt")
    words = r"list of 10 arrays without names, and not of the victim's 10 parameters in their order \(a \(10,\) for 0\.weight"
    with pytest.raises(ConfigError, match=words):
        plan_of(gradient=str(tmp_path / "leak.pt"))
    torch.save(list(gradient), tmp_path / "leak.pt")
    with pytest.raises(ConfigError, match=r"flattened 8\.weight: a torch module's files have its own order"):
        plan_of(gradient=str(tmp_path / "leak.pt"), flattened=("8.weight:24x8x8",))


def test_weights_are_a_state_dict_with_its_buffers(plan_of, tiny_prior, tmp_path, capsys, monkeypatch):
    """The gradient is that of the file's weights and statistics, which are not those that the function makes."""
    module = torch_modules.normed()
    module[1].running_mean -= 0.4
    torch.save({"model": {f"module.{name}": value for name, value in module.state_dict().items()}}, tmp_path / "weights.pt")
    torch.save(list(gradient_of(module, tiny_prior)), tmp_path / "leak.pt")
    other = plan_of()
    checked = []
    check = torch_checks.check_gradient
    monkeypatch.setattr(torch_checks, "check_gradient", lambda *arguments: checked.append(check(*arguments)) or checked[-1])
    plan = plan_of(weights=str(tmp_path / "weights.pt"), gradient=str(tmp_path / "leak.pt"), label=0)
    assert "--gradient: it is the model's own gradient at the image" in capsys.readouterr().out
    assert len(checked) == 1  # of the file's weights alone
    ((_, params),) = plan.params.items()
    for key, value in module.named_parameters():
        np.testing.assert_array_equal(params[key], value.detach())
    hashes, others = (p.identity["sha256"]["trained_victims"] for p in (plan, other))
    assert hashes.keys() == others.keys() == {f"{VICTIM} loss", f"{VICTIM}/0"}
    assert all(hashes[key] != others[key] for key in hashes)  # of the weights that a function makes at random nothing is left
    torch.save(dict(module.named_parameters()), tmp_path / "less.pt")
    with pytest.raises(ConfigError, match=r"--weights: .*less\.pt does not fit the victim; missing: 1\.running_mean, "):
        plan_of(weights=str(tmp_path / "less.pt"))


def test_an_update_is_given_by_two_state_dicts(plan_of, module, gradient, tmp_path):
    torch.save(module.state_dict(), tmp_path / "before.pt")
    after = dict(module.state_dict())  # its statistics are those of the client, which nothing is read off
    for name, tensor in named(module, gradient).items():
        after[name] = after[name] - 0.1 * tensor
    torch.save({"model": after}, tmp_path / "after.pt")
    files = dict(weights=str(tmp_path / "before.pt"), gradient=str(tmp_path / "after.pt"))
    plan = plan_of(**files, update=True, local_learning_rate=0.1, label=0)
    for key, value in named(module, gradient).items():
        np.testing.assert_allclose(plan.leak[key], value, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "rate", "decay"),
    [(dict(momentum=0.9), 0.1, 0), (dict(momentum=0.9, nesterov=True), 0.19, 0), (dict(weight_decay=0.01), 0.1, 0.01)],
    ids=["momentum", "Nesterov", "weight decay"],
)
def test_an_optimiser_leaves_in_one_step_what_the_page_says(options, rate, decay, plan_of, gradient, tmp_path):
    torch.manual_seed(0)
    module = torch_modules.normed()
    before = named(module, [p.detach().clone() for p in module.parameters()])
    torch.save(module.state_dict(), tmp_path / "before.pt")
    for parameter, tensor in zip(module.parameters(), gradient, strict=True):
        parameter.grad = tensor.clone()
    torch.optim.SGD(module.parameters(), 0.1, **options).step()
    torch.save(module.state_dict(), tmp_path / "after.pt")
    files = dict(weights=str(tmp_path / "before.pt"), gradient=str(tmp_path / "after.pt"))
    leak = plan_of(**files, update=True, local_learning_rate=rate, label=0).leak
    for key, value in named(module, gradient).items():
        np.testing.assert_allclose(leak[key], value + decay * before[key], atol=1e-5)


def test_a_file_may_return_a_module_and_its_image_is_solved(tiny_prior, tmp_path, attacks_alone, capsys):
    """From a module and pictures to a verdict, of a network whose structure is found."""
    changes = dict(victim=f"{MODULES}:mlp", mechanism="none", methods=("auto",), num_images=1)
    audit = audit_named(audit_config(tiny_prior, tmp_path / "out", **changes))
    assert min(r["psnr"] for r in audit.at(0.0)) > 80
    assert all(r["how"].startswith("solved") for r in audit.at(0.0))
    told = "it takes (N, C, H, W) with pixels in [0, 1], torchvision's ToTensor, not normalised"
    assert f"victim {MODULES}:mlp: {told}" in capsys.readouterr().out
    assert f"Of the module: {told}" in audit.verdict()
    page = audit.report(tmp_path / "report").read_text()
    assert "torchvision&#39;s ToTensor" in page


def test_without_a_label_it_is_read_off_the_leak(plan_of, gradient, tmp_path):
    torch.save(list(gradient), tmp_path / "leak.pt")
    plan = plan_of(gradient=str(tmp_path / "leak.pt"), images="")
    assert not plan.images_known
    assert plan.labels.tolist() == [0]


def test_without_torchax_the_extra_is_named(plan_of, monkeypatch):
    own.module_victim(TorchModel(torch_modules.normed()), 10)
    monkeypatch.delattr(gdiff_jax.victims, "torch_loss")
    monkeypatch.delitem(sys.modules, "gdiff_jax.victims.torch_loss")
    monkeypatch.setitem(sys.modules, "torchax", None)
    with pytest.raises(
        ConfigError, match=r'torch and torchax of versions that go together .*; pip install "gdiff-jax\[torch\]"'
    ):
        plan_of()


def test_a_module_that_is_not_seeded_is_gone_on_with_by_its_weights(plan_of, tmp_path):
    torch.save(torch_modules.normed().state_dict(), tmp_path / "weights.pt")
    identities = [plan_of(**files).identity for files in ({}, {}, *[dict(weights=str(tmp_path / "weights.pt"))] * 2)]
    Store(tmp_path / "drawn", identities[0]).open()
    with pytest.raises(ConfigError, match=r"at random at each call, seed them, as by torch\.manual_seed\(0\), or load"):
        Store(tmp_path / "drawn", identities[1])
    assert identities[2] == identities[3]


# What has no gradient, or more names than one

MIXED = f"{MODULES}:Mixed"


@pytest.fixture
def mixed(tiny_prior):
    """The module, with the gradient that a step of training leaves in it: None of what is frozen, and of what is unused."""
    torch.manual_seed(0)
    module = torch_modules.Mixed()
    with np.load(tiny_prior / "images.npz") as file:
        pixels = torch.tensor(file["images"][0] / np.float32(255)).permute(2, 0, 1)[None]
    nn.functional.cross_entropy(module(pixels), torch.tensor([0])).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == [
        "frozen.weight", "frozen.bias", "unused.weight", "unused.bias",
    ]  # fmt: skip
    torch.manual_seed(0)
    return module


UNUSED = r"leak\.pt: None is a gradient of zero of what the loss does not use, or detaches: unused\.weight, unused\.bias"
LEAKS = {
    "a list of all": lambda m: [p.grad for p in m.parameters()],
    "a list of what is trained": lambda m: [p.grad for p in m.parameters() if p.requires_grad],
    "by name": lambda m: {name: p.grad for name, p in m.named_parameters()},
    "by name, wrapped": lambda m: {"grads": {f"module.{name}": p.grad for name, p in m.named_parameters()}, "round": 2},
    "by every name": lambda m: {name: p.grad for name, p in m.named_parameters(remove_duplicate=False)},
}


@pytest.mark.parametrize("how", LEAKS)
def test_none_is_left_out_of_what_is_frozen_and_zero_of_what_is_unused(how, plan_of, mixed, tmp_path, capsys):
    torch.save(LEAKS[how](mixed), tmp_path / "leak.pt")
    leak = plan_of(victim=MIXED, gradient=str(tmp_path / "leak.pt"), label=0).leak
    trained = {name: p for name, p in mixed.named_parameters() if p.requires_grad}
    assert list(leak) == list(trained)
    for name, p in trained.items():
        np.testing.assert_array_equal(leak[name], np.zeros(p.shape) if p.grad is None else p.grad)
    said = capsys.readouterr().out
    assert re.search(UNUSED, said)
    assert "it is the model's own gradient at the image" in said
    assert "left aside: tied.weight" not in said


def test_a_list_with_gradients_of_what_is_frozen_leaves_them_aside_and_says_so(plan_of, mixed, tmp_path, capsys):
    torch.save([torch.zeros(p.shape) if p.grad is None else p.grad for p in mixed.parameters()], tmp_path / "leak.pt")
    assert "frozen.weight" not in plan_of(victim=MIXED, gradient=str(tmp_path / "leak.pt")).leak
    assert "which their shapes confirm; left aside: frozen.weight, frozen.bias" in capsys.readouterr().out


def test_none_of_what_has_a_gradient_is_refused(plan_of, mixed, tmp_path):
    """A client that does not train a layer sends no gradient of it, which is not one of zero."""
    mixed.first.weight.grad = None
    words = r"None, though the loss has a gradient of it: first\.weight; what the client does not train is to be frozen in "
    for how in ("a list of all", "by name"):
        torch.save(LEAKS[how](mixed), tmp_path / "leak.pt")
        with pytest.raises(ConfigError, match=words + r"the victim, by requires_grad_\(False\)"):
            plan_of(victim=MIXED, gradient=str(tmp_path / "leak.pt"))


@pytest.mark.parametrize("kept", ["second.weight", "tied.weight"])
def test_of_a_tied_parameter_one_name_will_do(kept, plan_of, mixed, tmp_path, capsys):
    """`safetensors` keeps one of them, the last perhaps."""
    (dropped,) = {"second.weight", "tied.weight"} - {kept}
    save = lambda tensors, name: save_file({n: t for n, t in tensors.items() if n != dropped}, tmp_path / name)
    with torch.no_grad():
        state = {name: 1.1 * value for name, value in mixed.state_dict().items()}
    save(state, "weights.safetensors")
    by_name = {name: p.grad for name, p in mixed.named_parameters(remove_duplicate=False) if p.grad is not None}
    unused = {name: torch.zeros(p.shape) for name, p in mixed.unused.named_parameters(prefix="unused")}
    save(by_name | unused, "leak.safetensors")
    files = dict(weights=str(tmp_path / "weights.safetensors"), gradient=str(tmp_path / "leak.safetensors"))
    plan = plan_of(victim=MIXED, **files)
    ((_, params),) = plan.params.items()
    np.testing.assert_array_equal(params["second.weight"], state[kept])
    np.testing.assert_array_equal(plan.leak["second.weight"], mixed.second.weight.grad)
    assert "left aside" not in capsys.readouterr().out


def test_tied_parameters_that_are_not_equal_are_refused(plan_of, mixed, tmp_path):
    """Such as gradients by each name, of which the parameter's own is the sum."""
    state = {name: value.clone() for name, value in mixed.state_dict().items()}
    state["tied.weight"] += 1
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"--weights: .* tied, but not equal: tied\.weight, second\.weight"):
        plan_of(victim=MIXED, weights=str(tmp_path / "weights.pt"))
