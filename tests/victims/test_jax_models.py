"""Models of Flax, Equinox and Haiku, by the files that the documentation shows: each is audited by the command, and its
gradient is the one that the framework itself computes of the same model."""

import dataclasses
import re
import types
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import PATCHED
from flax import linen, nnx, serialization
from tiny import ROOT, audit_config

from gdiff_jax.auditing.load import audit_named
from gdiff_jax.matching import victim_gradient
from gdiff_jax.modules import init_params
from gdiff_jax.priors import Denoiser, Prior, save_prior
from gdiff_jax.schedule import make_betas
from gdiff_jax.training.start import SCHEDULER
from gdiff_jax.victims import checks, own, saved_trees, uses

IMAGE = np.random.default_rng(0).uniform(-1, 1, (32, 32, 3)).astype(np.float32)
LABEL = np.int32(3)
PAGES = [(ROOT / "docs" / name).read_text() for name in ("audit.md", "jax_models.md")]
FILES = {f"{name}.py": text for page in PAGES for name, text in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", page, re.S)}
cross_entropy = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, LABEL[None]).mean()


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        yield


def made(name, folder):
    """What is in a file of the documentation, and the path it now lies at."""
    path = folder / name
    path.write_text(FILES[name])
    module = types.ModuleType(path.stem)
    exec(FILES[name], vars(module))
    return module, path


def of_nnx(module):
    return nnx.grad(lambda model: cross_entropy(model(IMAGE[None])))(module.Net(nnx.Rngs(0)))


def of_linen(module):
    net = module.Net()
    variables = net.init(jax.random.key(0), IMAGE[None], train=False)
    params, statistics = variables["params"], variables["batch_stats"]
    return jax.grad(lambda p: cross_entropy(net.apply({"params": p, "batch_stats": statistics}, IMAGE[None], False)))(params)


def of_equinox(module):
    images = IMAGE[None].transpose(0, 3, 1, 2)
    return eqx.filter_grad(lambda model: cross_entropy(jax.vmap(model)(images)))(module.net(jax.random.key(0)))


def of_haiku(module):
    params = hk.transform(module.forward).init(jax.random.key(0), IMAGE[None])
    loss = hk.transform(lambda x: cross_entropy(module.forward(x)))
    return jax.grad(loss.apply)(params, None, IMAGE[None])


OWN = {"my_model.py": of_nnx, "linen_model.py": of_linen, "equinox_model.py": of_equinox, "haiku_model.py": of_haiku}


def test_each_framework_has_a_file():
    assert FILES.keys() == OWN.keys()


@pytest.mark.parametrize("name", OWN)
def test_the_gradient_is_the_frameworks_own(name, tmp_path):
    module, path = made(name, tmp_path)
    victim, params = own.load_own(f"{path}:make", 10)
    gradient = jax.jit(lambda p, x: victim_gradient(victim.loss, p, x, LABEL))(params, IMAGE)
    theirs = jax.jit(lambda: OWN[name](module))()
    _, expected = own.own_victim(victim.loss, theirs, 10)  # by name
    assert gradient.keys() == expected.keys()
    for key, value in gradient.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
        assert np.abs(value).max() > 0, key


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A tiny prior, and an image, of the 32 pixels that the documentation's models take."""
    folder, config = tmp_path_factory.mktemp("larger"), dataclasses.replace(PATCHED, sample_size=16)
    denoise = Denoiser(init_params(jax.random.key(0), config), config)
    mean = np.zeros((32, 32, 3), np.float32)
    save_prior(folder / "prior", Prior(denoise, make_betas(), "fixed_small", "tiny", "", mean), SCHEDULER)
    np.savez(folder / "images.npz", images=((IMAGE[None] + 1) * 127.5).astype(np.uint8), labels=LABEL[None])
    return folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n != "my_model.py")) for n in OWN])
def test_the_command_audits_the_file(name, larger, tmp_path, attacks_alone):
    _, path = made(name, tmp_path)
    changes = dict(victim=f"{path}:make", mechanism="none", methods=("inverting",), inverting_steps=3, num_images=1)
    audit = audit_named(audit_config(larger, tmp_path / "out", **changes))
    (row,) = audit.at(0.0)
    assert np.isfinite([row["psnr"], row["distance"]]).all()
    assert name in audit.report(tmp_path / "report").read_text()


def fitted(module, path):
    victim, params = own.own_victim(*module.make(), 10)
    used = lambda: uses.uses(victim.loss, params, jnp.asarray(IMAGE), jnp.asarray(LABEL))
    return saved_trees.fit(str(path), jax.tree.map(jnp.zeros_like, params), {}, used, weights=True), params


def save_linen(module, folder):
    (folder / "weights.msgpack").write_bytes(serialization.to_bytes(module.make()[1]))


def save_nnx(module, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights.orbax", nnx.state(module.Net(nnx.Rngs(0)), nnx.Param))


def save_haiku(module, folder):
    """By the line that the documentation has."""
    (line,) = re.findall(r"`(numpy\.savez\(.*?\))`", PAGES[1])
    eval(line.replace("weights.npz", str(folder / "weights.npz")), {"numpy": np, "hk": hk, "params": module.make()[1]})


SAVED = {"linen_model.py": save_linen, "my_model.py": save_nnx, "haiku_model.py": save_haiku}


@pytest.mark.parametrize("name", SAVED)
def test_weights_that_the_framework_saves_are_taken(name, tmp_path):
    module, _ = made(name, tmp_path)
    SAVED[name](module, tmp_path)
    (path,) = tmp_path.glob("weights.*")
    found, params = fitted(module, path)
    for key, value in params.items():
        np.testing.assert_array_equal(found[key], value)


def test_what_equinox_writes_has_no_names_and_is_read_in_make(tmp_path):
    module, _ = made("equinox_model.py", tmp_path)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", module.net(jax.random.key(1)))
    with pytest.raises(ValueError, match=r"model\.eqx is a \.npy or what Equinox writes, arrays without names"):
        fitted(module, tmp_path / "model.eqx")
    (line,) = re.findall(r"`(eqx\.tree_deserialise_leaves\(.*?\))`", PAGES[1])
    names = {"eqx": eqx, "net": module.net, "key": jax.random.key(0)}
    model = eval(line.replace("model.eqx", str(tmp_path / "model.eqx")), names)
    np.testing.assert_array_equal(model.layers[0].weight, module.net(jax.random.key(1)).layers[0].weight)


# What a user would hand over at first


class Normed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm, self.drop, self.out = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(x)).mean((1, 2)))


def of_model(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x[None])[0], y)


def without_statistics():
    graph, params, rest = nnx.split(nnx.view(Normed(), deterministic=True, use_running_average=True), nnx.Param, ...)
    return lambda p, x, y: of_model(nnx.merge(graph, p, rest), x, y), params


def test_statistics_of_batch_norms_are_no_params():
    """As floats beside weights they would be attacked by a gradient that nobody sends."""
    for params in (Normed(), nnx.state(Normed())):
        with pytest.raises(
            ValueError, match=r"params\.norm\.mean is a BatchNorm's statistic, .* leave it to loss, as nnx\.split"
        ):
            own.own_victim(of_model, params, 4)
    variables = {"params": {"w": jnp.ones(3)}, "batch_stats": {"norm": {"mean": jnp.zeros(3)}}}
    with pytest.raises(ValueError, match=r"params\.batch_stats\.norm\.mean is a BatchNorm's statistic"):
        own.own_victim(of_model, variables, 4)


class Both(NamedTuple):
    params: Any
    batch_stats: Any


class NormedLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.BatchNorm(use_running_average=True)(x).mean((1, 2)))


def of_linen_within(put):
    variables = NormedLinen().init(jax.random.key(0), IMAGE[None])
    return put(variables["params"], variables["batch_stats"])


def of_haiku():
    net = hk.transform_with_state(lambda x: hk.Linear(4)(hk.BatchNorm(True, True, 0.9)(x, True).mean((1, 2))))
    return net.init(jax.random.key(0), IMAGE[None])


def of_equinox(with_state):
    make = lambda: eqx.nn.BatchNorm(3, "batch", mode="ema")
    model = eqx.nn.make_with_state(make)()[0] if with_state else make()
    return eqx.partition(model, eqx.is_inexact_array)[0]


AMONG = {
    "nested": lambda: of_linen_within(lambda p, s: {"model": {"params": p, "batch_stats": s}}),
    "attribute": lambda: of_linen_within(Both),
    "tuple": lambda: of_linen_within(lambda p, s: (p, s)),
    "list within": lambda: of_linen_within(lambda p, s: {"model": [s, p]}),
    "haiku": of_haiku,
    "equinox": lambda: of_equinox(with_state=False),
}


@pytest.mark.parametrize("where", AMONG)
def test_statistics_are_found_wherever_they_lie(where):
    with pytest.raises(ValueError, match=r"^params\.\S*(mean|hidden|average|counter|index) is a BatchNorm's statistic"):
        own.own_victim(of_model, AMONG[where](), 4)


def test_what_is_trained_may_be_called_a_mean():
    layer = {"scale": jnp.ones(3), "bias": jnp.ones(3), "mean": jnp.ones(3)}
    own.own_victim(of_model, [{"layer": layer}, {"other": {"mean": jnp.ones(3)}}, layer], 4)
    own.own_victim(of_model, of_linen_within(lambda p, s: (p, p)), 4)


def test_params_without_statistics_are_taken():
    _, params = own.own_victim(of_model, of_equinox(with_state=True), 4)
    assert list(params) == ["bias", "weight"]
    victim, params = own.own_victim(*without_statistics(), 4)
    checks.check_loss(victim.loss, params, IMAGE, LABEL)
    assert list(params) == ["norm.bias", "norm.scale", "out.bias", "out.kernel"]


def test_a_module_of_nnx_may_be_the_params(tmp_path):
    module, _ = made("my_model.py", tmp_path)
    victim, params = own.own_victim(of_model, module.Net(nnx.Rngs(0)), 10)
    other, _ = own.own_victim(*module.make(), 10)
    assert list(params) == ["c1.bias", "c1.kernel", "c2.bias", "c2.kernel", "out.bias", "out.kernel"]
    np.testing.assert_allclose(victim.loss(params, IMAGE, LABEL), other.loss(params, IMAGE, LABEL), rtol=1e-6)


def test_a_whole_module_of_equinox_is_to_be_partitioned():
    model = eqx.nn.MLP(3072, 10, 8, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"params\.activation is a .*, not an array; leave it to loss, as equinox\.partition"):
        own.own_victim(of_model, model, 10)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(x.mean((1, 2)))


MODELS = {
    "nnx": Normed,
    "linen": Linen,
    "equinox": lambda: eqx.nn.MLP(3072, 10, 8, 1, key=jax.random.key(0)),
    "haiku": lambda: hk.transform(lambda x: hk.Linear(4)(x)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_a_loss_is_refused_and_the_page_named(name, planned, data):
    images, labels = data
    model = MODELS[name]()
    words = rf"loss is of the type {type(model).__name__}, which takes no \(params, x, y\); a model of Flax"
    with pytest.raises(ValueError, match=words):
        planned(model, images=images, labels=labels)
    with pytest.raises(ValueError, match=words):
        planned(model, {"w": jnp.ones(3)}, images, labels)


def test_a_file_that_returns_a_model_alone_names_the_page(tmp_path):
    (tmp_path / "alone.py").write_text("import haiku as hk\ndef make(): return hk.transform(lambda x: hk.Linear(4)(x))\n")
    words = r"make\(\) must return \(loss, params\), .* or a torch module, and no Transformed; a model of Flax"
    with pytest.raises(ValueError, match=words):
        own.load_own(f"{tmp_path}/alone.py:make", 10)
