"""What a loss does with its parameters, and so which layout torch's array of each has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from objectives import float32

from gdiff_jax.victims import saved_trees
from gdiff_jax.victims.layouts import torch_axes
from gdiff_jax.victims.own import own_victim
from gdiff_jax.victims.uses import Kind, Use, uses

IMAGE = jnp.zeros((16, 16, 3))
RNG = np.random.default_rng(0)


class Net(nnx.Module):
    """Of arrays that are as square as can be, each used in another way."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(3, 3, (3, 3), strides=(2, 2), rngs=rngs)
        self.patch = nnx.Linear(48, 16, rngs=rngs)
        self.pos = nnx.Embed(16, 16, rngs=rngs)
        self.place = nnx.Param(jnp.ones((16, 16)))
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        x = self.up(self.conv(x[None]))[0, ::2, ::2]
        x = x.reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 48)
        return self.dense(jnp.tanh(self.patch(x) + 8 * self.pos(jnp.arange(16))) + self.place[...]).mean(0)


@pytest.fixture(scope="module")
def net():
    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    decay = lambda params: 1e-4 * sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
    loss = lambda params, x, y: -jax.nn.log_softmax(nnx.merge(graph, params)(x))[y] + decay(params)
    return own_victim(loss, params, 16)


def test_names_of_nnx_are_those_of_its_attributes(net):
    _, params = net
    assert {"conv.kernel", "pos.embedding", "place", "dense.bias"} < set(params)


def test_what_a_loss_does_with_each_parameter(net):
    victim, params = net
    found = uses(victim.loss, params, IMAGE, jnp.asarray(0))
    seen = {name: found[name] - {Use(Kind.UNKNOWN)} for name in found}  # the decay
    assert seen["conv.kernel"] == {Use(Kind.CONVOLUTION, (3, 2, 0, 1))}
    assert seen["up.kernel"] == {Use(Kind.TRANSPOSED, (3, 2, 0, 1))}
    assert seen["patch.kernel"] == {Use(Kind.MATRIX, (0,), of_map=True)}
    assert seen["pos.embedding"] == {Use(Kind.TABLE)}
    assert seen["place"] == {Use(Kind.OTHER)}
    assert seen["dense.kernel"] == {Use(Kind.MATRIX, (0,))}


def test_square_arrays_are_turned_as_they_are_used(net):
    victim, params = net
    used = uses(victim.loss, params, IMAGE, jnp.asarray(0))
    axes = {name: torch_axes(name, value.ndim, used[name]) for name, value in params.items() if value.ndim > 1}
    assert axes == {
        "conv.kernel": (2, 3, 1, 0), "up.kernel": None, "patch.kernel": (1, 0), "pos.embedding": (0, 1), "place": (0, 1),
        "dense.kernel": (1, 0),
    }  # fmt: skip


@pytest.mark.parametrize("way", ["x @ w", "w @ x", "rows of w", "both"])
def test_a_dense_kernel_has_the_layout_that_it_is_multiplied_in(way, tmp_path):
    """Against the product itself: torch's weight (out, in) of the file makes the same of the image."""

    def product(w, x):
        ways = {"x @ w": lambda: x @ w, "w @ x": lambda: w @ x, "rows of w": lambda: w[jnp.arange(4)].sum(0) * x}
        return ways[way]() if way != "both" else w @ (x @ w)

    loss = lambda p, x, y: jnp.sin(product(p["a.kernel"], x.mean((0, 1)))).sum()
    params, image = {"a.kernel": jnp.zeros((4, 4))}, RNG.normal(size=(2, 2, 4)).astype(np.float32)
    theirs = RNG.normal(size=(4, 4)).astype(np.float32)  # (out, in)
    np.savez(tmp_path / "t.npz", **{"a.weight": theirs})
    fit = lambda: saved_trees.fit(str(tmp_path / "t.npz"), params, {}, lambda: uses(loss, params, jnp.asarray(image), 0))
    if way == "both":
        with pytest.raises(ValueError, match=r"of an unknown layout: a.kernel \(4, 4\) .*save it as a.kernel, in the victim's"):
            fit()
        return
    expected = theirs @ image.mean((0, 1)) if way != "rows of w" else theirs.sum(0) * image.mean((0, 1))
    orders = {"a.kernel": None} if way != "rows of w" else {}
    found = saved_trees.fit(str(tmp_path / "t.npz"), params, orders, lambda: uses(loss, params, jnp.asarray(image), 0))
    np.testing.assert_allclose(product(found["a.kernel"], image.mean((0, 1))), expected, rtol=1e-5)


def test_a_convolution_of_equal_sizes_has_the_layout_of_its_equation(tmp_path):
    """HWIO and OIHW kernels of (3, 3, 3, 3): the same file makes the same of an image in both."""
    theirs = RNG.normal(size=(3, 3, 3, 3)).astype(np.float32)  # OIHW
    np.savez(tmp_path / "t.npz", **{"c.weight": theirs})
    image, made = float32(RNG.normal(size=(5, 5, 3))), []
    for layout in ("HWIO", "OIHW"):
        conv = lambda x, w, layout=layout: jax.lax.conv_general_dilated(
            x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC")
        )
        loss = lambda p, x, y, conv=conv: jnp.tanh(conv(x, p["c.kernel"])).sum()
        params = {"c.kernel": jnp.zeros((3, 3, 3, 3))}
        used = uses(loss, params, image, 0)
        found = saved_trees.fit(str(tmp_path / "t.npz"), params, {}, lambda used=used: used)
        made.append(conv(image, found["c.kernel"]))
    np.testing.assert_allclose(made[0], made[1], atol=1e-5)


def test_a_transposed_convolution_is_asked_for_under_its_own_name(net, tmp_path):
    victim, params = net
    arrays = {name.replace("kernel", "weight"): np.ones(value.shape[::-1]) for name, value in params.items()}
    arrays["pos.weight"] = arrays.pop("pos.embedding")
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ValueError, match=r"of an unknown layout: up.kernel .*save it as up.kernel, in the victim's"):
        saved_trees.fit(str(tmp_path / "t.npz"), params, {}, lambda: uses(victim.loss, params, IMAGE, jnp.asarray(0)))


def test_of_weight_on_both_sides_the_other_arrays_tell_the_layout(tmp_path):
    loss = lambda p, x, y: jnp.sin(jnp.tanh(x.mean((0, 1)) @ p["a.weight"]) @ p["z.weight"]).sum()
    params = {"a.weight": jnp.zeros((4, 4)), "z.weight": jnp.zeros((4, 7))}
    a, z = RNG.normal(size=(4, 4)), RNG.normal(size=(4, 7))
    used = lambda: uses(loss, params, jnp.zeros((2, 2, 4)), 0)
    for name, turn in (("ours", lambda v: v), ("torch", np.transpose)):
        np.savez(tmp_path / f"{name}.npz", **{"a.weight": turn(a), "z.weight": turn(z)})
        found = saved_trees.fit(str(tmp_path / f"{name}.npz"), params, {}, used)
        np.testing.assert_allclose(found["a.weight"], a, rtol=1e-6)
        np.testing.assert_allclose(found["z.weight"], z, rtol=1e-6)
    alone = {"a.weight": params["a.weight"]}
    of_one = lambda: uses(lambda p, x, y: jnp.sin(x.mean((0, 1)) @ p["a.weight"]).sum(), alone, jnp.zeros((2, 2, 4)), 0)
    np.savez(tmp_path / "square.npz", **{"a.weight": a})
    with pytest.raises(ValueError, match=r"flattened=a.weight:as-is says that it is the victim's"):
        saved_trees.fit(str(tmp_path / "square.npz"), alone, {}, of_one)
    as_is = saved_trees.fit(str(tmp_path / "square.npz"), alone, {"a.weight": None}, of_one)
    np.testing.assert_allclose(as_is["a.weight"], a, rtol=1e-6)
