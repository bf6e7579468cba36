"""How well private images come back from their gradients, over a grid of noise levels, victims and methods.

    python experiments/sweep.py --sigma_grid                  the default grid with the bundled prior and images
    python experiments/sweep.py --sigma_grid=0,1e-3,1e-2 --victims=lenet --methods=dsg --images=FOLDER --label=0
    python experiments/sweep.py --epsilon_grid=1,10,100 --mechanisms=clip:1+gaussian
    python experiments/sweep.py --methods=all --attacker=server        every attack, by one who must infer the labels
    python experiments/sweep.py --group=4                              four images in one gradient

The output folder receives every trial's record, image and trace, a table, a plot of quality over sigma and a contact
sheet. A sweep that was killed goes on where it stopped when the same command is given again.
What the attacker knows is said by --attacker and printed with the results.
"""

from __future__ import annotations

import dataclasses
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

from experiments import cli, memory, report, trials
from experiments.attackers import ATTACKERS, with_attacker
from experiments.inputs import Inputs, SweepConfig, for_victims, load_inputs
from experiments.methods import METHODS
from experiments.records import Row, Store
from gdiff_jax.metrics import psnr_from_error


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled group of trials: `run` takes `size` of them at a time, in so many bytes."""

    run: Any
    size: int
    memory: int


def arguments(c: SweepConfig, inputs: Inputs, chunk: list[trials.Trial]) -> tuple[Any, ...]:
    """What the compiled program of the chunk's group takes for these trials."""
    group = chunk[0].group
    index = np.array([t.image for t in chunk])[:, None] + np.arange(c.group)
    strength = 0.0 if group.method == trials.PRIOR_ONLY else METHODS[group.method].strength(c)
    return (
        inputs.prior.denoise,
        inputs.schedule,
        inputs.params.get((group.victim, group.training_steps)),
        jnp.asarray(inputs.proxy),
        jnp.float32(strength),
        trials.trial_keys(c.seed, chunk),
        jnp.array([t.sigma for t in chunk], jnp.float32),
        jnp.asarray(inputs.images[index]),
        jnp.asarray(inputs.labels[index]),
    )


def compile_program(c: SweepConfig, inputs: Inputs, trial: trials.Trial) -> Program:
    """Compiles the group of `trial`, for --batch trials at a time or as many as the memory holds."""
    group = trial.group
    victim, spec = inputs.victims.get(group.victim), inputs.mechanisms.get(group.mechanism)
    runner = trials.make_runner(group.method, inputs, victim, spec, c)
    compile_for = lambda n: runner.lower(*arguments(c, inputs, [trial] * n)).compile()
    size, run = memory.fit(compile_for, c.batch, memory.budget(c.memory_gib), group.title)
    return Program(run, size, memory.needed(run))


def run_chunk(
    c: SweepConfig, inputs: Inputs, program: Program, chunk: list[trials.Trial]
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows and arrays of a chunk; the last trial is repeated to fill the compiled shape and the copies are dropped.

    A row is of one image; those of one leak follow each other and share their trial's trace.
    """
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
    knows = {name: getattr(c, name) for name in ("attacker", "labels", "adaptive", "local_rate", "statistics")}
    rows = []
    for j, trial in enumerate(chunk):
        # Iterates an attacker could pick (least distance to the leak) and could not (closest to the truth), kept apart.
        # Of several images the trace has no error: which is which is settled at the end.
        scored = np.isfinite(trace["distance"][j]) & np.isfinite(psnr[j])
        distance = np.where(scored, trace["distance"][j], np.inf)
        picked = int(distance.argmin()) if scored.any() else -1
        for place in range(c.group):
            image = trial.image + place
            rows.append(
                {
                    **dataclasses.asdict(group),
                    "sigma": trial.sigma,
                    "image": image,
                    "name": inputs.names[image],
                    "label": int(inputs.labels[image]),
                    "seed": trial.seed,
                    **{k: float(v[j]) for k, v in result["scalars"].items()},
                    **{k: float(v[j, place]) for k, v in result["metrics"].items()},
                    "least_step_distance": float(distance[picked]) if picked >= 0 else None,
                    "psnr_at_least_distance": float(psnr[j, picked]) if picked >= 0 else None,
                    "psnr_of_best_step": float(np.nanmax(psnr[j])) if np.isfinite(psnr[j]).any() else None,
                    **knows,
                    "failed": not bool(np.isfinite(result["image"][j, place]).all()),
                    "seconds": round(seconds / count, 4),
                    "memory_mib": round(program.memory / program.size / 2**20, 1),
                    "row": j * c.group + place,
                    "trial": j,
                }
            )
    images = result["image"].reshape(-1, *result["image"].shape[2:])
    return rows, {"images": images, **{f"trace_{k}": v for k, v in trace.items()}}


def sweep(c: SweepConfig, inputs: Inputs, store: Store, quiet: bool = False) -> list[Row]:
    """Runs what is not done yet, chunk by chunk, then writes records, table, plot and contact sheet.

    Returns all rows; `quiet` leaves the table to the files.
    """
    chunks = trials.chunks(trials.make_grid(c, inputs), c.batch)
    todo = [k for k in range(len(chunks)) if not store.is_done(k)]
    store.open()
    total = sum(map(len, chunks))
    left = sum(len(chunks[k]) for k in todo)
    print(
        f"{total} trials, {total - left} done before, on {jax.device_count()} {jax.devices()[0].device_kind}; output in {c.out}"
    )
    first: dict[str, trials.Trial] = {}
    for trial in (chunks[k][0] for k in todo):
        first.setdefault(trial.group.title, trial)
    programs = {}
    with tqdm(first.items(), unit="program", disable=not left) as bar:
        for name, trial in bar:  # all before the first trial runs: what does not fit is known at once
            bar.set_description(f"compiling {name}")
            programs[name] = compile_program(c, inputs, trial)
    for name, program in programs.items():
        if program.size < c.batch:
            print(f"{name}: {program.size} trials at a time fit, not {c.batch}")
    with tqdm(total=total, initial=total - left, unit="trial", smoothing=0.1, disable=not left) as bar:
        for k in todo:
            title = chunks[k][0].group.title
            bar.set_description(title)
            rows, arrays = run_chunk(c, inputs, programs[title], chunks[k])
            store.save(k, [{"chunk": k, **row} for row in rows], arrays)
            bar.update(len(chunks[k]))
    rows = store.rows(range(len(chunks)))
    store.write_records(rows)
    report.write(c, inputs, rows, store, quiet)
    return rows


def identity(c: SweepConfig, inputs: Inputs) -> dict[str, Any]:
    """Everything that decides the results of a sweep."""
    given = {k: v for k, v in dataclasses.asdict(c).items() if k not in ("out", "checkpoints", "memory_gib")}
    return {**given, "sha256": inputs.hashes}


def main() -> None:
    c: SweepConfig = cli.read_flags(SweepConfig)
    if c.epsilon_grid and not cli.given("sigma_grid"):
        c = dataclasses.replace(c, sigma_grid=())
    if c.attacker in ATTACKERS:
        c = with_attacker(c, {field.name for field in dataclasses.fields(c) if cli.given(field.name)})
    c = for_victims(c)
    inputs = load_inputs(c)
    sweep(c, inputs, Store(Path(c.out), identity(c, inputs)))


if __name__ == "__main__":
    cli.define_flags(SweepConfig)
    cli.run(main)
