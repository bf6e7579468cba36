"""An audit in one call: attacks on a model's gradients over a grid of noise levels."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gdiff_jax import images as image_files
from gdiff_jax import parallel
from gdiff_jax.auditing.checks import check_gradients, check_loss, check_numbers, images_of, labels_of
from gdiff_jax.auditing.film import film, film_steps
from gdiff_jax.auditing.result import Audit, assemble
from gdiff_jax.auditing.summary import PRIOR_ONLY
from gdiff_jax.matching import GradientMatching, Loss, cosine, l2, victim_gradient
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise, Mechanism
from gdiff_jax.metrics import candidate_count, image_metrics
from gdiff_jax.priors import Prior, load_prior
from gdiff_jax.provenance import this_run
from gdiff_jax.samplers import dps_sample, dsg_sample, mean_of_chains, unguided_sample
from gdiff_jax.schedule import Schedule
from gdiff_jax.signal import CALIBRATED_RATE, NoiseCalibration

if TYPE_CHECKING:
    from gdiff_jax.theory.privacy import Guarantee

SIGMAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
METHODS = ("dsg", "dps", "calibrated-dsg", "calibrated-mean")


def audit(
    loss: Loss,
    params: Any,
    images: Any,
    labels: Any,
    *,
    prior: str | Prior = "cifar10-32",
    sigmas: Sequence[float] = SIGMAS,
    mechanism: Callable[[Any], Mechanism] = GaussianNoise,
    methods: Sequence[str] = ("dsg", "calibrated-mean"),
    seeds: int = 2,
    seed: int = 0,
    steps: int = 100,
    threshold: float = 20.0,
    share: float = 0.1,
    delta: float = 1e-5,
    candidates: Any = None,
    name: str = "the model",
    batch: int = 8,
    progress: bool = True,
) -> Audit:
    """How much of private images comes back from their gradients in a model, over noise levels.

    The attacker knows the weights, the loss, the labels, the mechanism and the prior: the worst case. Each image is attacked
    alone. Trials run on every device that JAX has (`parallel.use_every_core` before JAX is used makes each core one).

    Args:
      loss: scalar `loss(params, x, y)` of one image x (H, W, C) in [-1, 1], pure, twice differentiable almost everywhere.
      params: the model's parameters, any pytree of floating arrays.
      images: private images (N, H, W, C) of the prior's shape, uint8 or floating in [-1, 1]; ten or more for useful intervals.
      labels: (N, ...), whatever the loss takes for y.
      prior: a name, folder or hub id for `load_prior`, or a `Prior`.
      sigmas: noise levels, the standard deviations that `mechanism` is made with, in units of the gradient.
      mechanism: what happens to the gradient at a level, such as `lambda s: Chain((Clip(1.0), GaussianNoise(s)))`.
      methods: attacks, of "dsg", "dps", "calibrated-dsg" and "calibrated-mean". The last makes four reconstructions of a
        leak at once, in four times the time and memory of one, and comes closest to the truth; under noise more images are
        recognised from the others (benchmarks/results/calibration.md). So one of each kind is the default.
      seeds: leaks an image, each with noise of its own.
      seed: of all random numbers.
      steps: reverse steps.
      threshold: PSNR in dB from which on an image counts as recovered.
      share: the audit looks for the noise from which on fewer than this share of the images is recovered.
      delta: of every (epsilon, delta) that is told.
      candidates: images (K, H, W, C) among which the truth is looked for; the bundled CIFAR-10 test images where they fit,
        together with `images`, if None.
      name: of the model, for the report.
      batch: trials at a time on all devices; each of "calibrated-mean" takes the memory of four.
      progress: show a bar.

    Returns:
      An `Audit`: its repr is the verdict; `plot()`, `report(folder)`, `to_json()`.

    Raises:
      ValueError: for arguments that do not fit, before anything is computed.
    """
    from gdiff_jax.theory.summary import summarise  # with dp_accounting half a second, which a start need not wait

    if isinstance(prior, str):
        prior = load_prior(prior)
    x, y = images_of(images, prior.image_shape), labels_of(labels, len(images))
    check_numbers(sigmas, methods, METHODS, threshold, share, delta, seeds=seeds, steps=steps, batch=batch)
    if steps > len(prior.betas):
        raise ValueError(f"steps {steps}: the prior was trained with {len(prior.betas)}; ask for fewer")
    others = _bundled(x) if candidates is None else images_of(candidates, prior.image_shape)
    check_loss(loss, params, x[0], jax.tree.map(lambda a: a[0], y))
    check_gradients(loss, params, x, y)
    size = sum(p.size for p in jax.tree.leaves(params))
    told = [describe_guarantee(s, mechanism(s), size, delta, 1 / candidate_count(others, x)) for s in sorted(sigmas)]
    started = time.time()
    schedule, mesh = prior.schedule(steps), parallel.trial_mesh()
    pairs = [(i, s) for i in range(len(x)) for s in range(seeds)]
    rows: list[dict[str, Any]] = []
    found: list[np.ndarray] = []
    traces: list[dict[str, np.ndarray]] = []
    with tqdm(total=len(pairs) * (1 + len(methods) * len(sigmas)), unit="trial", disable=not progress) as bar:
        for method in (PRIOR_ONLY, *methods):
            run = jax.jit(parallel.map_trials(_trial(method, loss, mechanism, prior), mesh, 3))
            common = parallel.replicate((prior.denoise, schedule, params), mesh)
            grid = [(s, *pair) for s in ([None] if method == PRIOR_ONLY else sorted(sigmas)) for pair in pairs]
            width = -(-min(batch, len(grid)) // mesh.size) * mesh.size
            bar.set_description(method)
            for first in range(0, len(grid), width):
                part = grid[first : first + width]
                full = part + [part[-1]] * (width - len(part))
                result = jax.device_get(run(*common, *parallel.divide(_own(seed, full, x, y), mesh)))
                for j, (sigma, image, s) in enumerate(part):
                    scalars = {k: float(v[j]) for k, v in result["scalars"].items()}
                    failed = not bool(np.isfinite(result["image"][j]).all())
                    which = dict(method=method, sigma=sigma, image=image, leak=image, seed=s, failed=failed)
                    trace = {k: v[j] for k, v in result["trace"].items()}
                    best = trace["x0_error"][np.isfinite(trace["x0_error"])]
                    at_best = float(10 * np.log10(4 / best.min())) if best.size else None
                    rows.append({**which, **scalars, "psnr_of_best_step": at_best, "label_accuracy": 1.0})
                    found.append(result["image"][j])
                    traces.append(trace)
                bar.update(len(part))
    key = jax.random.fold_in(jax.random.key(seed), 2**18)
    theory = summarise(key, loss, params, x, y, sorted(sigmas))
    about: dict[str, Any] = {
        **about_run(prior, "gdiff_jax.audit(...)"),
        "victim": name,
        "parameters": size,
        "images": f"{len(x)} images given",
        "num_images": len(x),
        "group": 1,
        "seeds": seeds,
        "seed": seed,
        "steps": steps,
        "methods": list(methods),
        "attacks": ", ".join(m.upper() for m in methods),
        "mechanism": str(mechanism(0.123456789)).replace("0.123456789", "sigma"),
        "clip_norm": _clip_norm(mechanism(1.0)),
        "threat_model": "The attacker knows the model's weights and loss, the labels, the mechanism and the prior.",
        "threshold": threshold,
        "share": share,
        "delta": delta,
        "film_steps": film_steps(schedule),
        "seconds": round(time.time() - started, 1),
    }
    frames = _film(seed, loss, mechanism(min(sigmas)), prior, schedule, params, x, y)
    mean = prior.mean_image
    return assemble(
        about, rows, found, traces, x, candidates=others, mean_image=mean, guarantees=told, theory=theory, film=frames
    )


def _clip_norm(mechanism: Mechanism) -> float | None:
    """C of the Gaussian mechanism, whose epsilon follows from sigma / C; else None."""
    stages = mechanism.stages if isinstance(mechanism, Chain) else ()
    if len(stages) == 2 and isinstance(stages[0], Clip) and isinstance(stages[1], GaussianNoise):
        return float(stages[0].norm)
    return None


def _trial(method: str, loss: Loss, mechanism: Callable[[Any], Mechanism], prior: Prior) -> Callable[..., dict[str, Any]]:
    """One trial of a method, for `parallel.map_trials`."""
    mean = jnp.asarray(prior.expected_image)

    def one(denoise: Any, schedule: Schedule, params: Any, key: jax.Array, sigma: jax.Array, x: jax.Array, y: Any) -> Any:
        k_noise, k_sample = jax.random.split(key)
        options: dict[str, Any] = dict(clip=prior.clip, truth=x)
        if method == PRIOR_ONLY:
            image, trace = unguided_sample(k_sample, denoise, schedule, prior.image_shape, **options)
            return {"image": image, "trace": trace._asdict(), "scalars": image_metrics(image, x)}
        gradient, how = victim_gradient(loss, params, x, y), mechanism(sigma)
        leak = how(k_noise, gradient)
        match = GradientMatching(params, y, leak, loss, mechanism=how)
        image, trace = _attack(method, mean, k_sample, denoise, match, schedule, prior.image_shape, **options)
        scalars = {
            "gradient_norm": l2(gradient, jax.tree.map(jnp.zeros_like, gradient)),
            "noise_norm": l2(leak, gradient),
            "leak_cosine": 1 - cosine(leak, gradient),
            "distance": match(image),
        }
        return {"image": image, "trace": trace._asdict(), "scalars": {**image_metrics(image, x), **scalars}}

    return one


def _attack(method: str, mean: Any, key: jax.Array, *task: Any, **options: Any) -> Any:
    """Of denoiser, match, schedule and shape."""
    if method == "dps":
        return dps_sample(key, *task, **options)
    if method == "dsg":
        return dsg_sample(key, *task, **options)
    _, match, *_ = task
    options |= dict(guidance_rate=CALIBRATED_RATE, signal=NoiseCalibration(match))
    chain = lambda key: dsg_sample(key, *task, **options)
    return chain(key) if method == "calibrated-dsg" else mean_of_chains(key, chain, mean)


def _own(seed: int, grid: list[tuple[float | None, int, int]], x: np.ndarray, y: Any) -> tuple[Any, ...]:
    index = np.array([image for _, image, _ in grid])
    sigmas = jnp.array([np.nan if sigma is None else sigma for sigma, _, _ in grid], jnp.float32)
    keys = parallel.trial_keys(seed, index, np.array([s for _, _, s in grid]))
    return keys, sigmas, jnp.asarray(x[index]), jax.tree.map(lambda a: jnp.asarray(a[index]), y)


def _film(seed: int, loss: Loss, mechanism: Mechanism, prior: Prior, schedule: Schedule, params: Any, x: Any, y: Any) -> Any:
    """Of image 0, seed 0."""
    k_noise, k_sample = jax.random.split(parallel.trial_keys(seed, np.array([0]), np.array([0]))[0])
    x, y = jnp.asarray(x[0]), jax.tree.map(lambda a: jnp.asarray(a[0]), y)
    leak = mechanism(k_noise, jax.jit(functools.partial(victim_gradient, loss))(params, x, y))
    match = GradientMatching(params, y, leak, loss, mechanism=mechanism)
    return film(k_sample, prior.denoise, match, schedule, prior.image_shape, prior.clip)


def about_run(prior: Prior, command: str | None = None) -> dict[str, Any]:
    """What made the result, for `Audit.about`."""
    run = this_run()
    revision = f", revision {prior.revision[:12]}" if prior.revision else ""
    told = f"{prior.name} (sha256 {prior.sha256[:12]}{revision})"
    versions = {k.replace("gdiff-jax", "gdiff_jax"): v for k, v in run["versions"].items()}
    return {**run, "versions": versions, "prior": told, **({"command": command} if command else {})}


def describe_guarantee(sigma: float, mechanism: Mechanism, size: int, delta: float, kappa: float) -> dict[str, Any]:
    """What one release through `mechanism`, of noise `sigma`, guarantees, as numbers; None where there is none."""
    from gdiff_jax.theory import privacy

    return guarantee_row(sigma, privacy.guarantee(mechanism, size, delta), kappa)


def guarantee_row(sigma: float, found: Guarantee, kappa: float) -> dict[str, Any]:
    """A guarantee as a line of a table."""
    row: dict[str, Any] = {"sigma": float(sigma), "delta": found.delta, "reason": found.reason}
    names = ("epsilon", "mu", "advantage", "tpr", "gamma", "gamma_1e-4")
    if not found:
        return {**row, **dict.fromkeys(names), "pure": False}
    bounds = found.advantage, found.tpr(0.01), found.reconstruction_bound(kappa), found.reconstruction_bound(1e-4)
    return {**row, **dict(zip(names, (found.epsilon, found.mu, *bounds), strict=True)), "pure": bool(found.pure_epsilon)}


def _bundled(x: np.ndarray) -> np.ndarray:
    """The images themselves, and the bundled ones where they are of this shape."""
    bundled = image_files.to_model(image_files.load_images(image_files.BUNDLED).images)
    return np.concatenate([x, bundled]) if bundled.shape[1:] == x.shape[1:] else x
