"""Tokens under noise, against the truth and what the estimate says of its own error."""

import numpy as np
import pytest

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
