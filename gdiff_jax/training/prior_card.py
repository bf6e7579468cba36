"""Measures a prior and writes its card, so that anyone can judge it: held-out eps-MSE by noise level, a sheet of samples, and
how far the samples are from the training images.
"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gdiff_jax import images as image_files
from gdiff_jax import numerics
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import shown, write_atomic
from gdiff_jax.priors import Denoiser, Prior, load_prior
from gdiff_jax.samplers import unguided_sample
from gdiff_jax.schedule import Schedule
from gdiff_jax.training.data import load_split
from gdiff_jax.training.settings import PriorCard

LEVELS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # of the timesteps
SHEET_SIDE, SHEET_STEPS = 8, 250


def eps_loss(denoise: Denoiser, schedule: Schedule, key: jax.Array, x0: jax.Array, t: jax.Array) -> jax.Array:
    """Mean squared error of eps for each image of a batch, (N,) (DDPM, Eq. 14); t counts steps of an un-respaced schedule.

    Of a network that predicts something else it is the error of the eps that belongs to its x0hat.
    """
    eps = jax.random.normal(key, x0.shape)
    x_t = jax.vmap(schedule.add_noise)(x0, eps, t)
    signal, noise = (a[t].reshape(-1, 1, 1, 1) for a in (jnp.sqrt(schedule.abar), schedule.noise))
    p = schedule.parametrisation
    out, _ = denoise.batch(p.shown(x_t, signal, noise), schedule.t[t])
    return jnp.square((x_t - signal * p.x0(x_t, out, signal, noise)) / noise - eps).mean((1, 2, 3))


_eps_loss = jax.jit(eps_loss)


def eps_mse_by_level(
    denoise: Denoiser, schedule: Schedule, heldout: np.ndarray, levels: tuple[float, ...] = LEVELS, batch: int = 100
) -> dict[int, float]:
    """Held-out eps-MSE by timestep, at shares of an un-respaced schedule; predicting 0 costs 1.

    The noise of an image is the same in every call, and so is the class that a conditional network is told of it, a drawn one,
    or none where a label stands for that.
    """
    result = {}
    for level in sorted({int(share * schedule.num_steps) for share in levels}):
        losses = []
        for start in range(0, len(heldout), batch):
            x0 = jnp.asarray(image_files.to_model(heldout[start : start + batch]))
            key = jax.random.fold_in(numerics.key(level), start)
            of_any = denoise.of_any_class(jax.random.fold_in(key, 1), (len(x0),))
            losses.append(np.asarray(_eps_loss(of_any, schedule, key, x0, jnp.full(len(x0), level))))
        result[level] = float(np.concatenate(losses).mean())
    return result


@functools.partial(jax.jit, static_argnames=("shape", "clip"))
def _samples(keys: jax.Array, denoise: Denoiser, schedule: Schedule, shape: tuple[int, int, int], clip: bool) -> jax.Array:
    def sample(key: jax.Array) -> jax.Array:
        told = denoise.of_any_class(jax.random.fold_in(key, 1))
        return unguided_sample(key, told, schedule, shape=shape, clip=clip)[0]

    return jax.vmap(sample)(keys)


def draw_samples(prior: Prior, count: int = SHEET_SIDE**2, steps: int = SHEET_STEPS) -> np.ndarray:
    """Unguided samples, seeds 0, 1, 2 ..., none left out: uint8 (count, H, W, C); compiled once for a network and `steps`.

    Args:
      prior: with whatever weights; the noise does not depend on them.
      count: a multiple of SHEET_SIDE, that many at a time.
      steps: at most; no more than the prior was trained with.
    """
    keys = jax.vmap(numerics.key)(jnp.arange(count))
    schedule = prior.schedule(min(steps, len(prior.betas)))
    parts = [keys[i : i + SHEET_SIDE] for i in range(0, count, SHEET_SIDE)]
    drawn = [np.asarray(_samples(part, prior.denoise, schedule, prior.image_shape, prior.clip)) for part in parts]
    return np.round(image_files.to_unit(np.concatenate(drawn)) * 255).astype(np.uint8)


def nearest(queries: np.ndarray, train: np.ndarray, chunk: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """The training image closest to each query, mirror images included, and its distance.

    Args:
      queries: (N, H, W, C) uint8.
      train: (M, H, W, C) uint8.
      chunk: training images compared at a time.

    Returns:
      images (N, H, W, C) uint8, and the root mean square difference of their values in [0, 1], (N,).
    """
    flat = lambda a: a.reshape(len(a), -1).astype(np.float32) / 255
    q = flat(queries)
    best, closest = np.full(len(q), np.inf), np.empty_like(queries)
    for start in range(0, len(train), chunk):
        for images in (train[start : start + chunk], train[start : start + chunk, :, ::-1]):
            x = flat(images)
            squares = np.square(q).sum(1)[:, None] + np.square(x).sum(1)[None] - 2 * q @ x.T
            index = squares.argmin(1)
            closer = squares.min(1) < best
            best[closer], closest[closer] = squares.min(1)[closer], images[index[closer]]
    # Differences of squares round to more than a small distance is.
    return closest, np.sqrt(np.square(q - flat(closest)).mean(1))


def write_sheet(path: Path, images: np.ndarray) -> None:
    """(N, H, W, C) uint8 in lines of SHEET_SIDE, twice the size."""
    pad = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in pad.reshape(-1, SHEET_SIDE, *pad.shape[1:])], axis=0)
    picture = Image.fromarray(sheet.squeeze())
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    write_atomic(path, lambda p: picture.save(p))


def write_card(
    folder: Path, prior: Prior, train: np.ndarray, heldout: np.ndarray, facts: dict[str, str], before: Prior | None = None
) -> None:
    """Writes README.md, samples.png and neighbours.png into the folder; `facts` become the lines on top.

    `before` is the prior that this one was tuned from, whose errors on the same images and noise stand beside its own.
    """
    levels = {"eps-MSE": eps_mse_by_level(prior.denoise, prior.schedule(), heldout)}
    if before is not None:
        levels[f"of {before.name}, before"] = eps_mse_by_level(before.denoise, before.schedule(), heldout)
    samples = draw_samples(prior)
    write_sheet(folder / "samples.png", samples)
    neighbours, distance = nearest(samples, train)
    unseen = nearest(heldout[: len(samples)], train)[1]
    pairs = np.stack([a.reshape(-1, SHEET_SIDE, *prior.image_shape) for a in (samples, neighbours)], axis=1)
    write_sheet(folder / "neighbours.png", pairs.reshape(-1, *prior.image_shape))
    size = sum(v.size for v in prior.denoise.params.values())
    facts = {
        **facts,
        "parameters": f"{size:,}",
        **_classes(prior.denoise),
        "images": f"{prior.image_shape}, values in [-1, 1]",
        "measured": f"{datetime.date.today()}, {jax.devices()[0].device_kind}, {len(heldout)} held-out images, seeds fixed",
    }
    text = _card(prior, facts, levels, distance, unseen)

    def write(path: Path) -> None:
        path.write_text(shown(text), encoding="utf-8")

    write_atomic(folder / "README.md", write)


def _classes(denoise: Denoiser) -> dict[str, str]:
    """A line of the card on what a conditional network was told."""
    if denoise.config.label_ndim is None:
        return {}
    drawn = f"{denoise.config.num_classes}; an image and a sample are told one each, drawn, all alike likely"
    none = f"none is told, which is label {denoise.null_label}"
    return {"classes": drawn if denoise.null_label is None else none}


def _card(
    prior: Prior, facts: dict[str, str], levels: dict[str, dict[int, float]], samples: np.ndarray, unseen: np.ndarray
) -> str:
    """The card's text; `samples` and `unseen` (held-out images) are distances to the nearest training images."""
    timesteps = levels["eps-MSE"]
    summary = lambda d: f"{d.min():.3f} | {np.median(d):.3f} | {d.max():.3f}"
    lines = [
        f"# Prior {prior.name}",
        "",
        *[f"- **{name}**: {value}" for name, value in facts.items()],
        "",
        "Held-out eps-MSE at timestep t (predicting 0 costs 1; lower is better):",
        "",
        "| t | " + " | ".join(map(str, timesteps)) + " |",
        "|---" * (len(timesteps) + 1) + "|",
        *[f"| {name} | " + " | ".join(f"{v:.4f}" for v in row.values()) + " |" for name, row in levels.items()],
        "",
        f"Unguided samples, seeds 0 to {SHEET_SIDE**2 - 1}, {min(SHEET_STEPS, len(prior.betas))} steps, none left out:",
        "",
        "![samples](samples.png)",
        "",
        "Distance to the nearest training image, mirror images included (root mean square difference of values in [0, 1]).",
        "Copies would lie much closer than images that the prior has never seen:",
        "",
        "| | least | median | greatest |",
        "|---|---|---|---|",
        f"| {len(samples)} samples | {summary(samples)} |",
        f"| {len(unseen)} held-out images | {summary(unseen)} |",
        "",
        "`neighbours.png`, beside this file where the card is made, shows each line of samples above its nearest training",
        "images; it is not published with the weights, because those images are not ours to publish.",
        "",
    ]
    return "\n".join(lines)


def make_card(settings: PriorCard) -> str:
    """Measures a prior and writes its card into `settings.out`.

    Returns:
      The text of the card.

    Raises:
      ConfigError: where prior or images cannot be read or do not fit each other; nothing is written.
    """
    settings.check()
    try:
        prior = load_prior(settings.prior)
        parts = load_split(settings.data, prior.image_shape[0], settings.heldout, prior.image_shape[-1])
        train, heldout = (part.images for part in parts)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    shape = heldout.shape[1:]
    need(shape == prior.image_shape, f"--data {settings.data}: images are {shape}, the prior takes {prior.image_shape}")
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_card(out, prior, train, heldout, {"weights": f"sha256 {prior.sha256}", "data": settings.data})
    return (out / "README.md").read_text(encoding="utf-8")
