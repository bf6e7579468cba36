"""Torch modules as victims: `pip install -e ".[torch]"`. Their gradients are torch's own, and are attacked as ours are."""

import concurrent.futures
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
pytest.importorskip("torchax", reason="needs the extra `torch`")

import torch_modules
from tiny import ROOT
from torch import nn

import gdiff_jax as gd
from gdiff_jax import algebra, attacks
from gdiff_jax.matching import victim_gradient
from gdiff_jax.victims import TorchModel, label_range, own
from gdiff_jax.victims.torch_checks import check_gradient

SHAPE, LABEL = (8, 8, 3), np.int32(2)
IMAGE = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
MODULES = Path(torch_modules.__file__)


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    return make(*arguments, **options)


NETS = {
    "mlp": lambda: seeded(torch_modules.mlp, 192, 32, 4),
    "lenet": lambda: seeded(torch_modules.lenet),
    "cnn": lambda: seeded(torch_modules.cnn),
    "batch norm": lambda: seeded(torch_modules.cnn, norm=True).eval(),
    "pooling": lambda: seeded(torch_modules.cnn, pool=True),
    "vit": lambda: seeded(torch_modules.ViT),
}


def of_torch(module, x, y, loss=nn.functional.cross_entropy, mean=0.0, std=1.0):
    """Its gradient by torch alone, of images (N, H, W, C) in [-1, 1], by name."""
    pixels = (torch.tensor(x) + 1) / 2
    pixels = ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    output = module(pixels)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradient = torch.autograd.grad(loss(getattr(output, "logits", output), torch.tensor(y)), list(trained.values()))
    return {name: g.numpy() for name, g in zip(trained, gradient, strict=True)}


def assert_same(gradient, expected):
    norm = np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        assert gradient[name].shape == value.shape
        assert np.abs(gradient[name] - value).max() < 2e-6 * norm, name


def gradient_of(model, x, y):
    victim, params = own.module_victim(model, 4)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.jit(lambda p, x, y: victim_gradient(victim.loss, p, x, y))(params, x, y)


@pytest.mark.parametrize("name", NETS)
def test_the_gradient_is_torchs_own_in_its_layout_and_order(name):
    module = NETS[name]()
    _, params = own.module_victim(TorchModel(module), 4)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert_same(gradient_of(TorchModel(module), IMAGE, LABEL), of_torch(module, IMAGE[None], [2]))
    assert all(p.grad is None for p in module.parameters())


def test_of_several_images_it_is_that_of_the_mean():
    module, x = NETS["cnn"](), np.random.default_rng(1).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
    y = np.array([0, 3, 1])
    assert_same(gradient_of(TorchModel(module), x, y.astype(np.int32)), of_torch(module, x, y))


def test_what_torch_allows_beside_parameters_is_run_too():
    module = seeded(torch_modules.Awkward)
    x = IMAGE[:2, :2]
    gradient = gradient_of(TorchModel(module), x, LABEL)
    assert list(gradient) == ["first.bias", "first.weight", "head.bias", "head.weight"]
    assert_same(gradient, {k: v for k, v in of_torch(module, x[None], [2]).items()})
    said = own.module_victim(TorchModel(module), 4)[0].said
    assert "2 of its 6 arrays have requires_grad=False and no gradient" in said


def test_a_loss_of_the_users_own_is_torchs():
    module, weight = NETS["mlp"](), torch.tensor([1.0, 2.0, 3.0, 4.0])
    for loss in (nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), lambda out, y: (out.logsumexp(1) ** 2 * y).mean()):
        assert_same(gradient_of(TorchModel(module, loss), IMAGE, LABEL), of_torch(module, IMAGE[None], [2], loss))
    target = np.array([0.2, 0.3, 0.1, 0.4], np.float32)
    squared = TorchModel(module, nn.MSELoss())
    assert_same(gradient_of(squared, IMAGE, target), of_torch(module, IMAGE[None], target[None], nn.MSELoss()))
    assert_same(gradient_of(TorchModel(module), IMAGE, target), of_torch(module, IMAGE[None], target[None]))


def test_normalisation_is_given_or_found_and_said():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    module = NETS["mlp"]()
    expected = of_torch(module, IMAGE[None], [2], mean=mean, std=std)
    assert_same(gradient_of(TorchModel(module, mean=mean, std=std), IMAGE, LABEL), expected)
    twice = TorchModel(module, mean=np.multiply(mean, 255), std=np.multiply(std, 255), value_range=(0, 255))
    assert_same(gradient_of(twice, IMAGE, LABEL), expected)
    said = lambda model: own.module_victim(model, 4)[0].said
    assert said(TorchModel(module))[0].endswith(
        "pixels in [0, 1], torchvision's ToTensor, not normalised, for no mean and std were given"
    )
    assert said(TorchModel(module, mean=mean, std=std))[0].endswith(
        "mean (0.4, 0.5, 0.6) and std (0.2, 0.25, 0.3), which were given"
    )
    module.pretrained_cfg = {"mean": mean, "std": std, "input_size": (3, 8, 8)}
    assert_same(gradient_of(TorchModel(module), IMAGE, LABEL), expected)
    found = said(TorchModel(module))
    assert found[0].endswith("found in its pretrained_cfg")
    assert "it says that it was made for 8 x 8 pixels" in found
    assert_same(gradient_of(TorchModel(module, value_range=(0, 255)), IMAGE, LABEL), expected)  # timm's are of [0, 1]
    nothing = TorchModel(module, mean=0, std=1)
    assert_same(gradient_of(nothing, IMAGE, LABEL), of_torch(module, IMAGE[None], [2]))


def test_statistics_of_batch_norms_are_chosen():
    module = seeded(torch_modules.cnn, norm=True)
    with pytest.raises(
        ValueError,
        match=r"BatchNorms in train mode \(2 of 2\) would take the batch's statistics; call module\.eval\(\) .* batch_norm",
    ):
        own.module_victim(TorchModel(module), 4)
    of_batch, running = (TorchModel(module, batch_norm=choice) for choice in ("batch", "running"))
    x, y = np.random.default_rng(1).uniform(-1, 1, (3, *SHAPE)).astype(np.float32), np.array([0, 3, 1])
    assert_same(gradient_of(of_batch, IMAGE, LABEL), of_torch(seeded(torch_modules.cnn, norm=True), IMAGE[None], [2]))
    assert_same(gradient_of(of_batch, x, y.astype(np.int32)), of_torch(seeded(torch_modules.cnn, norm=True), x, y))
    assert_same(gradient_of(running, IMAGE, LABEL), of_torch(NETS["batch norm"](), IMAGE[None], [2]))
    said = [own.module_victim(model, 4)[0].said[-1] for model in (of_batch, running)]
    assert said == [
        "its BatchNorms (2) take the statistics of the images that a gradient is of",
        "its BatchNorms (2) take their running statistics, as in eval mode",
    ]
    assert all(part.training for part in module.modules())
    assert module[1].running_mean.abs().max() == 0


def test_of_batch_norms_in_both_modes_each_keeps_its_own():
    """As where a part is frozen, with its statistics."""
    module = seeded(torch_modules.cnn, norm=True)
    module[1].running_mean += 0.3
    module[1].eval()
    with pytest.raises(ValueError, match=r"BatchNorms in train mode \(1 of 2\) would take the batch's statistics"):
        own.module_victim(TorchModel(module), 4)
    x, y = np.random.default_rng(1).uniform(-1, 1, (3, *SHAPE)).astype(np.float32), np.array([0, 3, 1])
    mixed = TorchModel(module, batch_norm="batch")
    gradient = gradient_of(mixed, x, y.astype(np.int32))
    assert own.module_victim(mixed, 4)[0].said[-2:] == (
        "its BatchNorms (1) take the statistics of the images that a gradient is of",
        "its BatchNorms (1) take their running statistics, as in eval mode",
    )
    assert_same(gradient, of_torch(module, x, y))  # in torch last, which changes the statistics
    assert_same(gradient_of(TorchModel(module, batch_norm="running"), IMAGE, LABEL), of_torch(module.eval(), IMAGE[None], [2]))
    assert_same(gradient_of(mixed, x, y.astype(np.int32)), of_torch(module.train(), x, y))  # of a module in eval mode all


def test_an_instance_norm_that_tracks_statistics_is_a_batch_norm():
    """In train mode its gradient is another; one that tracks none has one mode alone."""

    def normed(**options):
        norm = nn.InstanceNorm2d(4, **options)
        if norm.running_mean is not None:
            norm.running_mean += 0.3
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(144, 4))

    tracking = lambda: seeded(lambda: normed(track_running_stats=True))
    with pytest.raises(
        ValueError, match=r"^InstanceNorms in train mode \(1 of 1\) would take .*; call module\.eval\(\) for the"
    ):
        own.module_victim(TorchModel(tracking()), 4)
    of_image, running = (TorchModel(tracking(), batch_norm=choice) for choice in ("batch", "running"))
    assert_same(gradient_of(of_image, IMAGE, LABEL), of_torch(tracking(), IMAGE[None], [2]))
    assert_same(gradient_of(running, IMAGE, LABEL), of_torch(tracking().eval(), IMAGE[None], [2]))
    assert [own.module_victim(model, 4)[0].said[-1] for model in (of_image, running)] == [
        "its InstanceNorms (1) take the statistics of the images that a gradient is of",
        "its InstanceNorms (1) take their running statistics, as in eval mode",
    ]
    assert_same(gradient_of(TorchModel(seeded(normed)), IMAGE, LABEL), of_torch(seeded(normed), IMAGE[None], [2]))


def test_dropout_is_off_and_said_to_be():
    module = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4)))
    gradient = gradient_of(TorchModel(module), IMAGE, LABEL)
    assert (
        own.module_victim(TorchModel(module), 4)[0]
        .said[-1]
        .startswith("its Dropouts (1), in train mode when it was given, are off")
    )
    assert_same(gradient, of_torch(module.eval(), IMAGE[None], [2]))


def test_weights_of_few_bits_are_taken_in_float32():
    module = NETS["mlp"]().bfloat16()
    gradient = gradient_of(TorchModel(module), IMAGE, LABEL)
    assert "its weights of bfloat16 are taken in float32" in own.module_victim(TorchModel(module), 4)[0].said
    assert_same(gradient, of_torch(module.float(), IMAGE[None], [2]))


@pytest.mark.parametrize("wrap", ["DataParallel", "compile"])
def test_a_wrapped_module_is_taken_out(wrap, monkeypatch):
    # As without an accelerator; that torchax makes JAX's devices torch's is no matter of a user's.
    monkeypatch.setattr(sys.modules["torch.nn.parallel.data_parallel"], "_get_available_device_type", lambda: None)
    module = NETS["mlp"]()
    wrapped = nn.DataParallel(module) if wrap == "DataParallel" else torch.compile(module)
    assert_same(gradient_of(TorchModel(wrapped), IMAGE, LABEL), of_torch(module, IMAGE[None], [2]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(batch_norm="frozen"), "batch_norm 'frozen' is not known; give running or batch"),
        (dict(value_range=(1, 0)), r"value_range \(1, 0\) must be \(low, high\)"),
        (dict(mean=0, std=0), "std 0 must be one number a channel, std above 0"),
        (dict(mean=0.5), "mean 0.5 and std None go together: give both"),
        (dict(mean=(0, 0), std=(1, 1, 1)), "mean has 2 numbers, std 3"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        own.module_victim(TorchModel(NETS["mlp"](), **options), 4)


def test_a_module_that_nothing_is_trained_of_is_refused():
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        own.module_victim(TorchModel(NETS["mlp"]().requires_grad_(False)), 4)


class Rounds(torch.autograd.Function):
    """With a derivative of its own, which JAX does not know."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, g):
        return g


class Layer(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def between(call):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), Layer(call), nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            lambda: between(lambda x: x[:, :15]),
            r"fails in torch itself for a batch \(1, 3, 8, 8\), in 3 \(Linear\): .*shapes cannot be multiplied",
        ),
        (
            lambda: between(lambda x: x * float(x.sum())),
            r"fails in torchax [\d.]+, in 2 \(Layer\): ConcretizationTypeError",
        ),
        (
            lambda: between(nn.functional.rrelu),
            r"in 2 \(Layer\): OperatorNotFound: Operator with name aten::rrelu_with_noise has no lowering",
        ),
        (
            lambda: between(lambda x: x if type(x) is torch.Tensor else 1.01 * x),
            r"differs from torch's own by 0\.0\d+ of its norm; the first output to differ is that of 2 \(Layer\)",
        ),
        (lambda: between(Rounds.apply), r"no layer's output differs, .* that of 1\.bias is the first that does"),
        (lambda: between(lambda x: nn.functional.dropout(x, 0.5)), "differs from call to call: it draws at random"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
            r"cross-entropy takes logits \(N, classes\); give TorchModel\(\.\.\., loss=\)",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1)),
            r"returns probabilities, which add up to 1.*leave its softmax out",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Sigmoid()),
            r"ends in a sigmoid.*leave the sigmoid out, or give the client's loss",
        ),
    ],
    ids=["torch", "jax", "operation", "value", "derivative", "random", "logits", "probabilities", "sigmoid"],
)
def test_what_is_not_torchs_own_gradient_is_refused_with_the_layer(module, words):
    victim, _ = own.module_victim(TorchModel(seeded(module)), 4)
    with pytest.raises(ValueError, match=words):
        own.checked_module(victim, SHAPE, LABEL)


def test_the_distance_of_the_two_gradients_is_told():
    victim, _ = own.module_victim(TorchModel(NETS["cnn"]()), 4)
    assert 0 < check_gradient(victim.loss, SHAPE, LABEL) < 2e-6
    said = own.checked_module(victim, (2, *SHAPE), np.array([2, 1])).said
    assert re.fullmatch(r"its gradient on JAX is torch's own up to \de-0[678] of its norm", said[-1])
    assert said[:-1] == victim.said


def test_labels_beyond_the_classes_are_refused():
    victim, params = own.module_victim(TorchModel(NETS["mlp"]()), 4)
    label_range.check_label_range(victim.loss, params, IMAGE, np.array([0, 3]))
    with pytest.raises(ValueError, match=r"label 4 of image 1 is none of the loss's classes, 0 \.\. 3"):
        label_range.check_label_range(victim.loss, params, IMAGE, np.array([0, 4]))


def test_a_module_is_known_again_in_another_process_and_its_constants_count():
    script = f"import sys; sys.path[:0] = {[str(MODULES.parent), os.path.dirname(__file__)]!r}\n"
    script += "import test_torch_modules as t; print(t.fingerprint(t.NETS['batch norm']()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    module = NETS["batch norm"]()
    assert done.stdout.split()[-1] == fingerprint(module) == fingerprint(module)
    module[1].running_mean += 1
    assert fingerprint(module) != done.stdout.split()[-1]


def fingerprint(module):
    victim, params = own.module_victim(TorchModel(module), 4)
    return own.fingerprint(victim.loss, params, IMAGE, LABEL)


def test_a_module_may_be_traced_in_several_threads():
    """As the engine solves several leaks at once."""
    victim, params = own.module_victim(TorchModel(NETS["vit"]()), 4)
    expected = victim.loss(params, IMAGE, LABEL)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(lambda k: jax.jit(lambda p, x: victim.loss(p, x, LABEL) + 0 * k)(params, IMAGE), range(8)))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


# Algebra


def psnr(image, truth=IMAGE):
    return 10 * np.log10(4 / np.mean(np.square(image - truth)))


SEARCHED = pytest.param("pooling", marks=pytest.mark.long)  # below the mean over a window the image is searched for


@pytest.mark.parametrize("name", [*(name for name in NETS if name != "pooling"), SEARCHED])
def test_the_image_is_solved(name):
    victim, params = own.module_victim(TorchModel(NETS[name](), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)), 4)
    leak = gradient_of(victim.module, IMAGE, LABEL)
    solution = algebra.solve(victim.loss, params, leak, SHAPE, jnp.asarray(LABEL))
    assert solution.exact, solution
    assert psnr(solution.image) > 90, solution
    lines = algebra.explain(victim.loss, params, IMAGE)
    entry = {"mlp": "1.bias", "lenet": "5.bias", "vit": "positions"}.get(name, "8.bias")
    assert any(f"its delta is the gradient of {entry}" in line for line in lines), lines
    assert algebra.infer_label(victim.loss, params, leak, SHAPE) == LABEL


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias"])
def test_the_image_is_solved_beside_constants(frozen):
    """In float64, which torch's convolutions ask of all that they take; tensors that are made on the way included."""
    net = nn.Sequential(NETS["cnn"](), Layer(lambda x: x + torch.ones(4) @ torch.zeros(4, 4)))
    next(p for name, p in net.named_parameters() if name == f"0.{frozen}").requires_grad_(False)
    victim, params = own.module_victim(TorchModel(net), 4)
    leak = gradient_of(victim.module, IMAGE, LABEL)
    solution = algebra.solve(victim.loss, params, leak, SHAPE, jnp.asarray(LABEL))
    assert psnr(solution.image) > 90, solution
    assert algebra.infer_label(victim.loss, params, leak, SHAPE) == LABEL
    assert torch.get_default_dtype() == torch.float32


def test_a_first_dense_layer_is_found_in_torchs_layout_and_order():
    module = NETS["mlp"]()
    victim, params = own.module_victim(TorchModel(module, mean=(0.4, 0.5, 0.6), std=0.25), 4)
    layer = own.find_first_dense(victim, params, SHAPE, LABEL).first_dense
    assert (layer.kernel, layer.bias, layer.transposed, layer.chw) == ("1.weight", "1.bias", True, (3, 8, 8))
    np.testing.assert_allclose(layer.scale, (2, 2, 2), rtol=1e-3)
    np.testing.assert_allclose(layer.shift, (0.4, 0, -0.4), atol=1e-3)
    found = attacks.read_first_dense(layer, gradient_of(victim.module, IMAGE, LABEL), SHAPE)
    assert psnr(found.x) > 90


def test_a_batch_is_solved_by_its_first_dense_layer():
    module = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 4)))
    victim, params = own.module_victim(TorchModel(module), 4)
    x, y = np.random.default_rng(1).uniform(-1, 1, (2, *SHAPE)).astype(np.float32), np.array([1, 3], np.int32)
    layer = own.find_first_dense(victim, params, x.shape, y).first_dense
    found = algebra.solve_batch(victim.loss, params, gradient_of(victim.module, x, y), x.shape, jnp.asarray(y), layer, 0.0)
    assert found.exact, found
    assert psnr(found.images, x) > 80


# Audits


def test_the_page_on_torch_shows_a_module_that_is_solved():
    page = (ROOT / "docs" / "torch.md").read_text()
    block = re.search(r"```python\n(# my_model\.py\n.*?)```", page, re.S)[1]
    names = {}
    exec(block, names)
    options = re.search(r"gd\.TorchModel\(make\(\), .*\)", page)[0]
    victim, params = own.module_victim(eval(options, names | {"gd": gd}), 10)
    x = np.random.default_rng(0).uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    solution = algebra.solve(victim.loss, params, gradient_of(victim.module, x, LABEL), x.shape, jnp.asarray(LABEL))
    assert psnr(solution.image, x) > 80, solution


def test_the_module_of_the_readme_is_taken():
    names = {}
    exec(re.search(r"```python\n(# my_torch_model\.py\n.*?)```", (ROOT / "README.md").read_text(), re.S)[1], names)
    victim, params = own.module_victim(TorchModel(names["make"]()), 10)
    x = np.random.default_rng(0).uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    solution = algebra.solve(victim.loss, params, gradient_of(victim.module, x, LABEL), x.shape, jnp.asarray(LABEL))
    assert psnr(solution.image, x) > 80, solution


def test_a_module_is_audited_in_one_call(planned, data, capsys):
    images, labels = data
    module = seeded(torch_modules.mlp)
    plan = planned(module, images=images, labels=labels, progress=True)
    (victim,) = plan.victims.values()
    assert list(plan.methods) == ["auto", "analytic", "analytic-dsg"]
    assert victim.first_dense.chw == (3, 16, 16)
    assert "the model: it takes (N, C, H, W) with pixels in [0, 1]" in capsys.readouterr().out
    told = planned(gd.TorchModel(module, mean=0.5, std=0.5), images=images, labels=labels)
    assert told.victims["the model"].said[0].endswith("which were given")
    with pytest.raises(ValueError, match="params go with a loss, a torch module has its own"):
        planned(module, {}, images, labels)
    with pytest.raises(ValueError, match="images and labels are needed"):
        planned(module)
    with pytest.raises(ValueError, match="params are needed with a loss"):
        planned(lambda p, x, y: 0.0, images=images, labels=labels)
    with pytest.raises(ValueError, match=r"label 12 of image 1 is none of the loss's classes, 0 \.\. 9"):
        planned(module, images=images[:2], labels=[0, 12])


def test_the_verdict_says_what_was_assumed(plain_prior, data, attacks_alone):
    images, labels = data
    options = dict(prior=plain_prior, sigmas=(0,), methods=["analytic"], steps=3, batch=4, seeds=1, progress=False)
    audit = gd.audit(seeded(torch_modules.mlp), images=images[:2], labels=labels[:2], **options)
    assert min(r["psnr"] for r in audit.at(0.0)) > 60
    assert (
        "Of the module: it takes (N, C, H, W) with pixels in [0, 1], torchvision's ToTensor, not normalised" in audit.verdict()
    )
