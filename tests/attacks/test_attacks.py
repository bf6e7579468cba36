"""Direct inversion and the analytic attack, against closed forms; RED-diff, against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import QUICK_COMPILE, QUICK_RUN
from objectives import SHAPE, Flat, Residual, float32, normal

from gdiff_jax import GradientMatching, Schedule, cosine, dsg_sample, squared_l2, victim_gradient
from gdiff_jax.attacks import JointLabels, base, dense_layer_input, dlg, invert_gradients, read_first_dense, total_variation
from gdiff_jax.pytrees import pytree
from gdiff_jax.samplers import Start, StepInfo, red_diff_sample
from gdiff_jax.samplers.base import batched, reverse, start_from
from gdiff_jax.schedule import make_betas
from gdiff_jax.victims import FirstDense, mlp

STEPS = 12


@pytree
class LeastSquares(Residual):
    """|| A x - b ||^2."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.square(super().__call__(x))


@pytest.fixture
def least_squares() -> LeastSquares:
    rng = np.random.default_rng(2)
    return LeastSquares(*(float32(rng.normal(size=s)) for s in ((9, 6), (9,))))


def test_dlg_finds_the_solution_of_least_squares(least_squares) -> None:
    image, trace = jax.jit(lambda k, o: dlg(k, o, SHAPE, steps=30))(jax.random.key(0), least_squares)
    expected = np.linalg.lstsq(np.asarray(least_squares.a), np.asarray(least_squares.b), rcond=None)[0]
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(np.ravel(image), expected, atol=1e-4)
    assert [leaf.shape for leaf in trace] == [(30,)] * len(StepInfo._fields)
    np.testing.assert_allclose(trace.distance[0], least_squares(jax.random.normal(jax.random.key(0), SHAPE)), rtol=1e-5)
    assert np.all(np.isnan(trace.x0_error))


def test_inverting_finds_the_solution_of_least_squares_in_the_box(least_squares) -> None:
    """The best of the box, not the best clipped: by projected descent in float64."""
    a, b = (np.asarray(m, np.float64) for m in (least_squares.a, 3 * least_squares.b))
    x = np.zeros(6)
    for _ in range(5000):
        x = np.clip(x - 0.02 * a.T @ (a @ x - b), -1, 1)
    assert 0 < np.sum(np.abs(x) == 1) < 6
    objective = dataclasses.replace(least_squares, b=3 * least_squares.b)
    run = jax.jit(lambda k, o: invert_gradients(k, o, SHAPE, steps=2000, learning_rate=0.02, tv=0.0))
    np.testing.assert_allclose(np.ravel(run(jax.random.key(0), objective)[0]), x, atol=3e-3)


def test_total_variation_by_hand() -> None:
    x = jnp.array([[0.0, 1.0, 3.0], [0.0, -1.0, 3.0]])[..., None]
    assert total_variation(x) == pytest.approx((0 + 2 + 0) / 3 + (1 + 2 + 1 + 4) / 4)
    assert total_variation(jnp.stack([x, 3 * x])) == pytest.approx(2 * float(total_variation(x)))


def test_total_variation_flattens(least_squares) -> None:
    """The weighted sum is what is minimised, and the trace has the objective without it."""
    run = jax.jit(lambda tv: invert_gradients(jax.random.key(0), least_squares, SHAPE, steps=500, tv=tv))
    (rough, _), (flat, trace) = run(0.0), run(3.0)
    both = lambda x: float(least_squares(x) + 3.0 * total_variation(x))
    assert both(flat) < both(rough) - 0.1
    assert total_variation(flat) < total_variation(rough)
    np.testing.assert_allclose(trace.distance[-1], least_squares(flat), rtol=0.05)


@pytest.mark.parametrize(("steps", "length"), [(1, 1), (7, 7), (100, 100), (101, 50), (230, 76), (1000, 100)])
def test_all_steps_are_made_and_the_trace_samples_them(steps: int, length: int) -> None:
    """Gradient descent of rate 1 on a slope: after k steps the image is -k, and the trace says so."""
    slope = lambda x: x.sum()
    found = base.descend(jnp.zeros((1, 1, 1)), slope, None, optax.sgd(1.0), lambda x: x, steps, None)
    assert found.candidate == -steps
    assert found.value == -steps
    assert found.trace.distance.shape == (length,)
    np.testing.assert_array_equal(found.trace.distance, -np.arange(length) * -(-steps // 100))


def test_the_error_of_the_trace_is_of_the_clipped_image() -> None:
    found = base.descend(
        jnp.full((1, 1, 1), 3.0), lambda x: x.sum(), None, optax.sgd(0.0), lambda x: x, 1, jnp.full((1, 1, 1), 0.5)
    )
    assert found.trace.x0_error == pytest.approx(0.25)


def test_of_restarts_the_least_objective_is_returned_and_nan_never() -> None:
    def run(key: jax.Array) -> base.Descent:
        value = jax.random.normal(key, ())
        value = jnp.where(value < -1, jnp.nan, value)  # the least of all have failed
        return base.Descent(2 * value, value, StepInfo(value, value, value))

    values = np.asarray(jax.vmap(lambda k: run(k).value)(jax.random.split(jax.random.key(3), 20)))
    assert 0 < np.isnan(values).sum() < 20
    candidate, trace = base.best_of(jax.random.key(3), run, 20)
    assert trace.distance == np.nanmin(values)
    assert candidate == 2 * np.nanmin(values)
    with pytest.raises(ValueError, match="restarts 0 must be at least 1"):
        base.best_of(jax.random.key(3), run, 0)


@pytest.mark.parametrize("attack", [pytest.param(dlg, marks=pytest.mark.long), invert_gradients])
def test_the_truth_changes_the_trace_alone_and_trials_do_not_meet(least_squares, attack) -> None:
    """Restarts too: no choice may depend on the truth."""
    run = lambda key, objective, truth: attack(key, objective, SHAPE, steps=6, restarts=3, truth=truth)
    objectives = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), least_squares)
    keys = lambda: jax.random.split(jax.random.key(4), 2)
    blind, _ = jax.jit(jax.vmap(lambda k, o: run(k, o, None)))(keys(), objectives)
    seeing, trace = jax.jit(jax.vmap(run, (0, 0, None)))(keys(), objectives, jnp.zeros(SHAPE))
    np.testing.assert_array_equal(blind, seeing)
    assert np.all(trace.x0_error > 0)
    for i in range(2):
        alone, _ = jax.jit(lambda k, o: run(k, o, None))(keys()[i], jax.tree.map(lambda a, i=i: a[i], objectives))
        np.testing.assert_allclose(blind[i], alone, atol=1e-3)


VICTIM = mlp((4, 4, 1), 3, widths=(24,), activation=jnp.tanh)


def private(label: int = 1):
    params = VICTIM.init(jax.random.key(1))
    x = jnp.tanh(jax.random.normal(jax.random.key(2), (4, 4, 1)))
    return params, x, victim_gradient(VICTIM.loss, params, x, jnp.array(label))


@pytest.mark.long
def test_dlg_on_a_network_with_and_without_the_label() -> None:
    """A smooth victim of more parameters than pixels gives the image away; as in the paper, the label with it.

    Jointly most starts end at a wrong label, at a distance of 3.5, so the least of many counts.
    """
    params, x, leak = private()
    match = GradientMatching(params, jnp.array(1), leak, VICTIM.loss, squared_l2)
    run = jax.jit(lambda m: dlg(jax.random.key(0), m, x.shape, steps=200), compiler_options=QUICK_COMPILE)
    np.testing.assert_allclose(run(match)[0], x, atol=1e-2)
    joint = jax.jit(
        lambda m: dlg(jax.random.key(0), JointLabels(m), x.shape, steps=300, restarts=24, label_shape=(3,)),
        compiler_options=QUICK_COMPILE,
    )
    (image, logits), _ = joint(dataclasses.replace(match, label=jnp.array(0)))  # which it must not look at
    assert jnp.argmax(logits) == 1
    np.testing.assert_allclose(image, x, atol=3e-2)


def test_inverting_on_a_network() -> None:
    params, x, leak = private()
    match = GradientMatching(params, jnp.array(1), leak, VICTIM.loss, cosine)
    run = jax.jit(lambda m: invert_gradients(jax.random.key(0), m, x.shape, steps=1500, tv=0.0), compiler_options=QUICK_COMPILE)
    np.testing.assert_allclose(run(match)[0], x, atol=2e-2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_first_dense_layer_gives_its_input_away(scale: float) -> None:
    """To rounding, whatever the size of the gradient and the sign of the singular vectors."""
    rng = np.random.default_rng(5)
    for _ in range(4):
        x, delta = rng.uniform(-1, 1, 30), scale * rng.normal(size=7)
        found = dense_layer_input(jnp.asarray(np.outer(x, delta)), jnp.asarray(delta))
        np.testing.assert_allclose(found.x, x, atol=1e-10)
        np.testing.assert_allclose(found.std, 1 / np.linalg.norm(delta), rtol=1e-10)


def test_the_first_dense_layer_of_a_network() -> None:
    """40 dB under the aim's 60 would be an error of 1e-1."""
    _, x, leak = private()
    layer = VICTIM.first_dense
    np.testing.assert_allclose(dense_layer_input(leak[layer.kernel], leak[layer.bias]).x, x.ravel(), atol=1e-5)


def test_the_image_is_read_through_what_lies_before_the_layer() -> None:
    """The layer sees scale * image + shift by channel; the error is the largest where the scale is the smallest."""
    rng = np.random.default_rng(7)
    image, delta = rng.uniform(-1, 1, (4, 3, 2)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    scale, shift = (4.0, -0.5), (0.3, 2.0)
    leak = lambda seen: {"k": jnp.outer(seen.ravel(), delta), "b": jnp.asarray(delta)}
    read = lambda layer, seen: read_first_dense(layer, leak(seen), (4, 3, 2))
    x, std = read(FirstDense("k", "b", scale, shift), image * np.float32(scale) + np.float32(shift))
    np.testing.assert_allclose(x, image, atol=1e-5)
    np.testing.assert_allclose(std, 1 / np.linalg.norm(delta) / 0.5, rtol=1e-5)
    x, std = read(FirstDense("k", "b"), image)
    np.testing.assert_allclose(x, image, atol=1e-5)
    np.testing.assert_allclose(std, 1 / np.linalg.norm(delta), rtol=1e-5)


def test_noise_on_the_first_dense_layer_is_averaged_out_as_promised() -> None:
    """Standard deviation sigma / ||delta|| about a scaled image; the single neuron of the largest bias does far worse."""
    rng = np.random.default_rng(6)
    x, delta, sigma = rng.uniform(-1, 1, 300), rng.normal(size=100), 0.02
    noise = sigma * rng.normal(size=(400, 301, 100))
    rows = np.concatenate([np.outer(x, delta), delta[None]])[None] + noise
    read = jax.jit(jax.vmap(dense_layer_input), compiler_options=QUICK_RUN)
    found = read(float32(rows[:, :-1]), float32(rows[:, -1]))
    estimate = np.asarray(found.x)
    scale = estimate @ x / (x @ x)
    promised = sigma / np.linalg.norm(delta)
    assert np.std(estimate - scale[:, None] * x) == pytest.approx(promised, rel=0.03)
    assert sigma * np.mean(found.std) == pytest.approx(promised, rel=0.01)
    assert np.std(scale) == pytest.approx(promised, rel=0.15)
    single = rows[:, :-1, np.abs(delta).argmax()] / rows[:, -1:, np.abs(delta).argmax()]
    assert np.std(single - x) > 2 * np.std(estimate - x)


def test_no_active_neuron_is_no_image_and_shapes_are_checked() -> None:
    for found in (
        dense_layer_input(jnp.zeros((6, 4)), jnp.zeros(4)),
        read_first_dense(FirstDense("k", "b", (2.0,), (1.0,)), {"k": jnp.zeros((6, 4)), "b": jnp.zeros(4)}, (2, 3, 1)),
    ):
        assert np.isnan(found.x).all()
        assert np.isposinf(found.std)
    with pytest.raises(ValueError, match=r"\(6, 4\) does not go with a bias \(6,\)"):
        dense_layer_input(jnp.zeros((6, 4)), jnp.zeros(6))


def test_a_start_is_distributed_as_the_forward_process() -> None:
    """x_t / sqrt(abar) - image has variance (1 - abar) / abar, with the estimate's own error in it."""
    schedule = Schedule.create(num_steps=STEPS)
    ratio = np.sqrt((1 - schedule.abar) / schedule.abar)
    for std, step in ((0.0, 0), (float(ratio[4]) * 0.999, 4), (float(ratio[4]) * 1.01, 5), (1e6, STEPS - 1)):
        assert start_from(jax.random.key(0), schedule, jnp.zeros(SHAPE), std).step == step
    image, std = jnp.full((4000,), 0.3), 0.5 * float(ratio[5] + ratio[6])
    estimate = image + std * jax.random.normal(jax.random.key(1), image.shape)
    start = start_from(jax.random.key(2), schedule, estimate, std)
    assert start.step == 6
    residual = np.asarray(start.x / jnp.sqrt(schedule.abar[6]) - image)
    assert np.std(residual) == pytest.approx(ratio[6], rel=0.05)
    np.testing.assert_allclose(start_from(jax.random.key(2), schedule, estimate, 1e6).x, jnp.sqrt(schedule.abar[-1]) * estimate)


def test_a_start_skips_the_steps_above_it(gaussian) -> None:
    """From pure noise at the last index nothing changes; from below it the steps above do nothing and report nan."""
    residual = Residual(jnp.eye(4, 6), jnp.zeros(4))
    schedule, key = Schedule.create(num_steps=STEPS), lambda: jax.random.key(3)
    run = jax.jit(lambda start: dsg_sample(key(), gaussian, residual, schedule, SHAPE, start=start))
    whole, _ = run(None)
    top = Start(jax.random.normal(jax.random.split(key())[0], SHAPE), jnp.array(STEPS - 1))
    np.testing.assert_allclose(run(top)[0], whole, atol=1e-5)

    def step(key, x, i):
        return x + 10.0 ** i.astype(jnp.float32), StepInfo(x.sum(), x.sum(), x.sum())

    image, trace = reverse(key(), step, schedule, (1, 1, 1), Start(jnp.zeros((1, 1, 1)), jnp.array(3)))
    assert image == 1111
    np.testing.assert_array_equal(np.isfinite(trace.distance), np.arange(STEPS)[::-1] <= 3)


def test_a_batch_is_denoised_image_by_image(gaussian) -> None:
    x = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    eps, v = batched(gaussian)(x, jnp.array(500))
    assert v is None
    for i in range(3):
        np.testing.assert_allclose(eps[i], gaussian(x[i], jnp.array(500))[0], rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 4.0])
def test_red_diff_is_its_plain_loop(gaussian, weight: float) -> None:
    """In float64, by the exact denoiser's formula, with Adam written out."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(4, 6)), rng.normal(size=4)
    objective, schedule = Residual(float32(a), float32(b)), Schedule.create(num_steps=STEPS)
    truth = jnp.linspace(-1, 1, 6).reshape(SHAPE)
    image, trace = jax.jit(
        lambda w: red_diff_sample(jax.random.key(0), gaussian, objective, schedule, SHAPE, weight=w, truth=truth)
    )(weight)
    mean, cov = (np.asarray(p, np.float64) for p in (gaussian.mean, gaussian.cov))
    abars = np.cumprod(1 - make_betas())[np.rint(np.linspace(0, 999, STEPS)).astype(int)]
    key_init, key_steps = jax.random.split(jax.random.key(0))
    x, m, v, errors = np.clip(0.1 * normal(key_init), -1, 1), np.zeros(6), np.zeros(6), []
    for k, i in enumerate(reversed(range(STEPS))):
        noise, abar = normal(jax.random.fold_in(key_steps, i)), abars[i]
        x_t = np.sqrt(abar) * x + np.sqrt(1 - abar) * noise
        eps = np.sqrt(1 - abar) * np.linalg.inv(abar * cov + (1 - abar) * np.eye(6)) @ (x_t - np.sqrt(abar) * mean)
        errors.append(np.mean((x - np.ravel(truth)) ** 2))
        r = a @ x - b
        grad = a.T @ r / np.linalg.norm(r)
        g = grad / np.linalg.norm(grad) + weight * np.sqrt((1 - abar) / abar) * (eps - noise) / np.sqrt(6)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * k / STEPS))
        x = np.clip(x - rate * (m / (1 - 0.9 ** (k + 1))) / (np.sqrt(v / (1 - 0.99 ** (k + 1))) + 1e-8), -1, 1)
    np.testing.assert_allclose(np.ravel(image), x, atol=2e-3)
    np.testing.assert_allclose(trace.x0_error, errors, atol=2e-3)


def test_red_diff_goes_to_the_prior_where_the_objective_is_flat(gaussian) -> None:
    """The prior's mean, held in the box: what is most likely where nothing was leaked."""
    schedule = Schedule.create(num_steps=200)
    run = jax.jit(
        lambda k: red_diff_sample(k, gaussian, Flat(jnp.float32(1)), schedule, SHAPE, weight=1.0, learning_rate=0.05)[0]
    )
    found = np.mean(jax.vmap(run)(jax.random.split(jax.random.key(0), 32)), 0)
    inside = np.abs(gaussian.mean) < 0.8
    assert inside.sum() >= 3
    np.testing.assert_allclose(found.ravel()[inside], np.asarray(gaussian.mean)[inside], atol=0.15)
