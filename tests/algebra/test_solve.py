"""What can be solved is, to many digits, from a leak in float32; what cannot is said to be so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32, random_weights

from gdiff_jax import algebra, victims

SHAPE, CLASSES = (8, 8, 3), 4
CASES = {
    "dense": (victims.mlp(SHAPE, CLASSES, widths=(16,)), 140),
    "tokens": (victims.vit_tiny(SHAPE, CLASSES, dim=24, heads=2, depth=1), 80),
    "sigmoid": (victims.cnn(SHAPE, CLASSES, channels=(8, 8), activation=jax.nn.sigmoid), 90),
    "tanh": (victims.cnn(SHAPE, CLASSES, channels=(8, 8), activation=jnp.tanh), 100),
    "relu": (victims.cnn(SHAPE, CLASSES, channels=(12, 24)), 100),
}
IMAGE = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
LABEL = jnp.asarray(2)


@functools.cache
def leak_of(victim):
    params = random_weights(victim)
    return params, jax.device_get(jax.jit(jax.grad(victim.loss))(params, jnp.asarray(IMAGE), LABEL))


def psnr(image):
    return 10 * np.log10(4 / np.mean(np.square(image - IMAGE)))


@pytest.mark.parametrize("name", CASES)
def test_the_image_is_solved(name):
    victim, least = CASES[name]
    solution = algebra.solve(victim.loss, *leak_of(victim), SHAPE, LABEL)
    assert solution.exact, solution
    assert psnr(solution.image) > least, solution


def solved(victim, seed):
    """Of an image of that seed, with the programs that were compiled on the way."""
    image = float32(np.random.default_rng(seed).uniform(-1, 1, SHAPE))
    params, _ = leak_of(victim)
    leak = jax.device_get(jax.jit(jax.grad(victim.loss))(params, image, LABEL))
    compiled, note = [], lambda event, _, **of: compiled.append(of) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        algebra.solve(victim.loss, params, leak, SHAPE, LABEL)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return compiled


def test_a_second_leak_of_a_network_compiles_nothing():
    victim = victims.cnn(SHAPE, CLASSES, channels=(4, 12))  # of its own: nothing of it was compiled before
    assert solved(victim, 1)
    assert not solved(victim, 2)


def test_a_clipped_gradient_is_solved_as_well():
    """Its length is all that clipping changes."""
    victim, _ = CASES["tokens"]
    params, leak = leak_of(victim)
    solution = algebra.solve(victim.loss, params, jax.tree.map(lambda g: 0.01 * g, leak), SHAPE, LABEL)
    assert solution.exact
    assert psnr(solution.image) > 80
    assert solution.steps[-1] == "the leak is 0.01 times the gradient of that image"


def test_batch_norms_with_constant_statistics_are_affine():
    """As in evaluation: of public images, say, which are not the private one's own."""
    victim = victims.cnn(SHAPE, CLASSES, channels=(12, 24), norm="batch")
    params = random_weights(victim)
    public = float32(np.random.default_rng(1).uniform(-1, 1, (5, *SHAPE)))
    y = (LABEL, victim.batch_statistics(params, public))
    leak = jax.device_get(jax.jit(jax.grad(victim.loss_replaced_statistics))(params, jnp.asarray(IMAGE), y))
    solution = algebra.solve(victim.loss_replaced_statistics, params, leak, SHAPE, y)
    assert solution.exact, solution
    assert psnr(solution.image) > 100, solution


def test_what_is_left_open_is_named():
    """Few channels: the part that is determined is right, and the inequalities hold at the truth."""
    victim = victims.cnn(SHAPE, CLASSES, channels=(3, 12))
    solution = algebra.solve(victim.loss, *leak_of(victim), SHAPE, LABEL)
    assert not solution.exact
    null, matrix, bound = solution.open
    np.testing.assert_allclose(null.T @ null, np.eye(null.shape[1]), atol=1e-9)
    away = (IMAGE - solution.image).ravel()
    assert 0 < null.shape[1] < IMAGE.size
    np.testing.assert_allclose(away - null @ (null.T @ away), 0, atol=1e-3)
    assert (matrix @ (null.T @ away) <= bound + 1e-3).all()


@pytest.mark.parametrize(
    ("victim", "change", "words"),
    [
        (victims.resnet(SHAPE, CLASSES, channels=(8,)), lambda g: g, "cannot be inverted"),
        (CASES["relu"][0], lambda g: 0 * g, "the gradient is zero"),
        (CASES["relu"][0], lambda g: np.nan * g, "not finite"),
    ],
)
def test_what_cannot_be_solved_is_a_sentence(victim, change, words):
    params, leak = leak_of(victim)
    solution = algebra.solve(victim.loss, params, jax.tree.map(change, leak), SHAPE, LABEL)
    assert solution.image is None
    assert words in " ".join(solution.steps)


def test_a_gradient_of_other_weights_is_not_called_exact():
    victim, _ = CASES["relu"]
    _, leak = leak_of(victim)
    solution = algebra.solve(victim.loss, victim.init(jax.random.key(7)), leak, SHAPE, LABEL)
    assert not solution.exact


def test_dead_units_are_said_to_be_dead():
    victim, _ = CASES["dense"]
    params, _ = leak_of(victim)
    dead = params | {"fc1.bias": params["fc1.bias"] - 100.0}
    leak = jax.device_get(jax.grad(victim.loss)(dead, jnp.asarray(IMAGE), LABEL))
    solution = algebra.solve(victim.loss, dead, leak, SHAPE, LABEL)
    assert not solution.exact
    assert "zero" in solution.steps[-1]
