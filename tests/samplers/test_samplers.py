"""The samplers against loops written apart from them, and the promises of their public face."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from objectives import SHAPE, Flat, Residual, float32, normal

from gdiff_jax import GaussianNoise, GradientMatching, Schedule, dps_sample, dsg_sample, unguided_sample, victim_gradient
from gdiff_jax.samplers import StepInfo, base, dps_step, dsg_step, red_diff_sample, unguided_step
from gdiff_jax.schedule import make_betas
from gdiff_jax.victims import lenet

STEPS = 12


@pytest.fixture
def residual() -> Residual:
    rng = np.random.default_rng(8)
    return Residual(*(float32(rng.normal(size=s)) for s in ((4, 6), (4,))))


def loop(
    prior,
    residual,
    *,
    seed=0,
    zeta=None,
    rate=None,
    interval=1,
    clip=True,
    variance="fixed_small",
    truth=None,
    through_prior=True,
):
    """All samplers as one plain loop in float64, without a derivative taken by JAX.

    The reverse step is DDIM's with eta = 1 (Song et al. 2021, Eq. 12), which is DDPM's posterior in other words. Only the draws
    are JAX's: the first normal of one half of the key, step i's of fold_in(other half, i).
    """
    mean, cov = (np.asarray(p, np.float64) for p in (prior.mean, prior.cov))
    a, b = (np.asarray(p, np.float64) for p in (residual.a, residual.b))
    steps = np.rint(np.linspace(0, 999, STEPS)).astype(int)
    abars = np.cumprod(1 - make_betas())[steps]
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    x, trace = normal(key_init), []
    for i in reversed(range(STEPS)):
        z = normal(jax.random.fold_in(key_steps, i))
        abar, abar_prev = abars[i], abars[i - 1] if i else 1.0
        inverse = np.linalg.inv(abar * cov + (1 - abar) * np.eye(6))
        eps = np.sqrt(1 - abar) * inverse @ (x - np.sqrt(abar) * mean)
        x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
        jacobian = (np.eye(6) - (1 - abar) * inverse) / np.sqrt(abar)
        if clip:
            jacobian = (np.abs(x0) < 1)[:, None] * jacobian
            x0 = np.clip(x0, -1, 1)
        r = a @ x0 - b
        distance, grad = np.linalg.norm(r), a.T @ r / np.linalg.norm(r)
        grad = jacobian.T @ grad if through_prior else grad

        small = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        noise = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
        mu = np.sqrt(abar_prev) * x0 + np.sqrt(1 - abar_prev - small) * noise
        var = np.full(6, small)
        if variance == "fixed_large":
            var = np.full(6, 1 - abar / abar_prev)
        elif variance == "learned_range" and i:
            frac = (np.asarray(prior.v, np.float64).ravel() + 1) / 2
            var = (1 - abar / abar_prev) ** frac * small ** (1 - frac)
        std = np.sqrt(var) * (i > 0)

        guided = zeta is not None or (rate is not None and i % interval == 0)
        if guided and rate is not None:
            root_n = np.sqrt(6)
            mixed = (1 - rate) * z + rate * -root_n * grad / np.linalg.norm(grad)
            step = std * root_n * mixed / np.linalg.norm(mixed)
        else:
            step = std * z - (zeta * grad if guided else 0)
        x = mu + step
        error = np.nan if truth is None else np.mean((x0 - np.asarray(truth).ravel()) ** 2)
        trace.append((distance if guided else np.nan, np.linalg.norm(grad) if guided else np.nan, error))
    return x.reshape(SHAPE), np.array(trace).T


CASES = [  # sampler, strengths (traced), what else
    ("unguided", [0.0], {}),
    ("unguided", [0.0], dict(variance="fixed_large", clip=False)),
    ("dps", [0.05, 0.3], {}),
    ("dps", [0.3], dict(variance="learned_range", clip=False)),
    ("dsg", [0.0, 0.2, 1.0], {}),
    ("dsg", [0.2, 0.7], dict(variance="learned_range", clip=False)),
    ("dsg", [0.2, 1.0], dict(variance="fixed_large", interval=3)),
    ("dps", [0.3], dict(through_prior=False)),
    ("dsg", [0.2, 1.0], dict(through_prior=False)),
    ("dsg", [0.5], dict(interval=50)),  # only the last step, which nothing can guide
]


@pytest.mark.parametrize(("name", "strengths", "case"), CASES, ids=str)
def test_trajectory_is_that_of_a_plain_loop(gaussian, residual, name: str, strengths: list[float], case: dict) -> None:
    """Image and trace, noisiest step first. Float32 rounding is multiplied along the way: 2e-3 of values of order 1."""
    variance, clip, interval = case.get("variance", "fixed_small"), case.get("clip", True), case.get("interval", 1)
    prior = gaussian
    if variance == "learned_range":
        prior = dataclasses.replace(prior, v=jnp.linspace(-1, 1, 6).reshape(SHAPE))
    schedule = Schedule.create(num_steps=STEPS, variance=variance)
    common = dict(clip=clip, truth=jnp.linspace(-1, 1, 6).reshape(SHAPE))
    if name != "unguided":
        common["through_prior"] = case.get("through_prior", True)

    @jax.jit
    def run(key, strength):
        if name == "unguided":
            return unguided_sample(key, prior, schedule, SHAPE, **common)
        if name == "dps":
            return dps_sample(key, prior, residual, schedule, SHAPE, zeta=strength, **common)
        return dsg_sample(key, prior, residual, schedule, SHAPE, guidance_rate=strength, interval=interval, **common)

    for strength in strengths:
        image, trace = run(jax.random.key(0), strength)
        guidance = {"unguided": {}, "dps": dict(zeta=strength), "dsg": dict(rate=strength, interval=interval)}[name]
        expected, expected_trace = loop(prior, residual, **guidance, variance=variance, **common)
        assert image.shape == SHAPE
        np.testing.assert_allclose(image, expected, atol=2e-3)
        assert type(trace) is StepInfo
        assert [leaf.shape for leaf in trace] == [(STEPS,)] * len(StepInfo._fields)
        np.testing.assert_allclose(np.stack(trace), expected_trace, atol=2e-3, rtol=2e-3)  # nan equals nan, and only nan


@pytest.mark.parametrize("sample", [dps_sample, dsg_sample])
def test_guidance_at_x0hat_does_not_differentiate_the_prior(gaussian, residual, sample) -> None:
    @jax.custom_vjp
    def denoise(x_t, t):
        return gaussian(x_t, t)

    def refuse(*_):
        raise AssertionError("the prior was differentiated")

    denoise.defvjp(lambda x_t, t: (gaussian(x_t, t), None), refuse)
    schedule = Schedule.create(num_steps=STEPS)
    run = lambda **options: sample(jax.random.key(0), denoise, residual, schedule, SHAPE, **options)[0]
    assert np.isfinite(run(through_prior=False)).all()
    with pytest.raises(AssertionError, match="was differentiated"):
        run()


@pytest.mark.parametrize("interval", [1, 2, 5, STEPS])
def test_skipped_steps_have_no_distance(gaussian, residual, interval: int) -> None:
    """Guided are the indices that the interval divides; the trace runs from index 11 down to 0."""
    schedule = Schedule.create(num_steps=STEPS)
    _, trace = dsg_sample(jax.random.key(0), gaussian, residual, schedule, SHAPE, interval=interval)
    guided = np.arange(STEPS - 1, -1, -1) % interval == 0
    np.testing.assert_array_equal(np.isfinite(trace.distance), guided)
    np.testing.assert_array_equal(np.isfinite(trace.guidance_norm), guided)


def test_interval_below_1_is_refused(gaussian, residual) -> None:
    with pytest.raises(ValueError, match="interval 0 must be at least 1"):
        dsg_sample(jax.random.key(0), gaussian, residual, Schedule.create(num_steps=2), SHAPE, interval=0)


@jax.jit
def _dsg(key, x, i, prior, objective, schedule, rate):
    image, _ = dsg_step(key, x, i, prior, objective, schedule, guidance_rate=rate, clip=False)
    return image, base.posterior(prior, schedule, x, i, clip=False)


def start() -> jax.Array:
    return 0.5 * jax.random.normal(jax.random.key(9), SHAPE)


def dsg(prior, objective, schedule, i, *, rate, seed=1):
    """One DSG step, and the posterior it started from."""
    return _dsg(jax.random.key(seed), start(), i, prior, objective, schedule, rate)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("i", [1, STEPS - 1])
def test_dsg_step_ends_on_the_sphere(gaussian, residual, rate: float, i: int) -> None:
    """|| x_{t-1} - mean || = sqrt(n) sigma, however strong the guidance."""
    schedule = Schedule.create(num_steps=STEPS)
    x, p = dsg(gaussian, residual, schedule, i, rate=rate)
    np.testing.assert_allclose(np.linalg.norm(x - p.mean), np.sqrt(6) * schedule.posterior_std(i), rtol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_dsg_without_a_gradient_has_no_nan(gaussian, rate: float) -> None:
    """A flat objective gives no direction: the noise decides, on the same sphere; at rate 1 nothing is left but the mean."""
    schedule = Schedule.create(num_steps=STEPS)
    x, p = dsg(gaussian, Flat(jnp.float32(3)), schedule, 6, rate=rate)
    radius = np.sqrt(6) * schedule.posterior_std(6) if rate < 1 else 0.0
    np.testing.assert_allclose(np.linalg.norm(x - p.mean), radius, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dsg", "dps", "red-diff"])
@pytest.mark.parametrize("flat", [True, False])
def test_a_sample_can_be_differentiated_in_the_prior_also_where_its_guidance_is_zero(gaussian, residual, method, flat) -> None:
    """Reverse-mode derivative in the prior's mean against finite differences; 0 / 0 in that of a norm would make it nan."""
    schedule = Schedule.create(num_steps=4)
    objective = Flat(jnp.float32(3)) if flat else residual
    options = {"dsg": dict(clip=False), "dps": dict(clip=False, zeta=0.1), "red-diff": {}}[method]
    sampler = {"dsg": dsg_sample, "dps": dps_sample, "red-diff": red_diff_sample}[method]

    @jax.jit
    def mean(shift):
        prior = dataclasses.replace(gaussian, mean=gaussian.mean + shift)
        return sampler(jax.random.key(1), prior, objective, schedule, SHAPE, **options)[0].mean()

    exact = float(jax.jit(jax.grad(mean))(0.0))
    numeric = float(mean(0.01) - mean(-0.01)) / 0.02
    assert abs(exact - numeric) < 0.02 * abs(numeric) + 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dsg_with_learned_variance_ends_on_the_ellipsoid(gaussian, residual, rate: float) -> None:
    prior = dataclasses.replace(gaussian, v=jnp.linspace(-1, 1, 6).reshape(SHAPE))
    x, p = dsg(prior, residual, Schedule.create(num_steps=STEPS, variance="learned_range"), 6, rate=rate)
    np.testing.assert_allclose(np.linalg.norm((x - p.mean) / p.std), np.sqrt(6), rtol=1e-4)


def test_dsg_at_rate_0_puts_the_unguided_noise_on_the_sphere(gaussian, residual) -> None:
    schedule = Schedule.create(num_steps=STEPS)
    x, p = dsg(gaussian, residual, schedule, 6, rate=0.0)
    free, _ = unguided_step(jax.random.key(1), start(), 6, gaussian, schedule, clip=False)
    noise = np.asarray(free - p.mean)
    np.testing.assert_allclose(x - p.mean, noise * np.sqrt(6) * p.std / np.linalg.norm(noise), atol=1e-6)


def test_dsg_at_rate_1_goes_straight_down_the_gradient(gaussian, residual) -> None:
    """Whatever the key; the gradient is of the distance at x0hat(x_t), with respect to x_t."""
    schedule = Schedule.create(num_steps=STEPS)
    x, p = dsg(gaussian, residual, schedule, 6, rate=1.0)
    other, _ = dsg(gaussian, residual, schedule, 6, rate=1.0, seed=2)
    np.testing.assert_allclose(x, other, atol=1e-6)  # rounding: z + 1 (d* - z)
    grad = jax.grad(lambda x: residual(base.posterior(gaussian, schedule, x, 6, clip=False).x0))(start())
    np.testing.assert_allclose(x - p.mean, -np.sqrt(6) * p.std * grad / jnp.linalg.norm(grad), atol=1e-5)


def test_last_dsg_step_is_unguided(gaussian, residual) -> None:
    """The posterior's deviation there is 0, and so is the sphere."""
    x, p = dsg(gaussian, residual, Schedule.create(num_steps=STEPS), 0, rate=1.0)
    np.testing.assert_allclose(x, p.mean, atol=1e-6)


def test_last_dps_step_is_guided(gaussian, residual) -> None:
    schedule, x = Schedule.create(num_steps=STEPS), start()
    step = lambda zeta: dps_step(jax.random.key(1), x, 0, gaussian, residual, schedule, zeta=zeta, clip=False)
    (free, info), (guided, _) = step(0.0), step(0.5)
    np.testing.assert_allclose(np.linalg.norm(guided - free), 0.5 * info.guidance_norm, rtol=1e-4)
    assert info.guidance_norm > 0.1


def test_dps_without_step_size_is_the_unguided_sampler(gaussian, residual) -> None:
    """To rounding, over a whole trajectory: a grid over zeta holds the baseline of the same noise."""
    schedule = Schedule.create(num_steps=STEPS)
    guided, trace = dps_sample(jax.random.key(3), gaussian, residual, schedule, SHAPE, zeta=0.0)
    free, _ = unguided_sample(jax.random.key(3), gaussian, schedule, SHAPE)
    np.testing.assert_allclose(guided, free, atol=1e-6)
    assert np.all(np.asarray(trace.guidance_norm) > 0)


def silence(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
    """A denoiser that sees no noise: x0hat = x_t / sqrt(abar)."""
    return jnp.zeros_like(x_t), None


@pytest.mark.parametrize("clip", [True, False])
def test_saturated_pixels_get_no_guidance(residual, clip: bool) -> None:
    schedule = Schedule.create(num_steps=STEPS)
    x = jnp.sqrt(schedule.abar[4]) * jnp.array([0.5, 1.5, -0.2, -3.0, 0.9, 1.01]).reshape(SHAPE)
    step = lambda zeta: dps_step(jax.random.key(1), x, 4, silence, residual, schedule, zeta=zeta, clip=clip)[0]
    moved = np.ravel(step(0.0) != step(1.0))
    np.testing.assert_array_equal(moved, [True, not clip, True, not clip, True, not clip])


SAMPLERS = {
    "dps": lambda *a: dps_sample(*a, zeta=0.5),
    "dsg": lambda *a: dsg_sample(*a, guidance_rate=0.2),
    "dsg every 3rd": lambda *a: dsg_sample(*a, guidance_rate=0.2, interval=3),
}
VICTIM = lenet((8, 8, 1), 3)


def reconstruct(name: str, key: jax.Array, denoise, params, image: jax.Array, label: jax.Array, schedule: Schedule):
    """One trial, whole: a private gradient, its noise, the sampler."""
    key_noise, key_sample = jax.random.split(key)
    leak = GaussianNoise(1e-3)(key_noise, victim_gradient(VICTIM.loss, params, image, label))
    match = GradientMatching(params, label, leak, VICTIM.loss)
    return SAMPLERS[name](key_sample, denoise, match, schedule, image.shape)


@pytest.mark.parametrize(("name", "chunks"), [pytest.param("dps", (4, 1), marks=pytest.mark.long), ("dsg every 3rd", (1,))])
def test_a_trial_does_not_depend_on_its_neighbours(tiny_unet, random_params, name: str, chunks: tuple[int, ...]) -> None:
    """Alone or in chunks of 4 as among 16: equal to 1e-4 after ten steps with a U-Net (sums in another order, no more)."""
    schedule, params = Schedule.create(num_steps=10), random_params(VICTIM)
    images = np.random.default_rng(1).uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32)
    labels = np.arange(16) % 3
    batch = jax.vmap(functools.partial(reconstruct, name), in_axes=(0, None, None, 0, 0, None))
    run = jax.jit(batch, compiler_options=QUICK_COMPILE)

    def trials(rows: slice):
        keys = jax.random.split(jax.random.key(2), 16)[rows]
        return jax.device_get(run(keys, tiny_unet, params, images[rows], labels[rows], schedule))

    image, trace = trials(slice(16))
    assert np.all(np.std(image, axis=0) > 0.1)  # trials differ
    for chunk in chunks:
        rows = slice(8, 8 + chunk)
        other_image, other_trace = trials(rows)
        np.testing.assert_allclose(other_image, image[rows], atol=1e-4)
        np.testing.assert_allclose(other_trace.distance, trace.distance[rows], rtol=1e-4)


@pytest.mark.parametrize("name", ["dps", "dsg"])
def test_a_sweep_over_sigma_compiles_once(gaussian, residual, name: str) -> None:
    """And strength is traced too: a Python side effect counts the traces."""
    schedule, traces = Schedule.create(num_steps=4), []

    @jax.jit
    def sweep(key, sigmas, strengths):
        def trial(sigma, strength):
            traces.append(1)
            key_noise, key_sample = jax.random.split(key)
            noisy = dataclasses.replace(residual, b=GaussianNoise(sigma)(key_noise, residual.b))
            if name == "dps":
                return dps_sample(key_sample, gaussian, noisy, schedule, SHAPE, zeta=strength)[0]
            return dsg_sample(key_sample, gaussian, noisy, schedule, SHAPE, guidance_rate=strength)[0]

        return jax.vmap(trial)(sigmas, strengths)

    first = sweep(jax.random.key(0), jnp.array([0.0, 0.1, 1.0]), jnp.array([0.1, 0.1, 0.1]))
    second = sweep(jax.random.key(0), jnp.array([0.0, 0.5, 2.0]), jnp.array([0.1, 0.4, 0.9]))
    assert len(traces) == 1
    np.testing.assert_array_equal(first[0], second[0])  # the same noise and strength in both sweeps
    assert not np.allclose(first[1:], second[1:])


def constants(closed) -> int:
    """Elements of all arrays baked into a jaxpr, nested ones too."""
    total = sum(np.size(c) for c in getattr(closed, "consts", ()))
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    total += constants(sub)
    return total


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_weights_are_baked_in(tiny_unet, random_params, name: str) -> None:
    """Denoiser, objective and schedule are arguments; the control shows that a closure over them would be seen."""
    schedule, params = Schedule.create(num_steps=3), random_params(VICTIM)
    match = GradientMatching(params, jnp.array(1), jax.tree.map(jnp.ones_like, params), VICTIM.loss)
    shape = (8, 8, 1)
    run = lambda key, d, o, s: SAMPLERS[name](key, d, o, s, shape)
    weights = sum(p.size for p in jax.tree.leaves((tiny_unet, match)))
    assert constants(jax.make_jaxpr(run)(jax.random.key(0), tiny_unet, match, schedule)) < 100
    assert constants(jax.make_jaxpr(lambda key: run(key, tiny_unet, match, schedule))(jax.random.key(0))) >= weights


@pytest.mark.parametrize("name", SAMPLERS)
def test_jit_and_vmap_give_the_plain_result(gaussian, residual, name: str) -> None:
    schedule = Schedule.create(num_steps=STEPS)
    run = lambda key, d, o, s: SAMPLERS[name](key, d, o, s, SHAPE)
    objectives = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), residual)
    keys = lambda: jax.random.split(jax.random.key(4), 2)
    mapped, trace = jax.vmap(jax.jit(run), in_axes=(0, None, 0, None))(keys(), gaussian, objectives, schedule)
    assert trace.distance.shape == (2, STEPS)
    for i in range(2):
        alone, _ = run(keys()[i], gaussian, jax.tree.map(lambda a, i=i: a[i], objectives), schedule)
        np.testing.assert_allclose(mapped[i], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["zeta", "guidance_rate"])
def test_a_sampler_is_differentiable_in_its_strength_and_denoiser(x64, gaussian, residual, name: str) -> None:
    """Against central differences in float64: whoever tunes the strength may do it by gradient."""
    widen = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, tree)
    schedule, gaussian, residual = widen((Schedule.create(num_steps=4), gaussian, residual))
    sample = dps_sample if name == "zeta" else dsg_sample

    @jax.jit
    def total(strength, mean):
        prior = dataclasses.replace(gaussian, mean=mean)
        return sample(jax.random.key(5), prior, residual, schedule, SHAPE, **{name: strength}, clip=False)[0].sum()

    s, mean = jnp.float64(0.3), gaussian.mean
    grads = jax.grad(total, argnums=(0, 1))(s, mean)
    h, e = 1e-5, jnp.zeros(6).at[2].set(1.0)
    np.testing.assert_allclose(grads[0], (total(s + h, mean) - total(s - h, mean)) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(grads[1][2], (total(s, mean + h * e) - total(s, mean - h * e)) / (2 * h), rtol=1e-6)
