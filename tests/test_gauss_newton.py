"""Gauss-Newton steps with the prior lower distance and error, and are known to fit by the loss alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32

import gdiff_jax as gd
from gdiff_jax.gauss_newton import MOMENTUM, PASSES, refine, residual_of, smooth
from gdiff_jax.matching import equal_layers
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise
from gdiff_jax.problem import Problem
from gdiff_jax.pytrees import pytree
from gdiff_jax.schedule import make_betas
from gdiff_jax.victims import VICTIMS, make_victim, mlp

SHAPE, CLASSES, SIGMA = (8, 8, 3), 4, 2e-4
IMAGE = float32(0.5 * np.random.default_rng(0).normal(size=SHAPE).clip(-1.5, 1.5))
LABEL = jnp.asarray(2)
NEAR = IMAGE + 0.2 * jax.random.normal(jax.random.key(5), SHAPE)


@pytree
class Exact:
    """eps of pixels drawn from N(0, 0.5^2)."""

    abar: jax.Array

    def __call__(self, x_t, t):
        return jnp.sqrt(1 - self.abar[t]) / (0.25 * self.abar[t] + 1 - self.abar[t]) * x_t, None


PRIOR = Exact(float32(np.cumprod(1 - make_betas())))
SCHEDULE = gd.Schedule.create(make_betas(), 8)


@functools.cache
def problem_of(mechanism=None, sigma=SIGMA):
    """Of a tanh network whose gradient determines the image."""
    victim = mlp(SHAPE, CLASSES, widths=(32,), activation=jax.nn.tanh)
    params = victim.init(jax.random.key(1))
    gradient = gd.victim_gradient(victim.loss, params, IMAGE, LABEL)
    gradient = gradient if mechanism is None else mechanism.simulate(gradient, None)
    leak = GaussianNoise(sigma)(jax.random.key(2), gradient)
    match = gd.GradientMatching(params, LABEL, leak, victim.loss, mechanism=mechanism)
    return Problem(PRIOR, SCHEDULE, match, jnp.zeros(SHAPE), sigma=jnp.float32(sigma), shape=SHAPE, truth=IMAGE)


refined = jax.jit(refine)


def error(x):
    return float(jnp.square(x - IMAGE).mean())


@pytest.mark.parametrize("clipped", [False, True])
def test_it_lowers_the_distance_and_the_error(clipped):
    """From a start that is nothing of the image."""
    mechanism = Chain((Clip(0.5), GaussianNoise(SIGMA))) if clipped else None
    problem = problem_of(mechanism)
    start = jnp.zeros(SHAPE)
    x = refined(problem, start)
    assert problem.match(x) < 0.1 * problem.match(start)
    assert error(x) < 0.1 * error(start)


def test_the_residual_is_the_distance_without_weights():
    match = problem_of(Chain((Clip(0.5), GaussianNoise(SIGMA)))).match
    weighted = dataclasses.replace(match, weights=equal_layers(match.leak))
    r = jnp.concatenate([a.ravel() for a in jax.tree.leaves(residual_of(weighted)(NEAR))])
    np.testing.assert_allclose(jnp.linalg.norm(r), match(NEAR), rtol=1e-5)


def test_it_goes_on_while_the_distance_falls(monkeypatch):
    """From where it ended, as often as it may; what lowers the distance by no more than chance is not taken."""
    near = IMAGE + 0.05

    used = []

    def half_way(x, *_, momentum, **__):
        jax.debug.callback(lambda momentum: used.append(round(float(momentum), 6)), momentum)
        return (x + near) / 2

    monkeypatch.setattr("gdiff_jax.samplers.plug_and_play", half_way)
    problem, start = problem_of(), jnp.full(SHAPE, 3.0)
    x = refine(problem, start)
    np.testing.assert_allclose(x, near + (start - near) / 2**PASSES, atol=1e-5)
    jax.effects_barrier()
    assert used == [0.0] + [MOMENTUM] * (PASSES - 1)
    at_end = problem_of(sigma=100.0)
    np.testing.assert_allclose(refine(at_end, start), (start + near) / 2, atol=1e-5)


def test_under_noise_that_hides_everything_it_ends_at_what_the_prior_expects():
    """Pixels of mean 0: wherever it starts, and not in what fits the noise."""
    problem = problem_of(sigma=100.0)
    for start in (IMAGE, 3 * NEAR[::-1]):
        assert jnp.sqrt(jnp.square(refined(problem, start)).mean()) < 0.1


def test_a_start_that_is_not_finite_is_returned():
    broken = NEAR.at[0, 0, 0].set(jnp.nan)
    np.testing.assert_array_equal(refined(problem_of(), broken), broken)


def test_trials_under_vmap_are_those_alone():
    """Over images and sigmas."""
    problem, starts, sigmas = problem_of(), jnp.stack([NEAR, IMAGE]), jnp.asarray([SIGMA, 5 * SIGMA])
    run = lambda start, sigma: refine(dataclasses.replace(problem, sigma=sigma), start)
    both = jax.jit(jax.vmap(run))(starts, sigmas)
    for k in range(2):
        np.testing.assert_allclose(both[k], jax.jit(run)(starts[k], sigmas[k]), atol=2e-3)


def test_it_is_lowered_for_tpu():
    text = jax.jit(refine).trace(problem_of(), NEAR).lower(lowering_platforms=("tpu",)).as_text()
    assert "f64" not in text
    assert "custom_call" not in text


def of(loss, params, label=LABEL, shape=SHAPE):
    match = gd.GradientMatching(params, label, jax.tree.map(jnp.zeros_like, params), loss)
    return Problem(PRIOR, SCHEDULE, match, jnp.zeros(SHAPE), shape=shape)


def abstract(name):
    victim = make_victim(name, SHAPE, CLASSES)
    return of(victim.loss, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(victim.init, jax.random.key(0))))


@pytest.mark.parametrize("name", VICTIMS)
def test_which_victims_are_smooth(name):
    smooths = ("sigmoid", "tanh", "gelu", "vit")
    assert smooth(abstract(name)) == any(word in name for word in smooths)


def test_a_problem_of_several_images_or_steps_is_not():
    problem = abstract("mlp-tanh")
    assert not smooth(dataclasses.replace(problem, shape=(2, *SHAPE)))
    client = gd.LocalSGD(0.1, 2)
    assert not smooth(dataclasses.replace(problem, match=dataclasses.replace(problem.match, client=client)))


ACTIVATIONS = {
    "softplus": (jax.nn.softplus, True), "silu": (jax.nn.silu, True), "log_sigmoid": (jax.nn.log_sigmoid, True),
    "exact gelu": (functools.partial(jax.nn.gelu, approximate=False), True),
    "relu6": (jax.nn.relu6, False), "leaky": (jax.nn.leaky_relu, False), "hard": (jax.nn.hard_tanh, False),
    "abs": (jnp.abs, False), "clip": (lambda x: jnp.clip(x, -1, 1), False), "sorted": (jnp.sort, False),
    "in a loop": (lambda x: jax.lax.scan(lambda a, _: (jax.nn.relu(a), None), x, None, 2)[0], False),
    "remat": (jax.checkpoint(jax.nn.relu), False), "smooth remat": (jax.checkpoint(jnp.tanh), True),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_which_activations_are_smooth(name):
    activation, expected = ACTIVATIONS[name]
    loss = lambda p, x, y: jnp.square(activation(x.ravel() @ p)).sum()
    assert smooth(of(loss, jnp.zeros((192, 3)))) == expected


def test_a_kink_in_the_loss_itself_counts():
    assert not smooth(of(lambda p, x, y: jnp.abs(jnp.tanh(x.ravel() @ p)).sum(), jnp.zeros((192, 3))))
    assert not smooth(of(lambda p, x, y: jnp.abs(jnp.tanh(x.ravel() @ p)), jnp.zeros(192)))


def test_a_kink_that_the_image_does_not_reach_does_not_count():
    loss = lambda p, x, y: jnp.square(jnp.tanh(x.ravel() @ jnp.maximum(p, 0.0))).sum()
    assert smooth(of(loss, jnp.zeros((192, 3))))
