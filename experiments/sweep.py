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
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from experiments import cli, memory, processes, trials
from experiments.attackers import ATTACKERS, with_attacker
from experiments.cli import ConfigError
from experiments.inputs import Inputs, SweepConfig, for_victims, load_inputs
from experiments.methods import METHODS
from experiments.processes import Processes
from experiments.records import Row, Store, strict_json
from gdiff_jax import parallel
from gdiff_jax.metrics import psnr_from_error


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled group of trials: `run` takes `size` of them a device of the mesh at a time, in so many bytes a device."""

    run: Any
    size: int
    memory: int
    mesh: Mesh

    @property
    def at_a_time(self) -> int:
        return self.size * self.mesh.size


def common_arguments(c: SweepConfig, inputs: Inputs, mesh: Mesh, group: trials.Group) -> tuple[Any, ...]:
    """What the compiled program of the group takes for all of its trials, on every device."""
    strength = 0.0 if group.method == trials.PRIOR_ONLY else METHODS[group.method].strength(c)
    params = inputs.params.get((group.victim, group.training_steps))
    common = (inputs.prior.denoise, inputs.schedule, params, jnp.asarray(inputs.proxy), jnp.float32(strength), inputs.leak)
    return parallel.replicate(common, mesh)


def own_arguments(c: SweepConfig, inputs: Inputs, mesh: Mesh, batch: list[trials.Trial]) -> tuple[Any, ...]:
    """What it takes for each of these trials, divided over the devices."""
    index = np.array([t.image for t in batch])[:, None] + np.arange(c.group)
    own = (
        trials.trial_keys(c.seed, batch),
        jnp.array([t.sigma for t in batch], jnp.float32),
        jnp.asarray(inputs.images[index]),
        jnp.asarray(inputs.labels[index]),
    )
    return parallel.divide(own, mesh)


def compile_program(c: SweepConfig, inputs: Inputs, mesh: Mesh, trial: trials.Trial, most: int) -> Program:
    """Compiles the group of `trial`, for `most` trials at a time or as many as the memory holds.

    The devices of a CPU share its memory: where one trial on each does not fit, half of them are used.
    """
    group = trial.group
    victim, spec = inputs.victims.get(group.victim), inputs.mechanisms.get(group.mechanism)
    runner = trials.make_runner(group.method, inputs, victim, spec, c, mesh)
    common = common_arguments(c, inputs, mesh, group)
    compile_for = lambda n: runner.lower(*common, *own_arguments(c, inputs, mesh, [trial] * n * mesh.size)).compile()
    try:
        size, run = memory.fit(compile_for, -(-most // mesh.size), memory.budget(c.memory_gib, mesh), group.title)
    except ConfigError:
        if not memory.is_shared(mesh) or mesh.size == 1:
            raise
        return compile_program(c, inputs, parallel.trial_mesh(mesh.devices[: mesh.size // 2]), trial, most)
    if size * mesh.size < most and processes.is_first():
        tqdm.write(f"{group.title}: {size * mesh.size} trials at a time fit, not {most}")
    return Program(run, size, memory.needed(run), mesh)


def cut(tree: Any, part: slice) -> Any:
    """That part of each array of a pytree."""
    return jax.tree.map(lambda a: a[part], tree)


def compute(
    c: SweepConfig, inputs: Inputs, program: Program, chunks: dict[int, list[trials.Trial]]
) -> Iterator[tuple[int, list[Row], dict[str, np.ndarray]]]:
    """Number, rows and arrays of each of the chunks, which are of one group, as soon as its trials are done.

    The devices are filled from as many chunks as they hold; where none is left, the last trial is repeated and its copies are
    dropped.
    """
    everything = [trial for chunk in chunks.values() for trial in chunk]
    width = program.at_a_time
    common = common_arguments(c, inputs, program.mesh, everything[0].group)
    waiting, held, seconds = list(chunks), None, np.zeros(0)
    for start in range(0, len(everything), width):
        batch = everything[start : start + width]
        started = time.time()
        full = batch + [batch[-1]] * (width - len(batch))
        result = jax.device_get(program.run(*common, *own_arguments(c, inputs, program.mesh, full)))
        seconds = np.append(seconds, [(time.time() - started) / len(batch)] * len(batch))
        result = cut(result, slice(0, len(batch)))
        held = result if held is None else jax.tree.map(lambda *a: np.concatenate(a), held, result)
        while waiting and len(chunks[waiting[0]]) <= len(seconds):
            k = waiting.pop(0)
            n = len(chunks[k])
            yield k, *describe(c, inputs, program, chunks[k], cut(held, slice(0, n)), seconds[:n])
            held, seconds = cut(held, slice(n, None)), seconds[n:]


def describe(
    c: SweepConfig, inputs: Inputs, program: Program, chunk: list[trials.Trial], result: dict[str, Any], seconds: np.ndarray
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows and arrays of a chunk. A row is of one image; those of one leak follow each other and share their trace."""
    group = chunk[0].group
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
                    "seconds": round(float(seconds[j]), 4),
                    "memory_mib": round(program.memory / program.size / 2**20, 1),
                    "row": j * c.group + place,
                    "trial": j,
                }
            )
    images = result["image"].reshape(-1, *result["image"].shape[2:])
    return rows, {"images": images, **{f"trace_{k}": v for k, v in trace.items()}}


def sweep(c: SweepConfig, inputs: Inputs, store: Store, quiet: bool = False, mesh: Mesh | None = None) -> list[Row]:
    """Runs the trials, then writes records, table, plot and contact sheet.

    Several processes share the work; the first writes what is said of the whole.
    Returns all rows; `quiet` leaves the table to the files; `mesh` is of the devices to use, all of this process if None.
    """
    rows = run_trials(c, inputs, store, mesh)
    if processes.is_first():
        from experiments import report  # not at the start, which need not wait a second for matplotlib

        store.write_records(rows)
        report.write(c, inputs, rows, store, quiet)
    return rows


def run_trials(c: SweepConfig, inputs: Inputs, store: Store, mesh: Mesh | None = None) -> list[Row]:
    """Runs what is not done yet, chunk by chunk, and returns the rows of all trials."""
    mesh, first = mesh or parallel.trial_mesh(), processes.is_first()
    chunks = trials.chunks(trials.make_grid(c, inputs), c.batch)
    todo = [k for k in range(len(chunks)) if not store.is_done(k)]
    damaged = [k for k in todo if store.exists(k)]
    mine = processes.share(store, todo, hashlib.sha256(strict_json(store.identity).encode()).digest())
    total, left = sum(map(len, chunks)), sum(len(chunks[k]) for k in todo)
    say = print if first else lambda *_: None
    where = f"{jax.device_count()} {mesh.devices[0].device_kind}"
    where += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(f"{total} trials, {total - left} done before, on {where}; output in {c.out}")
    if damaged:
        some = ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else "")
        say(f"computed again, because damaged or of another version: {len(damaged)} chunks ({some})")
    # As many as are in a chunk, not as many as are left: what is computed at a time must not depend on an earlier kill.
    most = max(map(len, chunks))
    share = sum(len(chunks[k]) for k in mine)
    compiler = ThreadPoolExecutor(1)
    with tqdm(total=share, unit="trial", smoothing=0.1, disable=not share or not first) as bar:
        try:
            programs = compile_ahead(compiler, c, inputs, mesh, [chunks[k][0] for k in mine], most)
            for group, numbers in itertools.groupby(mine, key=lambda k: chunks[k][0].group):
                # The prior alone runs while the attacks compile. They are timed: nothing compiles beside them, and what does
                # not fit is known before the first of them.
                for name in [group.title] if group.method == trials.PRIOR_ONLY else programs:
                    if not programs[name].done():
                        bar.set_description(f"compiling {name}")
                    programs[name].result()
                bar.set_description(group.title)
                for k, rows, arrays in compute(c, inputs, programs[group.title].result(), {k: chunks[k] for k in numbers}):
                    store.save(k, [{"chunk": k, **row} for row in rows], arrays)
                    bar.update(len(chunks[k]))
        finally:
            compiler.shutdown(wait=False, cancel_futures=True)
    if jax.process_count() > 1:
        processes.wait_for_all(store, len(chunks))
    return store.rows(range(len(chunks)))


def compile_ahead(
    compiler: Executor, c: SweepConfig, inputs: Inputs, mesh: Mesh, some: list[trials.Trial], most: int
) -> dict[str, Future[Program]]:
    """The programs of these trials by title, compiled one after the other in their order."""
    kinds: dict[str, trials.Trial] = {}
    for trial in some:
        kinds.setdefault(trial.group.title, trial)
    return {name: compiler.submit(compile_program, c, inputs, mesh, trial, most) for name, trial in kinds.items()}


def identity(c: SweepConfig, inputs: Inputs) -> dict[str, Any]:
    """Everything that decides the results of a sweep."""
    given = {k: v for k, v in dataclasses.asdict(c).items() if k not in ("out", "checkpoints", "memory_gib")}
    return {**given, "sha256": inputs.hashes}


def main() -> None:
    parallel.use_every_core()
    processes.join(cli.read_flags(Processes))
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
    cli.define_flags(Processes)
    cli.run(main)
