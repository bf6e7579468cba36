"""How well private images come back from their gradients, over a grid of noise levels, victims and methods.

    python experiments/sweep.py --sigma_grid                  the default grid with the bundled prior and images
    python experiments/sweep.py --sigma_grid=0,1e-3,1e-2 --victims=lenet --methods=dsg --images=FOLDER --label=0

The output folder receives every trial's record, image and trace, a table, a plot of quality over sigma and a contact
sheet. A sweep that was killed goes on where it stopped when the same command is given again.
The attacker modelled here knows the victim's weights and loss, the label, and a public diffusion prior.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import gdiff_jax as gd
from experiments import cli, memory, report, trials, victim_files
from experiments.cli import ConfigError, option
from experiments.records import Row, Store
from gdiff_jax import images as image_files
from gdiff_jax import modules
from gdiff_jax.metrics import psnr_from_error
from gdiff_jax.priors import BUNDLED

DEFAULT_SIGMAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    sigma_grid: tuple[float, ...] = option(
        DEFAULT_SIGMAS, "standard deviations of the Gaussian noise on the gradient; without a value the default grid", bare=True
    )
    methods: tuple[str, ...] = option(trials.GUIDED, f"guided samplers: {', '.join(trials.GUIDED)}; prior-only always runs")
    victims: tuple[str, ...] = option(("mlp", "lenet", "cnn"), f"attacked networks: {', '.join(victim_files.VICTIMS)}")
    training_steps: tuple[int, ...] = option((0,), "training states of each victim, in steps; 0 is untrained")
    checkpoints: str = option("", "folder of experiments/train_victim.py, for training states other than 0")
    images: str = option(image_files.BUNDLED, "private images: the bundled set, a folder, a .npz or CIFAR-10's archive")
    num_images: int = option(4, "the first so many images of the set")
    label: int = option(-1, "label of every image; -1 takes the set's own, and 0 where it has none, as the paper does")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")
    seeds: int = option(1, "trials an image, each with noise, start and steps of its own")
    seed: int = option(0, "of the victims' initial weights and of all random numbers of the trials")
    steps: int = option(100, "reverse steps, at most as many as the prior was trained with")
    spacing: str = option(
        "quadratic", "of the steps over the prior's: quadratic (denser where there is little noise) or uniform"
    )
    zeta: float = option(8.0, "step size of dps, on the un-squared gradient distance")
    guidance_rate: float = option(0.2, "guidance rate of dsg, 0 to 1")
    interval: int = option(1, "dsg guides every so many steps")
    clip: str = option("prior", "clip x0hat to [-1, 1] in every step: yes, no, or what the prior's scheduler says")
    prior: str = option("cifar10-32", f"diffusion prior: {', '.join(BUNDLED)}, a folder, OWNER/NAME on the hub, or an ADM file")
    prior_dtype: str = option("float32", "arithmetic of the prior: float32 or bfloat16; the victim is always float32")
    prior_remat: bool = option(False, "compute the prior's inner values twice, keep only its blocks' inputs")
    batch: int = option(8, "trials computed at a time, fewer where --memory_gib is too little for so many")
    memory_gib: float = option(0.0, "memory for the trials and weights in GiB; 0: all that the device has, 3/4 of it on a CPU")
    out: str = option("runs/sweep", "output folder")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that a configuration names, loaded and checked; nothing has been compiled or written."""

    prior: gd.Prior
    schedule: gd.Schedule
    images: np.ndarray  # (N, H, W, C) in [-1, 1]
    labels: np.ndarray
    names: tuple[str, ...]
    victims: dict[str, gd.Victim]
    params: dict[tuple[str, int], Any]  # by victim and training steps
    hashes: dict[str, Any]


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _check_numbers(c: SweepConfig) -> None:
    _need(len(c.sigma_grid) > 0, "--sigma_grid is empty; give standard deviations such as 0,1e-3,1e-2")
    for sigma in c.sigma_grid:
        _need(math.isfinite(sigma) and sigma >= 0, f"--sigma_grid holds {sigma}; a standard deviation is finite and >= 0")
    for name in ("sigma_grid", "methods", "victims", "training_steps"):
        values = getattr(c, name)
        _need(
            len(set(values)) == len(values) > 0, f"--{name} {','.join(map(str, values))!r} must be non-empty, without repeats"
        )
    for method in c.methods:
        _need(method in trials.GUIDED, f"method {method!r} is not known; known: {', '.join(trials.GUIDED)}")
    for name in ("num_images", "seeds", "steps", "interval", "batch", "num_classes"):
        _need(getattr(c, name) >= 1, f"--{name} {getattr(c, name)} must be at least 1")
    _need(min(c.training_steps) >= 0, f"--training_steps {min(c.training_steps)} must not be negative; 0 is untrained")
    _need(math.isfinite(c.zeta) and c.zeta >= 0, f"--zeta {c.zeta} must be finite and >= 0; 0 is unguided")
    _need(0 <= c.guidance_rate <= 1, f"--guidance_rate {c.guidance_rate} must lie in 0..1")
    _need(c.spacing in ("uniform", "quadratic"), f"--spacing {c.spacing} is not known; use uniform or quadratic")
    _need(c.clip in ("prior", "yes", "no"), f"--clip {c.clip} is not known; use prior, yes or no")
    _need(math.isfinite(c.memory_gib) and c.memory_gib >= 0, f"--memory_gib {c.memory_gib} must be finite and >= 0")
    _need(c.prior_dtype in ("float32", "bfloat16"), f"--prior_dtype {c.prior_dtype} is not known; use float32 or bfloat16")


def _load_images(c: SweepConfig, shape: tuple[int, int, int]) -> image_files.ImageSet:
    try:
        data = image_files.load_images(c.images, "test", size=shape[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--images: {error}") from None
    _need(
        data.images.shape[1:] == shape,
        f"--images {c.images}: images are {data.images.shape[1:]}, prior {c.prior} takes {shape}; "
        "use images of that shape or another --prior",
    )
    _need(c.num_images <= len(data), f"--num_images {c.num_images}: {c.images} holds {len(data)}; ask for fewer")
    data = data.take(slice(0, c.num_images))
    if c.label >= 0:
        data = dataclasses.replace(data, labels=np.full(len(data), c.label, np.int32))
    if data.labels is None:
        print(f"{c.images} has no labels; every image gets label 0 (--label gives another, sub-folders give classes)")
        data = dataclasses.replace(data, labels=np.zeros(len(data), np.int32))
    for name, label in zip(data.names, data.labels.tolist(), strict=True):
        ok = 0 <= label < c.num_classes
        _need(ok, f"label {label} of {name} is outside 0..{c.num_classes - 1}; change --label or --num_classes")
    return data


def load_inputs(c: SweepConfig) -> Inputs:
    """Loads and checks what `c` names.

    Raises:
      ConfigError: with the value and the remedy, for the first thing that cannot be used.
    """
    _check_numbers(c)
    try:
        prior = gd.load_prior(c.prior, c.prior_dtype, remat=c.prior_remat)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prior: {error}") from None
    _need(c.steps <= len(prior.betas), f"--steps {c.steps}: prior {c.prior} was trained with {len(prior.betas)}; ask for fewer")
    data = _load_images(c, prior.image_shape)
    victims, params, trained = {}, {}, {}
    for name in c.victims:
        victims[name] = victim_files.make_victim(name, prior.image_shape, c.num_classes)
    for name, victim in victims.items():
        for steps in c.training_steps:
            if steps:
                params[name, steps], _ = victim_files.load(c.checkpoints, name, steps, victim)
                trained[f"{name}/{steps}"] = modules.digest(params[name, steps])
            else:
                params[name, steps] = victim_files.init_params(name, victim, c.seed)
    if c.clip != "prior":
        prior = dataclasses.replace(prior, clip=c.clip == "yes")
    hashes = {
        "prior": prior.sha256,
        "prior_settings": prior.settings_sha256,
        "prior_revision": prior.revision,
        "images": data.sha256,
        "trained_victims": trained,
    }
    images = image_files.to_model(data.images)
    schedule = prior.schedule(c.steps, c.spacing)
    return Inputs(prior, schedule, images, data.labels, data.names, victims, params, hashes)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled group of trials: `run` takes `size` of them at a time."""

    run: Any
    size: int


def arguments(c: SweepConfig, inputs: Inputs, chunk: list[trials.Trial]) -> tuple[Any, ...]:
    """What the compiled program of the chunk's group takes for these trials."""
    group = chunk[0].group
    index = np.array([t.image for t in chunk])
    return (
        inputs.prior.denoise,
        inputs.schedule,
        inputs.params.get((group.victim, group.training_steps)),
        jnp.float32(c.guidance_rate if group.method == "dsg" else c.zeta),
        trials.trial_keys(c.seed, chunk),
        jnp.array([t.sigma for t in chunk], jnp.float32),
        jnp.asarray(inputs.images[index]),
        jnp.asarray(inputs.labels[index]),
    )


def compile_program(c: SweepConfig, inputs: Inputs, trial: trials.Trial) -> Program:
    """Compiles the group of `trial`, for --batch trials at a time or as many as the memory holds."""
    group = trial.group
    loss = inputs.victims[group.victim].loss if group.victim else None
    runner = trials.make_runner(group.method, loss, inputs.prior.image_shape, c.interval, inputs.prior.clip)
    compile_for = lambda n: runner.lower(*arguments(c, inputs, [trial] * n)).compile()
    size, run = memory.fit(compile_for, c.batch, memory.budget(c.memory_gib), f"{group.method} {group.victim}".strip())
    return Program(run, size)


def run_chunk(
    c: SweepConfig, inputs: Inputs, program: Program, chunk: list[trials.Trial]
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows and arrays of a chunk; the last trial is repeated to fill the compiled shape and the copies are dropped."""
    group, count = chunk[0].group, len(chunk)
    started, parts = time.time(), []
    for start in range(0, count, program.size):
        piece = chunk[start : start + program.size]
        full = piece + [piece[-1]] * (program.size - len(piece))
        parts.append(jax.device_get(program.run(*arguments(c, inputs, full))))
    result = jax.tree.map(lambda *a: np.concatenate(a)[:count], *parts)
    seconds = time.time() - started
    trace = result["trace"]
    psnr = np.asarray(psnr_from_error(trace["x0_error"]))
    rows = []
    for j, trial in enumerate(chunk):
        guided = np.isfinite(trace["distance"][j])
        # Iterates an attacker could pick (least distance to the leak) and could not (closest to the truth), kept apart.
        picked = int(np.nanargmin(trace["distance"][j])) if guided.any() else -1
        rows.append(
            {
                **dataclasses.asdict(group),
                "sigma": trial.sigma,
                "image": trial.image,
                "name": inputs.names[trial.image],
                "label": int(inputs.labels[trial.image]),
                "seed": trial.seed,
                **{k: float(v[j]) for k, v in result["scalars"].items()},
                "least_step_distance": float(trace["distance"][j, picked]) if picked >= 0 else None,
                "psnr_at_least_distance": float(psnr[j, picked]) if picked >= 0 else None,
                "psnr_of_best_step": float(psnr[j].max()),
                "failed": not bool(np.isfinite(result["image"][j]).all()),
                "seconds": round(seconds / count, 3),
                "row": j,
            }
        )
    return rows, {"images": result["image"], **{f"trace_{k}": v for k, v in trace.items()}}


def sweep(c: SweepConfig, inputs: Inputs, store: Store) -> None:
    """Runs what is not done yet, chunk by chunk, then writes records, table, plot and contact sheet."""
    grid = trials.make_grid(c.methods, c.victims, c.training_steps, c.sigma_grid, c.num_images, c.seeds)
    chunks = trials.chunks(grid, c.batch)
    todo = [k for k in range(len(chunks)) if not store.is_done(k)]
    store.open()
    total = sum(map(len, chunks))
    left = sum(len(chunks[k]) for k in todo)
    print(
        f"{total} trials, {total - left} done before, on {jax.device_count()} {jax.devices()[0].device_kind}; output in {c.out}"
    )
    first: dict[tuple[str, str], trials.Trial] = {}
    for trial in (chunks[k][0] for k in todo):
        first.setdefault((trial.group.method, trial.group.victim), trial)
    programs = {}
    with tqdm(first.items(), unit="program", disable=not left) as bar:
        for name, trial in bar:  # all before the first trial runs: what does not fit is known at once
            bar.set_description(f"compiling {' '.join(name).strip()}")
            programs[name] = compile_program(c, inputs, trial)
    for name, program in programs.items():
        if program.size < c.batch:
            print(f"{' '.join(name).strip()}: {program.size} trials at a time fit, not {c.batch}")
    with tqdm(total=total, initial=total - left, unit="trial", smoothing=0.1, disable=not left) as bar:
        for k in todo:
            group = chunks[k][0].group
            bar.set_description(f"{group.method} {group.victim}".strip())
            rows, arrays = run_chunk(c, inputs, programs[group.method, group.victim], chunks[k])
            store.save(k, [{"chunk": k, **row} for row in rows], arrays)
            bar.update(len(rows))
    rows = store.rows(range(len(chunks)))
    store.write_records(rows)
    report.write(c, inputs, rows, store)


def main() -> None:
    c: SweepConfig = cli.read_flags(SweepConfig)
    inputs = load_inputs(c)
    identity = {k: v for k, v in dataclasses.asdict(c).items() if k not in ("out", "checkpoints", "memory_gib")}
    sweep(c, inputs, Store(Path(c.out), {**identity, "sha256": inputs.hashes}))


if __name__ == "__main__":
    cli.define_flags(SweepConfig)
    cli.run(main)
