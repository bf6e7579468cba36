"""What is solved is not searched for, and what is searched for is kept only where it is closer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objectives import float32, random_weights

import gdiff_jax as gd
from gdiff_jax import expected_masks
from gdiff_jax.analytic_mean import AnalyticMean
from gdiff_jax.auto import Auto
from gdiff_jax.methods import DSG, MeanOfChains
from gdiff_jax.problem import Outcome, Problem
from gdiff_jax.pytrees import pytree
from gdiff_jax.refinement import AFAR, AGAIN, SLOWLY, Refinement, refined, refinement_of
from gdiff_jax.schedule import make_betas
from gdiff_jax.victims import cnn, lenet, mlp, resnet
from gdiff_jax.weighing import DOUBT, preferred, tells_little, weighed

SHAPE, CLASSES = (8, 8, 3), 4
IMAGE = float32(np.random.default_rng(0).uniform(-1, 1, SHAPE))
AUTO = Auto(DSG())
SMOOTH = lenet(SHAPE, CLASSES, activation=jax.nn.sigmoid)


def key():
    return jax.random.key(3)


@pytree
class Found:
    """Searches that end in one image; as many of them as are needed change it by as much."""

    image: jax.Array
    chains: int = 2

    def __call__(self, key, problem, needed=0):
        return self.image + needed, None


# Compiled whole: operation by operation each is a program of its own.
distance = jax.jit(lambda match, image: match(image))
search = jax.jit(lambda key, problem: DSG()(key, problem))
estimate = jax.jit(lambda problem: AnalyticMean()(jax.random.key(4), problem))
release = jax.jit(lambda mechanism, key, leak: mechanism(key, leak))


@pytree
class Plain:
    """Half of everything is noise."""

    share: float = 0.5

    def __call__(self, x_t, t):
        return self.share * x_t, None


def problem_of(victim, mechanism=None, **options):
    params, label = random_weights(victim), jnp.asarray(2)
    leak = jax.jit(jax.grad(victim.loss))(params, IMAGE, label)
    match = gd.GradientMatching(params, label, leak, victim.loss, mechanism=mechanism)
    schedule = gd.Schedule.create(make_betas(), 4)
    return Problem(Plain(), schedule, match, jnp.zeros(SHAPE), **{"shape": SHAPE, "truth": IMAGE, **options})


def test_what_is_solved_is_the_result():
    image, info = AUTO(key(), problem_of(mlp(SHAPE, CLASSES, widths=(16,))))
    assert np.abs(image - IMAGE).max() < 1e-6
    assert Outcome(int(info.outcome)) is Outcome.FINISHED
    assert np.isnan(info.trace.distance[:-1]).all()  # nothing was searched for
    assert info.trace.x0_error[-1] < 1e-12


def test_a_batch_behind_a_first_dense_layer_is_solved_in_the_order_of_its_labels():
    victim, labels = mlp(SHAPE, CLASSES, widths=(64, 32)), jnp.array([3, 0, 2])
    params = random_weights(victim)
    images = float32(np.random.default_rng(1).uniform(-1, 1, (3, *SHAPE)))
    leak = jax.jit(jax.grad(victim.loss))(params, images, labels)
    match = gd.GradientMatching(params, labels, leak, victim.loss)
    problem = Problem(
        gd.samplers.batched(Plain()), gd.Schedule.create(make_betas(), 4), match, jnp.zeros(SHAPE), shape=images.shape,
        first_dense=victim.first_dense,
    )  # fmt: skip
    image, info = AUTO(key(), problem)
    assert np.abs(image - images).max() < 1e-5
    assert Outcome(int(info.outcome)) is Outcome.FINISHED
    assert info.trace.distance[-1] < 1e-4 * distance(match, np.zeros_like(images))


def test_what_cannot_be_solved_is_searched_for():
    problem = problem_of(resnet(SHAPE, CLASSES, channels=(8,)))
    image, info = AUTO(key(), problem)
    searched, expected = search(key(), problem)
    np.testing.assert_allclose(image, searched, atol=1e-5)
    np.testing.assert_allclose(info.trace.distance, expected.trace.distance, rtol=1e-3)
    assert AUTO.candidate(key(), problem).words.startswith("only searched for: ")


def test_the_closer_of_two_is_kept():
    problem, candidate = problem_of(mlp(SHAPE, CLASSES, widths=(16,))), jnp.full(SHAPE, 0.3)
    searched, _ = search(key(), problem)
    closer = distance(problem.match, candidate) < distance(problem.match, searched)
    kept, _ = AUTO.after(key(), problem, candidate, jnp.asarray(False))
    np.testing.assert_allclose(kept, candidate if closer else searched, atol=1e-5)
    np.testing.assert_array_equal(AUTO.after(key(), problem, candidate, jnp.asarray(True))[0], candidate)
    np.testing.assert_allclose(AUTO.after(key(), problem, jnp.full(SHAPE, jnp.nan), jnp.asarray(False))[0], searched, atol=1e-5)


def test_the_prior_fills_what_is_open():
    """And leaves the rest: the image explains the gradient as well as its inequalities let it."""
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(3, 12)))
    candidate = AUTO.candidate(key(), problem)
    assert "directions filled by the prior" in candidate.words
    assert distance(problem.match, float32(candidate.image)) < 0.1 * distance(problem.match, np.zeros(SHAPE, np.float32))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(mechanism=gd.mechanisms.TopK(0.1)), "changes more of the gradient than its length"),
        (dict(mechanism=gd.GaussianNoise(jnp.float32(0.1)), sigma=0.1), "refined by expectation over the masks"),
        (dict(sigma=0.1), "under noise nothing"),  # to who does not know the mechanism
        (dict(shape=(2, *SHAPE)), "several images"),
    ],
)
def test_what_the_algebra_does_not_speak_of_is_said(changes, words):
    candidate = AUTO.candidate(key(), problem_of(cnn(SHAPE, CLASSES, channels=(12, 24)), **changes))
    assert words in candidate.words
    assert np.isnan(candidate.image).all()


def test_it_is_not_traced():
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(lambda key, problem: AUTO(key, problem)[0])(key(), problem_of(mlp(SHAPE, CLASSES, widths=(16,))))


def test_more_than_noise_decides():
    """The squared distance of two images differs by more, or less, than as many pixels as there are fit of the noise."""
    victim = mlp(SHAPE, CLASSES, widths=(16,))
    other = jnp.clip(IMAGE + 0.3, -1, 1)
    plain = problem_of(victim)
    gain = float(distance(plain.match, other)) ** 2 - float(distance(plain.match, IMAGE)) ** 2
    edge = (gain / IMAGE.size) ** 0.5
    for sigma, kept in [(0.0, IMAGE), (0.9 * edge, IMAGE), (1.1 * edge, other)]:
        problem = problem_of(victim, mechanism=gd.GaussianNoise(jnp.float32(sigma)), sigma=jnp.float32(sigma))
        np.testing.assert_array_equal(preferred(problem, other, IMAGE), kept)
        np.testing.assert_array_equal(preferred(problem, IMAGE, other), IMAGE)
    half = problem_of(victim, mechanism=gd.GaussianNoise(jnp.float32(edge)), sigma=jnp.float32(edge))
    np.testing.assert_array_equal(preferred(half, other, IMAGE, 1.1 * IMAGE.size), other)
    np.testing.assert_array_equal(preferred(half, other, IMAGE, 0.9 * IMAGE.size), IMAGE)
    np.testing.assert_array_equal(preferred(plain, jnp.full(SHAPE, jnp.nan), other), other)
    np.testing.assert_array_equal(preferred(plain, other, jnp.full(SHAPE, jnp.nan)), other)


def test_two_images_are_weighed_by_what_they_explain():
    """As two Gaussians of that noise would be, tempered; what is not finite has no weight."""
    plain = problem_of(mlp(SHAPE, CLASSES, widths=(16,)))
    other = jnp.clip(IMAGE + 0.3, -1, 1)
    gain = float(distance(plain.match, other)) ** 2 - float(distance(plain.match, IMAGE)) ** 2
    for log_odds in (1.0, 3.0, 60.0):
        sigma = jnp.float32((gain / (2 * DOUBT * log_odds)) ** 0.5)
        problem = problem_of(mlp(SHAPE, CLASSES, widths=(16,)), mechanism=gd.GaussianNoise(sigma), sigma=sigma)
        share = 1 / (1 + np.exp(-log_odds))
        np.testing.assert_allclose(weighed(problem, IMAGE, other), share * IMAGE + (1 - share) * other, atol=1e-5)
        np.testing.assert_allclose(weighed(problem, other, IMAGE), share * IMAGE + (1 - share) * other, atol=1e-5)
        np.testing.assert_allclose(
            weighed(problem, other, IMAGE, freedom=gain / sigma**2), (IMAGE + other) / 2, atol=1e-3 * log_odds
        )
    np.testing.assert_array_equal(weighed(plain, jnp.full(SHAPE, jnp.nan), other), other)
    np.testing.assert_array_equal(weighed(plain, other, jnp.full(SHAPE, jnp.nan)), other)


def fitted(victim, image, label, other):
    """Weights by which the image has its label, and the mean of images another."""
    both = lambda p: victim.loss(p, image, label) + victim.loss(p, jnp.zeros(SHAPE), other)
    step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.05 * g, p, jax.grad(both)(p)))
    params = random_weights(victim)
    for _ in range(200):
        params = step(params)
    return params


@pytest.mark.long
def test_a_network_that_fits_its_image_is_refined_from_the_mean_of_images():
    """The deltas of an estimate far off lead elsewhere, those that leaked to the image; what a search found does not count."""
    victim, label, sigma = cnn(SHAPE, CLASSES, channels=(12, 24)), jnp.asarray(2), jnp.float32(1e-5)
    params, mechanism = fitted(victim, IMAGE, label, jnp.asarray(3)), gd.GaussianNoise(sigma)
    leak = release(mechanism, jax.random.key(9), jax.jit(jax.grad(victim.loss))(params, IMAGE, label))
    match = gd.GradientMatching(params, label, leak, victim.loss, mechanism=mechanism)
    problem = dataclasses.replace(problem_of(victim, sigma=sigma), match=match)
    refine = jax.jit(expected_masks.refine, static_argnames="first")
    error = lambda image: float(jnp.square(image - IMAGE).mean())
    assert error(refine(problem, jnp.zeros(SHAPE), first=AFAR)) < 1e-3
    lost = jnp.full(SHAPE, jnp.nan)
    assert not np.isfinite(refine(problem, lost)).any()
    both = jax.jit(lambda problem, lost: refined(problem, refinement_of(problem), lost))
    assert error(both(problem, lost)) < 1e-3


@pytest.mark.long
def test_a_clipped_gradient_is_one_with_more_noise():
    """How much was clipped is found: the image is about as good as of the gradient whole with noise as much larger."""
    victim, sigma = mlp(SHAPE, CLASSES, widths=(128, 64)), 0.03
    problem = problem_of(victim, first_dense=victim.first_dense)
    size = optax.tree.norm(problem.match.leak)

    def error(mechanism, sigma, key):
        leak = release(mechanism, key, problem.match.leak)
        match = dataclasses.replace(problem.match, leak=leak, mechanism=mechanism)
        image, _ = estimate(dataclasses.replace(problem, match=match, sigma=sigma))
        return float(jnp.square(image - IMAGE).mean())

    share, plain = jnp.float32(0.05), gd.GaussianNoise(jnp.float32(sigma))
    clip = gd.mechanisms.Chain((gd.mechanisms.Clip(share * size), gd.GaussianNoise(share * sigma)))
    keys = jax.random.split(key(), 6)
    clipped, whole = (
        max(error(*released, k) for k in keys) for released in ((clip, share * sigma), (plain, jnp.float32(sigma)))
    )
    assert clipped < 2 * whole


def test_it_is_said_that_what_could_not_be_solved_isrefined():
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(12, 24), pooling="mean"), mechanism=gd.GaussianNoise(jnp.float32(0.0)))
    words = AUTO.candidate(key(), problem).words
    assert words.startswith("searched for, then refined by expectation over the masks of its ReLUs: ")


@pytest.mark.parametrize("nearer", [False, True])
def test_of_a_smooth_network_what_was_searched_for_counts_as_far_as_it_explains_the_leak(monkeypatch, nearer):
    """Its steps may end farther from the leak than they began."""
    victim, sigma = mlp(SHAPE, CLASSES, widths=(16,), activation=jax.nn.tanh), jnp.float32(1e-4)
    problem = problem_of(victim, mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    ended, found = (-IMAGE, IMAGE) if nearer else (IMAGE, -IMAGE)
    monkeypatch.setattr("gdiff_jax.refinement.gauss_newton.refine", lambda problem, image: ended)
    np.testing.assert_allclose(refined(problem, refinement_of(problem), found), IMAGE, atol=1e-5)


@pytest.mark.parametrize(
    ("victim", "by"),
    [
        pytest.param(cnn(SHAPE, CLASSES, channels=(4, 4)), "start", id="relu"),
        pytest.param(SMOOTH, "smooth", id="smooth"),
        pytest.param(resnet(SHAPE, CLASSES, channels=(8,)), "search", id="not refined"),
    ],
)
def test_what_is_refined_is_found_by_a_method_of_its_own(victim, by):
    sigma = jnp.float32(1e-2)
    problem = problem_of(victim, mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    nothing = jnp.full(SHAPE, jnp.nan)
    distances = jax.jit(lambda auto: auto.after(key(), problem, nothing, jnp.asarray(False))[1].trace.distance)
    methods = {k: MeanOfChains(DSG(guidance_rate=rate), 2) for k, rate in [("search", 0.1), ("start", 0.9), ("smooth", 0.5)]}
    found = distances(Auto(**methods))
    for name, method in methods.items():
        assert np.allclose(found, distances(Auto(method)), rtol=1e-5) == (name == by)


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param(mlp(SHAPE, CLASSES, widths=(16,)), id="mlp"),
        pytest.param(cnn(SHAPE, CLASSES, channels=(12, 24)), id="cnn", marks=pytest.mark.long),
    ],
)
def test_under_noise_structure_finds_more_than_a_search(victim):
    """Of an image that the prior knows nothing of."""
    sigma = jnp.float32(1e-4)
    problem = problem_of(victim, mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    noisy = release(gd.GaussianNoise(sigma), jax.random.key(9), problem.match.leak)
    problem = dataclasses.replace(problem, match=dataclasses.replace(problem.match, leak=noisy))
    image, _ = AUTO(key(), problem)
    searched, _ = search(key(), problem)
    assert jnp.square(image - IMAGE).mean() < 0.2 * jnp.square(searched - IMAGE).mean()


def test_a_search_takes_the_place_of_an_estimate_that_fails():
    """Of a network that makes another delta of the mean image than of its own; nothing is told of how a search errs then."""
    victim, label, sigma = mlp(SHAPE, CLASSES, widths=(16,)), jnp.asarray(2), jnp.float32(1e-2)
    result = jax.jit(lambda problem, image: Auto(Found(image))._of_first_dense(key(), problem))
    lost = jnp.full(SHAPE, jnp.nan)
    for params, kept in [(fitted(victim, IMAGE, label, jnp.asarray(3)), True), (random_weights(victim), False)]:
        leak = release(gd.GaussianNoise(sigma), key(), jax.jit(jax.grad(victim.loss))(params, IMAGE, label))
        match = gd.GradientMatching(params, label, leak, victim.loss, mechanism=gd.GaussianNoise(sigma))
        problem = dataclasses.replace(problem_of(victim, sigma=sigma, first_dense=victim.first_dense), match=match)
        image, deviation = result(problem, IMAGE)
        assert (np.asarray(image) == IMAGE).all() == kept
        assert np.isnan(deviation).all() == kept
        estimate, _ = result(problem, lost)
        assert np.isfinite(estimate).all()
    worse, _ = result(problem, -IMAGE)
    np.testing.assert_array_equal(worse, image)


@pytest.mark.parametrize(("sigma", "needed"), [(1e-6, 0), (1e3, 2)])
def test_an_estimate_that_errs_little_is_searched_for_no_more(sigma, needed):
    victim, seen = mlp(SHAPE, CLASSES, widths=(16,)), []

    @pytree
    class Counted(Found):
        def __call__(self, key, problem, needed=0):
            jax.debug.callback(lambda needed: seen.append(int(needed)), needed)
            return self.image, None

    problem = problem_of(victim, mechanism=gd.GaussianNoise(sigma), sigma=jnp.float32(sigma), first_dense=victim.first_dense)
    jax.block_until_ready(jax.jit(Auto(DSG(), Counted(IMAGE))._of_first_dense)(key(), problem))
    assert seen == [needed]


@pytest.mark.parametrize(("noise_of_gradient", "needed"), [(0.01, 1), (3.0, 2)])
def test_one_search_is_refined_unless_the_leak_tells_little(noise_of_gradient, needed):
    """Less of the gradient than noise of one coordinate for each pixel."""
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(2, 3)))
    square = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(problem.match.leak))
    sigma = jnp.float32(noise_of_gradient * np.sqrt(square / IMAGE.size))
    noisy = release(gd.GaussianNoise(sigma), jax.random.key(9), problem.match.leak)
    match = dataclasses.replace(problem.match, leak=noisy, mechanism=gd.GaussianNoise(sigma))
    problem = dataclasses.replace(problem, match=match, sigma=sigma)
    assert bool(tells_little(problem)) == (needed == 2)
    image, _ = Auto(DSG(), Found(IMAGE))._searched(key(), problem, refinement_of(problem))
    np.testing.assert_allclose(image, IMAGE + needed, rtol=1e-6)


def test_what_pooling_hides_is_found_without_noise_from_a_first_estimate():
    """A mean over windows does not say which units were active; the masks settle as the level falls."""
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(12, 24), pooling="mean"))
    start = IMAGE + 0.1 * jax.random.normal(key(), SHAPE)
    image = jax.jit(expected_masks.refine)(problem, start)
    assert jnp.abs(image - IMAGE).max() < 1e-4


@pytest.mark.long
def test_what_is_expected_is_of_what_was_kept():
    """Of a candidate that takes the place of the estimate no deviation is told."""
    victim = mlp(SHAPE, CLASSES, widths=(16,))
    problem = problem_of(victim, gd.GaussianNoise(0.01), sigma=0.01, first_dense=victim.first_dense)
    leak = release(gd.GaussianNoise(0.01), key(), problem.match.leak)
    problem = dataclasses.replace(problem, match=dataclasses.replace(problem.match, leak=leak))
    after = jax.jit(lambda image, exact: AUTO.after(key(), problem, image, exact))
    estimate, info = after(jnp.full(SHAPE, jnp.nan), jnp.asarray(False))
    assert np.isfinite(info.deviation).all()
    kept, info = after(estimate + 1, jnp.asarray(True))
    np.testing.assert_array_equal(kept, estimate + 1)
    assert np.isnan(info.deviation).all()


def test_of_a_relu_network_the_mean_of_images_is_a_start_too(monkeypatch):
    """From afar, and with slower steps; of the two ends the one that makes the leak is kept."""
    begun, right = [], []

    def refine(problem, image, *levels):
        jax.debug.callback(lambda *start: begun.append(tuple(map(float, start))), image[0, 0, 0], *levels)
        first, *_ = levels
        return jnp.where(first == 0, image, jnp.where(first == right[-1], IMAGE, -IMAGE))

    monkeypatch.setattr("gdiff_jax.refinement.expected_masks.refine", refine)
    sigma = jnp.float32(1e-4)
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(4, 4)), mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    problem = dataclasses.replace(problem, expected_image=jnp.full(SHAPE, 0.25))
    for first in (expected_masks.FIRST, AFAR):
        right.append(first)
        begun.clear()
        image = refined(problem, refinement_of(problem), jnp.full(SHAPE, 0.75))
        jax.effects_barrier()
        starts = [(0.25, AFAR, SLOWLY), (0.75, expected_masks.FIRST, expected_masks.RATIO)]
        np.testing.assert_allclose(sorted(start for start in begun if start[1] > 0), starts, rtol=1e-6)
        np.testing.assert_allclose(image, IMAGE, atol=1e-5)


@pytest.mark.parametrize("apart", [0.1, 1.0])
def test_what_does_not_explain_the_leak_is_refined_again_from_where_its_two_ends_differ(monkeypatch, apart):
    """And from there again; the last is the answer, whatever it explains."""
    begun, found = [], 0.75

    def refine(problem, image, *levels):
        start = image[0, 0, 0]
        jax.debug.callback(lambda *start: begun.append(tuple(map(float, start))), start, *levels)
        end = jnp.where(levels[1] == SLOWLY, 0.5, jnp.where(start == found, 0.5 + apart, start + 0.125))
        return jnp.full_like(image, end)

    monkeypatch.setattr("gdiff_jax.refinement.expected_masks.refine", refine)
    monkeypatch.setattr("gdiff_jax.refinement.weighed", lambda problem, x, *other: x)
    sigma = jnp.float32(1e-4)
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(4, 4)), mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    image = refined(problem, refinement_of(problem), jnp.full(SHAPE, found))
    jax.effects_barrier()
    level = min(apart, expected_masks.FIRST)
    again = [(0.5 + apart + 0.125 * k, level, expected_masks.RATIO) for k in range(AGAIN)]
    np.testing.assert_allclose(begun[2:], again, rtol=1e-4)
    np.testing.assert_allclose(image, 0.5 + apart + 0.125 * AGAIN, rtol=1e-5)


@pytest.mark.parametrize(
    ("found", "end", "kept"), [(0.1, 0.4, "found"), (0.2, 0.4, "end"), (-0.01, 0.01, "found"), (0.2, np.nan, "found")]
)
def test_a_search_that_explains_little_is_no_reason_to_doubt_what_was_refined(monkeypatch, found, end, kept):
    """It is nearer to the leak each time."""
    monkeypatch.setattr("gdiff_jax.auto.refined", lambda problem, refinement, x: jnp.full_like(x, end))
    monkeypatch.setattr("gdiff_jax.auto.preferred", lambda problem, x, other: jnp.where(jnp.isfinite(other), other, x))
    of_end = lambda pixel: (pixel == jnp.float32(end)) | jnp.isnan(pixel)
    told = lambda problem, image: jnp.where(of_end(image[0, 0, 0]), jnp.float32(end), jnp.float32(found))
    monkeypatch.setattr("gdiff_jax.auto.unexplained", told)
    sigma = jnp.float32(1e-2)
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(4, 4)), mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    image, _ = AUTO.after(key(), problem, jnp.full(SHAPE, jnp.nan), jnp.asarray(False))
    assert bool((image == jnp.float32(end)).all()) == (kept == "end")
    assert jnp.isfinite(image).all()


def test_a_smooth_networks_refinement_begins_with_what_was_solved_of_it(monkeypatch):
    """However far that is from the leak; with what a search found where nothing was."""
    begun = []

    def refine(problem, image):
        jax.debug.callback(lambda pixel: begun.append(float(pixel)), image[0, 0, 0])
        return image

    monkeypatch.setattr("gdiff_jax.refinement.gauss_newton.refine", refine)
    sigma = jnp.float32(1e-2)
    problem = problem_of(SMOOTH, mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    for solved in (7.0, jnp.nan):
        AUTO.after(key(), problem, jnp.full(SHAPE, solved), jnp.asarray(False))[0].block_until_ready()
    jax.effects_barrier()
    assert begun[0] == 7.0
    assert abs(begun[1]) < 7.0


def test_where_noise_is_nearly_all_a_refined_image_is_little_more_than_the_mean_of_images():
    """It fits some noise, which the mean does not; where it explains the leak, nothing of the mean is left."""
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(2, 3)), mechanism=gd.GaussianNoise(1.0), sigma=jnp.float32(1.0))
    refine = jax.jit(lambda problem: refined(problem, Refinement("", smooth=True), IMAGE))
    for sigma, share in [(1e3, 0.5), (1e-3, 1.0)]:  # of two that lie equally far the other has fitted REFINED more
        mechanism = gd.GaussianNoise(sigma)
        leak = release(mechanism, jax.random.key(9), problem.match.leak)
        match = dataclasses.replace(problem.match, leak=leak, mechanism=mechanism)
        image = refine(dataclasses.replace(problem, match=match, sigma=jnp.float32(sigma)))
        away = jnp.vdot(image - problem.expected_image, IMAGE - problem.expected_image)
        kept = float(away / jnp.square(IMAGE - problem.expected_image).sum())
        assert kept == pytest.approx(share, abs=0.01) if share == 1 else 0 <= kept < share


def test_distances_say_less_where_neither_image_explains_the_leak():
    """Of two that explain it the nearer is taken; of two that do not, a mean, though they lie as far from each other."""
    sigma = jnp.float32(1e-3)
    problem = problem_of(cnn(SHAPE, CLASSES, channels=(2, 3)), mechanism=gd.GaussianNoise(sigma), sigma=sigma)
    gradient = jax.jit(lambda problem, x: gd.victim_gradient(problem.match.loss, problem.match.params, x, problem.match.label))
    noise = jax.tree.map(lambda g: sigma * jax.random.normal(jax.random.key(g.size), g.shape), problem.match.leak)
    for left, share in [(0.0, 1.0), (40.0, 0.5)]:
        other = IMAGE + 0.02 * jax.random.normal(jax.random.key(3), SHAPE)

        rest = [left * n for n in jax.tree.leaves(noise)]
        own = gradient(problem, IMAGE)
        leak = jax.tree.unflatten(jax.tree.structure(own), [g + r for g, r in zip(jax.tree.leaves(own), rest, strict=True)])
        at = dataclasses.replace(problem, match=dataclasses.replace(problem.match, leak=leak))
        image = jax.jit(weighed)(at, IMAGE, other)
        kept = float(jnp.vdot(image - other, IMAGE - other) / jnp.square(IMAGE - other).sum())
        assert kept == pytest.approx(share, abs=0.05 if share == 1 else 0.45)
        assert (kept > 0.98) == (share == 1)
