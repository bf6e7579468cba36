"""Victims of the user's own: what a file may hold, what is said where it holds something else, and when it has changed."""

import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax.attacks import read_first_dense
from gdiff_jax.matching import victim_gradient
from gdiff_jax.victims import FirstDense, checks, own, own_victim

SHAPE = (16, 16, 3)
IMAGE = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
LABEL = np.int32(2)
MODEL = """
import jax, jax.numpy as jnp

def make():
    k = jax.random.split(jax.random.key(4), 2)
    mean = jnp.array([0.4, 0.5, 0.6]).reshape(1, 1, 3)
    def loss(params, x, y):
        h = jnp.tanh(((x + 1) / 2 - mean).reshape(-1) / 0.25 @ params["a"]["w"] + params["a"]["b"])
        return -jax.nn.log_softmax(h @ params["z"]["w"] + params["z"]["b"])[y]
    return loss, {
        "a": {"w": 0.03 * jax.random.normal(k[0], (768, 20)), "b": jnp.zeros(20)},
        "z": {"w": 0.3 * jax.random.normal(k[1], (20, 10)), "b": jnp.zeros(10)},
    }

def named():
    import collections
    return collections.namedtuple("Victim", "loss params")(*make())

def no_pair(): return 3
def fails(): raise RuntimeError("no such weights")
def no_array(): return (lambda p, x, y: 1.0, {"w": 1.0})
def twice(): return (lambda p, x, y: 1.0, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "own_model.py"
    path.write_text(MODEL)
    return path


def test_the_params_become_flat_and_the_loss_stays_what_it_is(model):
    victim, params = own.load_own(f"{model}:make", 10)
    names = {}
    exec(MODEL, names)
    loss, tree = names["make"]()
    assert list(params) == ["a.b", "a.w", "z.b", "z.w"]
    assert victim.num_classes == 10
    np.testing.assert_allclose(victim.loss(params, IMAGE, LABEL), loss(tree, IMAGE, LABEL), rtol=1e-6)
    gradient, expected = victim_gradient(victim.loss, params, IMAGE, LABEL), victim_gradient(loss, tree, IMAGE, LABEL)
    np.testing.assert_allclose(gradient["a.w"], expected["a"]["w"], rtol=1e-5)
    checks.check_loss(victim.loss, params, IMAGE, LABEL)


def test_the_pair_may_have_names(model):
    (victim, params), (other, _) = (own.load_own(f"{model}:{name}", 10) for name in ("named", "make"))
    assert victim.loss(params, IMAGE, LABEL) == other.loss(params, IMAGE, LABEL)


def test_any_pytree_of_params_will_do():
    victim, params = own_victim(lambda w, x, y: (w * x).sum(), np.ones(3, np.float32), 2)
    assert list(params) == ["params"]
    assert victim.loss(params, jnp.arange(3.0), 0) == 3
    victim, params = own_victim(lambda p, x, y: (p[1][0] * x).sum(), [jnp.zeros(2), (jnp.ones(3),)], 2)
    assert list(params) == ["0", "1.0"]
    assert victim.loss(params, jnp.arange(3.0), 0) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{d}/nowhere.py:make", "nowhere.py cannot be imported"),
        ("no_such_module:make", "no_such_module cannot be imported"),
        ("{d}/own_model.py:nothing", "has no function 'nothing'; it has make, named, no_pair"),
        ("{d}/own_model.py:fails", r"fails\(\) failed \(RuntimeError: no such weights\)"),
        ("{d}/own_model.py:no_pair", r"must return \(loss, params\)"),
        ("{d}/own_model.py:no_array", "params.w is a float, not an array"),
        ("{d}/own_model.py:twice", "the same path; rename one of a.b, a.b"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_by_name(name, words, model):
    name = name.format(d=model.parent)
    assert own.is_own(name)
    with pytest.raises(ValueError, match=f"^victim '{name}': .*{words}"):
        own.load_own(name, 10)


@pytest.mark.parametrize(
    ("loss", "params", "words"),
    [
        (lambda p, x, y: p["w"] * x.sum(), jnp.ones(3), r"\(3,\).*floating scalar is needed"),
        (lambda p, x, y: p["w"].sum() * 1.0, jnp.ones(3, jnp.int32), "is int32; .*floating arrays"),
        (lambda p, x, y: (p["w"] ** 2).sum(), jnp.ones(3), "does not depend on the image"),
        (lambda p, x, y: x.sum() + 0 * p["w"].sum(), jnp.ones(3), "gradient is zero"),
        (lambda p, x, y: (jnp.sqrt(p["w"]) * x.sum()).sum(), jnp.zeros(3), "no finite gradient"),
        (lambda p, x, y: (x.reshape(99, -1) @ p["w"]).sum(), jnp.ones(3), r"loss\(params, x, y\) failed .*\(16, 16, 3\)"),
    ],
)
def test_a_loss_that_cannot_be_attacked_is_refused(loss, params, words):
    with pytest.raises(ValueError, match=words):
        checks.check_loss(loss, {"w": params}, IMAGE, LABEL)


@pytest.mark.parametrize(
    ("label", "remedy"), [([1], r"labels\.ravel\(\)"), (1.0, r"float32: .*astype\(int\)"), (True, r"bool: .*astype\(int\)")]
)
def test_a_label_that_is_no_number_of_a_class_is_told(label, remedy):
    loss = lambda params, x, y: -jax.nn.log_softmax(x.reshape(-1) @ params["w"])[y]
    with pytest.raises(ValueError, match=remedy):
        checks.check_loss(loss, dense(IMAGE.size), IMAGE, np.asarray(label))


def loss_of_a_batch(params, x, y):
    assert x.ndim == 4
    assert y.ndim == 1
    logits = x.reshape(len(x), -1) @ params["w"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def test_a_loss_that_takes_a_batch_alone_is_called_with_a_batch_of_one():
    params = dense(27)
    x, y = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 3, 3)), jnp.float32), jnp.asarray(1)
    loss = checks.of_one_image(loss_of_a_batch, params, x, y)
    checks.check_loss(loss, params, x, y)
    assert float(loss(params, x, y)) == pytest.approx(-float(jax.nn.log_softmax(x.reshape(-1) @ params["w"])[1]), rel=1e-6)
    assert loss(params, x, y) == loss_of_a_batch(params, x[None], y[None])


def test_a_loss_of_one_image_or_of_neither_stays_what_it_is():
    x, y = jnp.zeros((3, 3, 3)), jnp.asarray(1)
    either = lambda params, x, y: (x.reshape(-1, 27) @ params["w"]).sum()
    assert checks.of_one_image(either, dense(27), x, y) is either
    vector = lambda params, x, y: x.reshape(-1, 27) @ params["w"]
    assert checks.of_one_image(vector, dense(27), x, y) is vector


@pytest.mark.parametrize("reduce", [jnp.mean, jnp.sum])
def test_a_loss_of_batches_that_is_another_function_of_an_image_is_called_with_a_batch(reduce):
    """A mean over axes 1 and 2 is over the pixels of a batch, and over columns and channels of an image."""
    x, y = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (3, 3, 3)), jnp.float32), jnp.asarray(1)
    kernel = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(3, 1)), jnp.float32)}
    pooled = lambda params, x, y: reduce(jnp.tanh(x.mean((1, 2)) @ params["w"]))
    assert checks.of_one_image(pooled, kernel, x, y)(kernel, x, y) == pooled(kernel, x[None], y[None])
    assert pooled(kernel, x, y) != pooled(kernel, x[None], y[None])
    of_image = lambda params, x, y: reduce(jnp.tanh(x[None].mean((1, 2)) @ params["w"]) ** 2)
    assert checks.of_one_image(of_image, kernel, x, y) is of_image  # though it takes a batch too, and mixes its images


def test_a_loss_that_draws_when_it_is_traced_is_refused():
    draws = lambda params, x, y: (x.sum() * params["w"] * np.random.default_rng().random(3)).sum()
    fixed = lambda params, x, y: (x.sum() * params["w"] * np.random.default_rng(0).random(3)).sum()
    seeded = lambda params, x, y: fixed(params, x + jax.random.normal(jax.random.key(0), x.shape), y)
    drawn_key = lambda params, x, y: fixed(params, x + jax.random.normal(jax.random.key(random.randrange(2**31)), x.shape), y)
    for loss in (fixed, seeded):
        own.check_repeats(loss, {"w": jnp.ones(3)}, IMAGE, LABEL)
    for loss in (draws, drawn_key):
        with pytest.raises(ValueError, match="whenever it is traced"):
            own.check_repeats(loss, {"w": jnp.ones(3)}, IMAGE, LABEL)


def test_images_without_a_finite_gradient_are_named():
    loss = lambda p, x, y: jnp.where(y == 0, 1.0, jnp.inf) * (p["w"] * x.sum()).sum()
    images, labels = np.stack([IMAGE] * 3), np.arange(3)
    checks.check_gradients(loss, {"w": jnp.ones(3)}, images[:1], labels[:1])
    with pytest.raises(ValueError, match=r"2 of 3 images \(1, 2, counted from 0\)"):
        checks.check_gradients(loss, {"w": jnp.ones(3)}, images, labels)


def test_a_first_dense_layer_is_found_behind_a_normalisation(model):
    """tanh's input is ((x + 1) / 2 - mean) / 0.25, so scale 2 and shift (1/2 - mean) / 0.25."""
    victim, params = own.load_own(f"{model}:make", 10)
    layer = own.find_first_dense(victim, params, SHAPE, LABEL).first_dense
    assert (layer.kernel, layer.bias) == ("a.w", "a.b")
    np.testing.assert_allclose(layer.scale, (2, 2, 2), rtol=1e-3)
    np.testing.assert_allclose(layer.shift, (0.4, 0, -0.4), atol=1e-3)
    curved, params = own_victim(lambda p, x, y: jnp.tanh((x**2).reshape(-1) @ p["w"] + p["b"]).sum(), dense(768), 10)
    assert own.find_first_dense(curved, params, SHAPE, LABEL).first_dense is None
    assert FirstDense("fc1.kernel", "fc1.bias").scale is None


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_first_dense_layer_is_found_in_either_layout_and_order(transposed, channels_first):
    """Equinox holds (neurons, pixels), torch flattens (C, H, W); the kernel is read as (pixels, neurons) in our order."""
    params = dense(768)
    flat = lambda x: (x.transpose(2, 0, 1) if channels_first else x).ravel()
    loss = lambda p, x, y: jnp.tanh(flat(x) @ (p["w"].T if transposed else p["w"]) + p["b"]).sum()
    stored = params | {"w": params["w"].T if transposed else params["w"]}
    layer = own.find_first_dense(*own_victim(loss, stored, 10), SHAPE, LABEL).first_dense
    assert (layer.transposed, layer.chw) == (transposed, (3, 16, 16) if channels_first else None)
    leak = victim_gradient(loss, stored, IMAGE, LABEL)
    np.testing.assert_allclose(read_first_dense(layer, leak, SHAPE).x, IMAGE, atol=1e-4)
    ours = layer.kernel_of(stored)
    np.testing.assert_allclose(IMAGE.ravel() @ ours, flat(IMAGE) @ params["w"], atol=1e-3)


def dense(rows):
    return {"w": jnp.asarray(np.random.default_rng(1).normal(size=(rows, 4)), jnp.float32), "b": jnp.zeros(4)}


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
TABLE = jnp.asarray(np.arange(300.0) / ({table} + np.arange(300.0)), jnp.float32)
INNER = jnp.asarray([1.0, {inner}, 3.0])

@jax.custom_jvp
def rounded(x):
    return jnp.round(4 * x) / 4

rounded.defjvp(lambda primals, tangents: (rounded(*primals), {slope} * tangents[0]))

@jax.jit
def inside(x):
    return x * INNER

def make():
    def loss(params, x, y):
        h = jax.lax.scan(lambda h, row: (jax.nn.{activation}(inside(h) * row.sum()), None), params["w"], x[:2])[0]
        return (jax.nn.relu(rounded(h)) * TABLE.sum() * {scalar}).sum() + (y * params["w"]).sum()
    return loss, {{"w": jnp.ones(3)}}
"""
PARTS = dict(table="7", inner="2.0", slope="1.0", activation="relu", scalar="0.5")


def fingerprint_of(path):
    victim, params = own.load_own(f"{path}:make", 10)
    return own.fingerprint(victim.loss, params, IMAGE, LABEL)


def test_a_loss_is_known_again_in_another_process_and_each_change_of_it_is_seen(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(**PARTS))
    known = fingerprint_of(path)
    assert fingerprint_of(path) == known
    script = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    script += f"from test_own_victims import fingerprint_of; print(fingerprint_of({str(path)!r}))"
    env = os.environ | {"PYTHONHASHSEED": "5"}
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert other.stdout.strip() == known
    jax.make_jaxpr(lambda x: jax.nn.relu(x) + jax.nn.silu(x))(jnp.ones(3))  # what was traced before does not count
    assert fingerprint_of(path) == known
    changes = dict(table="8", inner="2.5", slope="2.0", activation="silu", scalar="0.25")
    for part, value in changes.items():
        path.write_text(PROGRAM.format(**PARTS | {part: value}))
        assert fingerprint_of(path) != known, part


def test_values_of_the_arguments_do_not_count_and_their_shapes_do():
    loss, zeros = (lambda p, x, y: (p["w"] * x).sum()), {"w": jnp.zeros(3)}
    known = own.fingerprint(loss, zeros, IMAGE, LABEL)
    assert own.fingerprint(loss, {"w": jnp.ones(3)}, -IMAGE, np.int32(1)) == known
    assert own.fingerprint(loss, zeros, IMAGE[:8], LABEL) != known
    assert own.fingerprint(loss, zeros, IMAGE, np.float32(1)) != known


def test_random_keys_among_the_constants_count():
    loss = lambda key: lambda p, x, y: (p["w"] * x * jax.random.normal(key, (3,))).sum()
    one, same, two = (own.fingerprint(loss(jax.random.key(s)), {"w": jnp.zeros(3)}, IMAGE, LABEL) for s in (1, 1, 2))
    assert one == same != two


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_few_bits_are_attacked_in_float32(dtype):
    loss = lambda p, x, y: jnp.sin(x.astype(p["w"].dtype).mean() * p["w"]).sum().astype(jnp.float32)
    victim, params = own_victim(loss, {"w": jnp.arange(3, dtype=dtype)}, 10)
    checks.check_loss(victim.loss, params, IMAGE, LABEL)
    assert params["w"].dtype == jnp.float32
    expected = IMAGE.mean() * np.cos(IMAGE.mean() * np.arange(3.0))
    np.testing.assert_allclose(victim_gradient(victim.loss, params, IMAGE, LABEL)["w"], expected, rtol=1e-5)
    alone = lambda p, x, y: jax.lax.mul(p["w"], jnp.ones(3, dtype)).sum().astype(jnp.float32) * x.mean()
    with pytest.raises(ValueError, match=r"are taken in float32: let the loss cast x to its params' dtype"):
        checks.check_loss(alone, {"w": jnp.ones(3, dtype)}, IMAGE, LABEL)


def test_a_file_that_needs_torch_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    (tmp_path / "needs_torch.py").write_text("import torch\n")
    with pytest.raises(ValueError, match=r'needs_torch\.py cannot be imported .*; pip install "gdiff-jax\[torch\]"$'):
        own.load_own(f"{tmp_path}/needs_torch.py:make", 10)


def test_torch_is_imported_where_a_module_is_audited_alone():
    """Not by what tells modules apart, nor for a loss on JAX."""
    script = "import sys, gdiff_jax.victims, gdiff_jax.victims.own\nfrom gdiff_jax.victims.torch_model import as_model\n"
    script += (
        "assert as_model(lambda p, x, y: 0) is None\nprint([name for name in ('torch', 'torchax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
