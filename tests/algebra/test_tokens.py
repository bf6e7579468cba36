"""Tokens under noise, against the truth and what the estimate says of its own error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import random_weights

import gdiff_jax as gd
from gdiff_jax import algebra, victims
from gdiff_jax.algebra.tokens import tokens_under_noise

T, D_IN, D_OUT, VARIANCE = 16, 12, 40, 0.1


@pytest.mark.parametrize("sigma", [1e-6, 0.003, 0.01])
def test_its_error_is_what_it_says(sigma):
    rng = np.random.default_rng(0)
    mean = 0.2 * rng.normal(size=(T, D_IN))
    a = mean + VARIANCE**0.5 * rng.normal(size=mean.shape)
    delta = rng.normal(size=(T, D_OUT)) / D_OUT**0.5
    gradient = a.T @ delta + sigma * rng.normal(size=(D_IN, D_OUT))
    found = tokens_under_noise(gradient, delta + sigma * rng.normal(size=delta.shape), sigma, mean, VARIANCE)
    error = np.sqrt(np.mean(np.square(found.tokens - a)))
    assert error == pytest.approx(np.sqrt(np.mean(np.square(found.std))), rel=0.2)
    assert (error < 1e-5) == (sigma < 1e-5)


def test_the_image_of_a_noisy_transformer_is_found_by_its_tokens():
    shape = (8, 8, 3)
    victim = victims.vit_tiny(shape, 4, dim=24, heads=2, depth=1)
    params, y = random_weights(victim), jnp.asarray(2)
    image = np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)
    leaves, tree = jax.tree.flatten(gd.victim_gradient(victim.loss, params, jnp.asarray(image), y))
    rng = np.random.default_rng(1)
    expected = np.zeros(shape)
    errors = []
    for sigma in (1e-6, 1e-2, 1e3):
        leak = jax.tree.unflatten(tree, [np.asarray(g) + sigma * rng.normal(size=g.shape).astype(np.float32) for g in leaves])
        found = algebra.image_of_tokens(victim.loss, params, leak, shape, y, sigma, expected)
        errors.append(np.sqrt(np.mean(np.square(found - image))))
    assert errors[0] < 0.01
    assert errors[0] < errors[1] < 1.01 * np.sqrt(np.mean(np.square(image)))
    assert errors[2] < 1.2 * np.sqrt(np.mean(np.square(image)))  # where all is noise, which passes for delta


def test_other_first_layers_have_no_tokens():
    victim = victims.cnn((8, 8, 3), 4, channels=(4, 8))
    params, y = random_weights(victim), jnp.asarray(2)
    leak = gd.victim_gradient(victim.loss, params, jnp.zeros((8, 8, 3)), y)
    assert algebra.image_of_tokens(victim.loss, params, leak, (8, 8, 3), y, 0.1, np.zeros((8, 8, 3))) is None
