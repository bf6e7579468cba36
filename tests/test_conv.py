"""The convolutions compute what `lax.conv_general_dilated` computes, in value and in every derivative taken of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from jax import lax

from gdiff_jax.conv import conv_prior, conv_upsampled, conv_victim
from gdiff_jax.priors.layers import upsample

SAME, ASYMMETRIC, WIDE, UNLIKE = ((1, 1), (1, 1)), ((0, 1), (0, 1)), ((2, 2), (2, 2)), ((2, 0), (0, 1))
CASES = [*itertools.product((1, 3, 5), (1, 2), (SAME, ASYMMETRIC, WIDE)), (3, 2, UNLIKE), (2, 3, SAME)]


def lax_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def derivatives(conv, x, kernel, g):
    value, pull = jax.vjp(conv, x, kernel)
    return value, *pull(g(value))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("size", "stride", "padding"), CASES)
def test_conv_equals_lax_conv_under_vmap(size: int, stride: int, padding: tuple) -> None:
    """Value, input gradient and kernel gradient, of an odd and an even side in one image, two trials."""
    rng = np.random.default_rng(size + 10 * stride)
    x, kernel = jnp.asarray(rng.normal(size=(2, 2, 7, 10, 2))), jnp.asarray(rng.normal(size=(2, size, size, 2, 3)))
    cotangent = lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    @jax.vmap
    def all_three(x, kernel):
        convs = (lax_conv, conv_prior, conv_victim)
        return [derivatives(lambda x, k, f=f: f(x, k, stride, padding), x, kernel, cotangent) for f in convs]

    expected, *results = all_three(x, kernel)
    for result in results:
        for name, a, b in zip(("value", "input gradient", "kernel gradient"), result, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_upsampling_conv_equals_conv_of_the_doubled_image_under_vmap() -> None:
    rng = np.random.default_rng(2)
    x, kernel = jnp.asarray(rng.normal(size=(2, 2, 5, 4, 2))), jnp.asarray(rng.normal(size=(2, 3, 3, 2, 3)))
    cotangent = lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    @jax.vmap
    def both(x, kernel):
        two_steps = lambda x, k: lax_conv(upsample(x), k, 1, SAME)
        return [derivatives(f, x, kernel, cotangent) for f in (conv_upsampled, two_steps)]

    for name, a, b in zip(("value", "input gradient", "kernel gradient"), *both(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_input_that_no_window_sees_has_gradient_zero() -> None:
    """Stride 2 over 8 pixels without padding leaves the last row and column out: the pull-back must pad, not shift."""
    x, kernel = jnp.ones((1, 8, 8, 1)), jnp.ones((3, 3, 1, 1))
    for conv in (conv_prior, conv_victim):
        grad = jax.jit(jax.grad(lambda x, f=conv: f(x, kernel, 2, ((0, 0), (0, 0))).sum()))(x)[0, :, :, 0]
        assert grad.shape == (8, 8)
        assert np.all(grad[-1] == 0)
        assert np.all(grad[:, -1] == 0)
        assert np.all(grad[:7, :7] > 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("stride", "padding"), [(1, WIDE), (2, WIDE), (2, ASYMMETRIC)])
def test_conv_victim_mixed_derivative_equals_lax_conv(stride: int, padding: tuple) -> None:
    """What gradient matching takes of it: the tangent, in the kernel, of an input gradient."""
    rng = np.random.default_rng(1)
    x, kernel, v = (jnp.asarray(rng.normal(size=s)) for s in ((1, 7, 8, 2), (5, 5, 2, 3), (5, 5, 2, 3)))

    def mixed(conv):
        grad_x = lambda k: jax.grad(lambda x: jnp.sin(conv(x, k, stride, padding)).sum())(x)
        return jax.jit(lambda: jax.jvp(grad_x, (kernel,), (v,))[1], compiler_options=QUICK_COMPILE)()

    np.testing.assert_allclose(mixed(conv_victim), mixed(lax_conv), rtol=1e-11, atol=1e-11)


def test_default_padding_keeps_the_size() -> None:
    x, kernel = jnp.ones((1, 5, 6, 2)), jnp.ones((3, 3, 2, 4))
    assert conv_prior(x, kernel).shape == conv_victim(x, kernel).shape == (1, 5, 6, 4)
