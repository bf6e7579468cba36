"""Attacks as objects: one call, options bound once, and why it ended."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdiff_jax as gd
from gdiff_jax.methods import DLG, DPS, DSG, METHODS, Analytic, CalibratedDSG, InvertingGradients, MeanOfChains
from gdiff_jax.problem import Info, Outcome, Problem
from gdiff_jax.samplers import SignalInfo
from gdiff_jax.schedule import make_betas
from gdiff_jax.trace import StepInfo
from gdiff_jax.victims import mlp

SHAPE, CLASSES = (2, 3, 1), 3
VICTIM = mlp(SHAPE, CLASSES, widths=(16,))
SCHEDULE = gd.Schedule.create(make_betas(), 4)
STEPS = {"dlg": 3, "inverting": 3, "analytic": 1}  # where they are not those of the schedule


@pytest.fixture(scope="module")
def problem(gaussian):
    """A clean leak of an image of the prior's own kind."""
    x = jnp.clip(0.5 * jax.random.normal(jax.random.key(3), SHAPE), -1, 1)
    params, y = VICTIM.init(jax.random.key(0)), jnp.asarray(1)
    noise = gd.GaussianNoise(jnp.float32(0.01))
    leak = jax.jit(lambda: noise(jax.random.key(5), gd.victim_gradient(VICTIM.loss, params, x, y)))()
    match = gd.GradientMatching(params, y, leak, VICTIM.loss, mechanism=noise)
    return Problem(
        gaussian, SCHEDULE, match, jnp.zeros(SHAPE), jnp.float32(0.01),
        shape=SHAPE, first_dense=VICTIM.first_dense, num_classes=CLASSES, truth=x,
    )  # fmt: skip


@jax.jit
def attack(key, problem, method):
    return method(key, problem)


def short(method):
    """With few steps, and three chains."""
    changes = {DLG: dict(steps=3), InvertingGradients: dict(steps=3), MeanOfChains: dict(chains=3)}
    return dataclasses.replace(method, **changes.get(type(method), {}))


def test_methods_are_listed_by_their_names():
    assert list(METHODS) == [
        *("dsg", "calibrated-dsg", "dsg-mean", "calibrated-mean", "dps"),
        *("red-diff", "dlg", "inverting", "analytic", "analytic-dsg", "analytic-mean", "auto"),
    ]
    assert all(method.name == name for name, method in METHODS.items())
    which = lambda what: {name for name, method in METHODS.items() if getattr(method, what)}
    assert which("needs_first_dense") == {"analytic", "analytic-dsg", "analytic-mean"}
    assert which("needs_noise") == {"calibrated-dsg", "calibrated-mean", "analytic-dsg", "analytic-mean"}
    assert which("calibrated") == {"calibrated-dsg", "calibrated-mean"}


TRACED = [name for name in METHODS if name != "auto"]  # which solves on the host, see tests/test_auto.py


@pytest.mark.parametrize("name", TRACED)
def test_every_method_is_one_call(problem, name):
    """What it reports is told by its own type: only who measured the signal has something to say of it."""
    image, info = attack(jax.random.key(1), problem, short(METHODS[name]))
    assert image.shape == SHAPE
    assert np.isfinite(image).all()
    assert Outcome(int(info.outcome)) is Outcome.FINISHED
    assert type(info.trace) is (SignalInfo if METHODS[name].calibrated else StepInfo)
    assert {leaf.shape for leaf in info.trace} == {(STEPS.get(name, 4),)}
    assert np.isfinite(info.trace.x0_error[-1])  # a start from an estimate skips the steps before it
    assert info.label_logits is None


def test_an_object_does_what_its_function_does(problem):
    key = lambda: jax.random.key(2)
    image, info = attack(key(), problem, DSG(0.3))
    expected = gd.dsg_sample(
        key(), problem.denoise, problem.match, SCHEDULE, SHAPE, guidance_rate=jnp.float32(0.3), truth=problem.truth
    )
    np.testing.assert_allclose(image, expected[0], atol=1e-5)
    np.testing.assert_allclose(info.trace.distance, expected[1].distance, rtol=1e-4)


def test_a_grid_of_options_is_compiled_once(problem):
    """Numbers are leaves of the object, what decides shapes is not."""
    traced = []

    @jax.jit
    def run(key, method):
        traced.append(1)
        return method(key, problem)[0]

    images = [run(jax.random.key(2), DPS(jnp.float32(zeta))) for zeta in (0.0, 1.0, 2.0)]
    assert len(traced) == 1
    assert np.abs(images[1] - images[0]).max() > 1e-4 < np.abs(images[2] - images[1]).max()
    assert jax.tree.leaves(DLG(steps=5, restarts=2, joint_labels=True)) == []


def test_the_first_dense_layer_gives_the_image_away(problem):
    clean = dataclasses.replace(problem.match, leak=gd.victim_gradient(VICTIM.loss, problem.match.params, problem.truth, 1))
    image, info = attack(jax.random.key(0), dataclasses.replace(problem, match=clean), Analytic())
    np.testing.assert_allclose(image, problem.truth, atol=1e-4)
    assert info.trace.distance < 1e-4
    assert info.trace.x0_error < 1e-8


def test_why_it_ended_is_told(problem):
    with_leak = lambda change: dataclasses.replace(
        problem, match=dataclasses.replace(problem.match, leak=jax.tree.map(change, problem.match.leak))
    )
    outcome = lambda problem: Outcome(int(attack(jax.random.key(0), problem, Analytic())[1].outcome))
    assert outcome(problem) is Outcome.FINISHED
    assert outcome(with_leak(jnp.zeros_like)) is Outcome.DEAD_LAYER
    assert outcome(with_leak(lambda g: g * jnp.inf)) is Outcome.LEAK_NOT_FINITE
    assert problem.outcome(jnp.full(SHAPE, jnp.nan)) == Outcome.NOT_FINITE
    assert problem.outcome(jnp.zeros(SHAPE)) == Outcome.FINISHED


def test_who_looks_for_labels_says_which(problem):
    _, info = jax.eval_shape(DLG(steps=3, joint_labels=True), jax.random.key(0), problem)
    assert info.label_logits.shape == (CLASSES,)


def test_a_mean_of_chains_leans_on_the_expected_image(problem):
    """Of chains that do not agree at all nothing is left but what is expected of any image."""

    class Wild(DSG):
        def __call__(self, key, problem):
            trace = jax.tree.map(lambda a: jnp.full(2, a, jnp.float32), StepInfo(0.1, 0.1, 0.1))
            return jnp.where(jax.random.bernoulli(key), 0.9, -0.9) * jnp.ones(SHAPE), Info(trace, jnp.asarray(0))

    up = lambda seed: {bool(jax.random.bernoulli(key)) for key in jax.random.split(jax.random.key(seed), 2)}
    seed = next(seed for seed in range(20) if len(up(seed)) == 2)
    grey = dataclasses.replace(problem, expected_image=jnp.full(SHAPE, 0.2))
    image, info = MeanOfChains(Wild(), chains=2)(jax.random.key(seed), grey)
    np.testing.assert_allclose(image, 0.2, atol=1e-6)
    assert info.outcome == Outcome.FINISHED


@pytest.mark.parametrize("name", ["analytic", "analytic-dsg", "analytic-mean"])
def test_a_problem_without_a_first_dense_layer_is_refused(problem, name):
    method = METHODS[name]
    assert method.fits(VICTIM.first_dense, 1)
    assert not method.fits(VICTIM.first_dense, 2)
    assert not method.fits(None, 1)
    assert DSG().fits(None, 2)
    with pytest.raises(ValueError, match="no first dense layer that sees the whole image; take another method"):
        method(jax.random.key(0), dataclasses.replace(problem, first_dense=None))


def test_a_method_describes_itself_with_its_options():
    words = [
        (DSG(0.15), "DSG guidance rate 0.15"),
        (CalibratedDSG(0.35), "calibrated DSG guidance rate 0.35 at most"),
        (MeanOfChains(DSG(0.15), 3), "the mean of 3 chains of DSG guidance rate 0.15"),
        (DPS(2.0), "DPS zeta 2"),
        (DLG(10, restarts=2), "DLG 10 L-BFGS steps, 2 restarts"),
        (InvertingGradients(0.1, 20), "inverting gradients 20 steps, TV 0.1"),
    ]
    for method, said in words:
        assert method.describe() == said
    assert all(method.describe() for method in METHODS.values())
