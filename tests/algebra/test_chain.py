"""The layers of a loss are found in its jaxpr, whatever wrote it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from gdiff_jax import algebra, victims
from gdiff_jax.algebra.chain import find_chain
from gdiff_jax.algebra.layers import activation_of, layers_of
from gdiff_jax.algebra.links import Kind

SHAPE = (8, 8, 3)
IMAGE = np.zeros(SHAPE, np.float32)


def kinds(loss, params):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float64), params)
        return layers_of(find_chain(loss, wide, jax.ShapeDtypeStruct(SHAPE, jnp.float64), jnp.asarray(1)))


def weights(victim):
    return victim.init(jax.random.key(0))


def test_a_convolutional_network_is_its_layers():
    victim = victims.cnn(SHAPE, 4, channels=(3, 4))
    layers = kinds(victim.loss, weights(victim))
    assert [layer.kind.value for layer in layers] == ["affine", "pointwise"] * 2 + ["affine", "other", "affine"]
    assert [layer.shape for layer in layers[:5]] == [SHAPE, (1, 8, 8, 3), (1, 8, 8, 3), (1, 4, 4, 4), (1, 4, 4, 4)]
    assert layers[0].input_shape == (1, 8, 8, 3)  # not the patches of it


def test_a_norm_attention_and_a_shortcut_are_neither():
    for victim in (victims.resnet(SHAPE, 4, channels=(8,)), victims.cnn(SHAPE, 4, channels=(3,), norm="batch")):
        assert Kind.OTHER in [layer.kind for layer in kinds(victim.loss, weights(victim))[:3]]


def test_a_pool_is_put_before_the_parameters():
    victim = victims.cnn(SHAPE, 4, channels=(3, 4, 5), pooling="mean")
    layer = kinds(victim.loss, weights(victim))[4]
    assert (layer.shape, layer.input_shape) == ((1, 8, 8, 4), (1, 4, 4, 4))


class OfLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.sigmoid(linen.Conv(4, (3, 3), strides=2)(x[None]))
        return linen.Dense(4)(x.reshape(-1))


def test_linen_and_a_plain_function_have_the_same_layers():
    net = OfLinen()
    params = net.init(jax.random.key(0), jnp.zeros(SHAPE))
    of_linen = lambda params, x, y: -jax.nn.log_softmax(net.apply(params, x))[y]

    def plain(params, x, y):
        p = params["params"]
        dims = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(x[None], p["Conv_0"]["kernel"], (2, 2), "SAME", dimension_numbers=dims)
        h = jax.nn.sigmoid(z + p["Conv_0"]["bias"].reshape(1, 1, 1, -1))
        logits = h.reshape(-1) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        return -jax.nn.log_softmax(logits)[y]

    with jax.numpy_rank_promotion("allow"):
        both = [kinds(loss, params) for loss in (of_linen, plain)]
    assert [[layer.kind for layer in layers[:3]] for layers in both] == [[Kind.AFFINE, Kind.POINTWISE, Kind.AFFINE]] * 2
    assert both[0][0].leaves == both[1][0].leaves


@pytest.mark.parametrize(
    ("activation", "kinked", "lower"),
    [
        (jax.nn.relu, True, 0.0),
        (jax.nn.sigmoid, False, -np.inf),
        (jax.nn.leaky_relu, True, -np.inf),
        (jax.nn.softplus, False, -np.inf),
        (jax.nn.gelu, None, None),
        (jax.nn.silu, None, None),
    ],
)
def test_what_an_activation_is(activation, kinked, lower):
    victim = victims.mlp(SHAPE, 4, widths=(5,), activation=activation)
    params = weights(victim)
    layer = kinds(victim.loss, params)[1]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        found = activation_of(layer, [])
    assert (found is None) == (kinked is None)
    if found is not None:
        assert found.kinked == kinked
        assert found.lower == pytest.approx(lower, abs=1e-15)


def test_explain_says_where_it_stops():
    lines = algebra.explain(*(lambda v: (v.loss, weights(v)))(victims.cnn(SHAPE, 4, channels=(3,))), IMAGE)
    assert "inverted" in lines[1]
    assert "fc.bias" in lines[2]
    stopped = algebra.explain(*(lambda v: (v.loss, weights(v)))(victims.resnet(SHAPE, 4, channels=(8,))), IMAGE)
    assert "cannot be inverted" in stopped[0]


@pytest.mark.parametrize("name", ["mlp", "transposed", "vit", "conv"])
def test_a_label_is_read_off_the_whole_last_layer(name):
    """Under noise that hides it in the bias alone: of either layout of the matrix; where there is none, of the bias."""
    if name == "transposed":
        victim = victims.mlp(SHAPE, 10, widths=(64,))
        kernel = victim.last_kernel
        turned = lambda params: {**params, kernel: params[kernel].T}
        loss, params = (lambda params, x, y: victim.loss(turned(params), x, y)), turned(weights(victim))
    elif name == "conv":  # its last kernel is of four axes, and its gradient is no outer product's that would be looked for
        rng = np.random.default_rng(0)
        params = dict(kernel=np.float32(rng.normal(size=(8, 8, 3, 10)) / 20), bias=np.zeros(10, np.float32))

        def loss(params, x, y):
            layout = ("NHWC", "HWIO", "NHWC")
            z = jax.lax.conv_general_dilated(x[None], params["kernel"], (1, 1), "VALID", dimension_numbers=layout)
            return -jax.nn.log_softmax(z.ravel() + params["bias"])[y]
    else:
        victim = victims.mlp(SHAPE, 10, widths=(64,)) if name == "mlp" else victims.vit_tiny(SHAPE, 10)
        loss, params = victim.loss, weights(victim)
    rng = np.random.default_rng(1)
    x = np.float32(rng.uniform(-1, 1, SHAPE))
    gradient = jax.jit(jax.grad(loss))
    right, by_bias = [], []
    sigma = 0.2 if name == "conv" else 0.45
    for y in range(10):
        leak = gradient(params, x, y)
        noisy = jax.tree.map(lambda g: g + np.float32(sigma * rng.normal(size=g.shape)), leak)
        bias = next(name for name in reversed(noisy) if name.endswith("bias") and noisy[name].size == 10)
        right.append(algebra.infer_label(loss, params, noisy, SHAPE) == y)
        by_bias.append(int(np.argmin(noisy[bias])) == y)
        assert algebra.infer_label(loss, params, jax.tree.map(lambda g: g * np.float32(1e-25), leak), SHAPE) == y
    assert sum(right) >= (10 if name != "mlp" else 9)
    assert name == "conv" or sum(right) > sum(by_bias)
