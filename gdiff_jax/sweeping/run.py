"""The engine: runs the trials of a plan that are not done yet, chunk by chunk, over devices and processes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gdiff_jax import numerics, parallel
from gdiff_jax.auto import Auto
from gdiff_jax.errors import ConfigError
from gdiff_jax.methods import Outcome
from gdiff_jax.metrics import expectation_metrics, psnr_from_error
from gdiff_jax.sweeping import memory, processes, trials
from gdiff_jax.sweeping.plan import PRIOR_ONLY, Plan
from gdiff_jax.sweeping.records import MemoryStore, Row, Store, strict_json
from gdiff_jax.sweeping.solving import Solver
from gdiff_jax.sweeping.trials import Group, Trial

Chunks = dict[int, list[Trial]]  # by number


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled group of trials: `run` takes `size` of them a device of the mesh at a time, in so many bytes a device.

    A `Solver` compiles what it needs as it goes on; its `memory` is 0 here, and it says itself what a trial took.
    """

    run: Any
    size: int
    memory: int
    mesh: Mesh

    @property
    def at_a_time(self) -> int:
        return self.size * self.mesh.size

    @property
    def bytes_per_trial(self) -> float:
        return self.run.bytes_per_trial if isinstance(self.run, Solver) else self.memory / self.size


def compile_program(plan: Plan, mesh: Mesh, trial: Trial, most: int, memory_gib: float = 0.0) -> Program:
    """Compiles the group of `trial`, for `most` trials at a time or as many as the memory holds.

    The devices of a CPU share its memory: where one trial on each does not fit, half of them are used.
    """
    group = trial.group
    if isinstance(plan.methods.get(group.method), Auto):
        return _solver(plan, mesh, group, most, memory_gib)
    runner = trials.make_runner(plan, group, mesh)
    shared = parallel.replicate(trials.shared_arguments(plan, group), mesh)
    own = lambda n: parallel.divide(trials.own_arguments(plan, [trial] * n * mesh.size), mesh)
    try:
        limit = memory.budget(memory_gib, mesh)
        compile_for = lambda n: parallel.compiled(runner.lower(shared, own(n)), mesh)
        size, run = memory.fit(compile_for, -(-most // mesh.size), limit, group.title)
    except ConfigError:
        if not memory.is_shared(mesh) or mesh.size == 1:
            raise
        half = parallel.trial_mesh(list(mesh.devices[: mesh.size // 2]))
        return compile_program(plan, half, trial, most, memory_gib)
    if size * mesh.size < most and processes.is_first():
        tqdm.write(f"{group.title}: {size * mesh.size} trials at a time fit, not {most}")
    return Program(run, size, memory.needed(run), mesh)


def _solver(plan: Plan, mesh: Mesh, group: Group, most: int, memory_gib: float) -> Program:
    """Of `Auto`, which compiles its search when a trial is first left unsolved; its memory is not known before."""
    most = -(-most // mesh.size)
    fit = lambda compile_for: memory.fit(compile_for, most, memory.budget(memory_gib, mesh), group.title)
    return Program(Solver(plan, group, mesh, fit, most), most, 0, mesh)


def _cut(tree: Any, part: slice) -> Any:
    """That part of each array of a pytree."""
    return jax.tree.map(lambda a: a[part], tree)


def compute(plan: Plan, program: Program, chunks: Chunks) -> Iterator[tuple[int, list[Row], dict[str, np.ndarray]]]:
    """Number, rows and arrays of each of the chunks, which are of one group, as soon as its trials are done.

    The devices are filled from as many chunks as they hold; where none is left, the last trial is repeated and its copies are
    dropped.
    """
    everything = [trial for chunk in chunks.values() for trial in chunk]
    width = program.at_a_time
    shared = parallel.replicate(trials.shared_arguments(plan, everything[0].group), program.mesh)
    first_alone = isinstance(program.run, Solver) and len(chunks) > 1 and len(next(iter(chunks.values()))) == 1
    waiting, held, seconds, start = list(chunks), None, np.zeros(0), 0
    while start < len(everything):
        started = time.time()
        alone = start == 0 and first_alone and program.run.solves(shared, everything[0])
        batch = everything[start : start + (1 if alone else width)]
        start += len(batch)
        result = _results(plan, program, shared, batch)
        seconds = np.append(seconds, [(time.time() - started) / len(batch)] * len(batch))
        held = result if held is None else jax.tree.map(lambda *a: np.concatenate(a), held, result)
        while waiting and len(chunks[waiting[0]]) <= len(seconds):
            k = waiting.pop(0)
            n = len(chunks[k])
            yield k, *describe(plan, program, chunks[k], _cut(held, slice(0, n)), seconds[:n])
            held, seconds = _cut(held, slice(n, None)), seconds[n:]


def _results(plan: Plan, program: Program, shared: Any, batch: list[Trial]) -> dict[str, Any]:
    """Of these trials: a `Solver` takes any number of them, a program as many as it was compiled for."""
    if isinstance(program.run, Solver):
        return program.run(shared, trials.own_arguments(plan, batch))
    full = batch + [batch[-1]] * (program.at_a_time - len(batch))
    own = parallel.divide(trials.own_arguments(plan, full), program.mesh)
    return _cut(jax.device_get(program.run(shared, own)), slice(0, len(batch)))


def describe(
    plan: Plan, program: Program, chunk: list[Trial], result: dict[str, Any], seconds: np.ndarray
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows and arrays of a chunk. A row is of one image; those of one leak follow each other and share their trace."""
    trace = result["trace"]
    psnr = np.asarray(psnr_from_error(trace["x0_error"]))
    known = {"attacker": plan.attacker.attacker, **dataclasses.asdict(plan.attacker.knowledge)}
    rows = []
    for j, trial in enumerate(chunk):
        scalars = {k: float(v[j]) for k, v in result["scalars"].items()}
        outcome = Outcome(int(scalars.pop("outcome"))).name.lower() if "outcome" in scalars else None
        picks = _picks(trace["distance"][j], psnr[j])
        for place in range(plan.client.group):
            image = trial.image + place
            found = result["image"][j, place]
            failed = not bool(np.isfinite(found).all())
            rows.append(
                {
                    **dataclasses.asdict(trial.group),
                    "sigma": trial.sigma,
                    "image": image,
                    "name": plan.names[image],
                    "label": _plain(plan.labels, image),
                    "seed": trial.seed,
                    **scalars,
                    **{k: float(v[j, place]) for k, v in result["metrics"].items()},
                    **expectation_metrics(found, plan.images[image], result["deviation"][j, place]),
                    **picks,
                    **known,
                    "failed": failed,
                    "outcome": outcome or (Outcome.NOT_FINITE if failed else Outcome.FINISHED).name.lower(),
                    "seconds": round(float(seconds[j]), 4),
                    "memory_mib": round(program.bytes_per_trial / 2**20, 1),
                    "row": j * plan.client.group + place,
                    "trial": j,
                    **({"how": str(result["how"][j])} if "how" in result else {}),
                }
            )
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    maps = {"deviations": flat(result["deviation"])} if np.isfinite(result["deviation"]).any() else {}
    return rows, {"images": flat(result["image"]), **maps, **{f"trace_{k}": v for k, v in trace.items()}}


def _picks(distance: np.ndarray, psnr: np.ndarray) -> dict[str, float | None]:
    """Iterates that an attacker could pick (least distance to the leak) and could not (closest to the truth), kept apart.

    Of several images the trace has no error: which is which is settled at the end.
    """
    scored = np.isfinite(distance) & np.isfinite(psnr)
    within = np.where(scored, distance, np.inf)
    picked = int(within.argmin()) if scored.any() else -1
    return {
        "least_step_distance": float(within[picked]) if picked >= 0 else None,
        "psnr_at_least_distance": float(psnr[picked]) if picked >= 0 else None,
        "psnr_of_best_step": float(np.nanmax(psnr)) if np.isfinite(psnr).any() else None,
    }


def _plain(labels: Any, image: int) -> Any:
    """The label of an image, JSON-able."""
    values = [np.asarray(a[image]).tolist() for a in jax.tree.leaves(labels)]
    return values[0] if len(values) == 1 else values


def run_trials(
    plan: Plan,
    store: Store | MemoryStore,
    batch: int = 8,
    memory_gib: float = 0.0,
    mesh: Mesh | None = None,
    progress: bool = True,
    after: Callable[[list[int]], None] | None = None,
    more: Callable[[list[Row]], dict[str, tuple[float, ...]]] | None = None,
) -> list[Row]:
    """Runs what is not done yet, chunk by chunk, and returns the rows of all trials.

    Args:
      plan: what to run.
      store: where finished chunks are kept, and found by a later run of the same plan.
      batch: trials at a time, over all devices.
      memory_gib: of a device, or of all of a CPU; 0 is what there is.
      mesh: of the devices to use, all of this process if None.
      progress: say what is done, and show a bar.
      after: called with the numbers of the finished chunks, whose rows `store` has, whenever there is one more of several.
      more: of all rows so far, the noise levels of each mechanism that are run beside the plan's; asked again until there are
        none. Their chunks follow the plan's, and the same rows must give the same levels, or they are computed again.

    Raises:
      ConfigError: where one trial does not fit into the memory, or the store is another run's.
      RunError: where another process ended before its share was done.
    """
    mesh, first = mesh or parallel.trial_mesh(), processes.is_first()
    solved = {name for name, method in plan.methods.items() if isinstance(method, Auto)}
    numbered = lambda grid, start: dict(enumerate(trials.chunks(grid, batch, solved), start))
    new = numbered(trials.make_grid(plan), 0)
    # As many as are in a chunk, not as many as are left: what is computed at a time must not depend on an earlier kill.
    most = max(map(len, new.values()))
    programs = dict[str, Program]()  # one for all levels

    @numerics.carried
    def make(trial: Trial) -> Program:
        if trial.group.title not in programs:
            programs[trial.group.title] = compile_program(plan, mesh, trial, most, memory_gib)
        return programs[trial.group.title]

    chunks: Chunks = {}
    while new:
        # What more noise was asked for before may have been other noise.
        same = lambda k, own: {row["sigma"] for row in store.rows([k])} == {trial.sigma for trial in own}
        todo = [k for k in new if not store.is_done(k) or (chunks and not same(k, new[k]))]
        chunks |= new
        damaged = [k for k in todo if store.exists(k)]
        levels = sorted({trial.sigma for chunk in new.values() for trial in chunk if trial.group.method != PRIOR_ONLY})
        mine = processes.share(store, todo, hashlib.sha256(strict_json([store.identity, levels]).encode()).digest())
        if first and progress:
            _say(new, todo, damaged, store, mesh)
        count = sum(len(new[k]) for k in mine)
        with tqdm(total=count, unit="trial", smoothing=0.1, disable=not count or not first or not progress) as bar:
            done = [k for k in chunks if k not in todo]
            for k in _run_chunks(plan, {k: new[k] for k in mine}, store, make, bar):
                done.append(k)
                if after and len(done) < len(chunks):
                    after(done)
        if isinstance(store, Store) and jax.process_count() > 1:
            processes.wait_for_all(store, chunks)
        further = more(store.rows(chunks)) if more else {}
        grid = trials.make_grid(dataclasses.replace(plan, sigmas=further)) if further else iter(())
        new = numbered((trial for trial in grid if trial.group.method != PRIOR_ONLY), len(chunks))
    return store.rows(chunks)


def _say(chunks: Chunks, todo: list[int], damaged: list[int], store: Store | MemoryStore, mesh: Mesh) -> None:
    total, left = sum(map(len, chunks.values())), sum(len(chunks[k]) for k in todo)
    where = f"{jax.device_count()} {mesh.devices[0].device_kind}"
    where += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    output = f"; output in {store.folder}" if store.folder else ""
    print(f"{total} trials, {total - left} done before, on {where}{output}")
    if damaged:
        some = ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else "")
        print(f"computed again, because damaged or of another version: {len(damaged)} chunks ({some})")


def _run_chunks(
    plan: Plan, chunks: Chunks, store: Store | MemoryStore, make: Callable[[Trial], Program], bar: tqdm
) -> Iterator[int]:
    """Computes and saves these chunks, and says the number of each; `make` compiles the program of a trial's group."""
    compiler = ThreadPoolExecutor(1)
    try:
        programs = compile_ahead(compiler, make, [chunk[0] for chunk in chunks.values()])
        for group, numbers in itertools.groupby(chunks, key=lambda k: chunks[k][0].group):
            # The prior alone runs while the attacks compile. They are timed: nothing compiles beside them, and what does
            # not fit is known before the first of them.
            for name in [group.title] if group.method == PRIOR_ONLY else programs:
                if not programs[name].done():
                    bar.set_description(f"compiling {name}")
                programs[name].result()
            bar.set_description(group.title)
            for k, rows, arrays in compute(plan, programs[group.title].result(), {k: chunks[k] for k in numbers}):
                store.save(k, [{"chunk": k, **row} for row in rows], arrays)
                bar.update(len(chunks[k]))
                yield k
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)


def compile_ahead(compiler: Executor, make: Callable[[Trial], Program], some: list[Trial]) -> dict[str, Future[Program]]:
    """The programs of these trials by title, compiled one after the other in their order."""
    kinds: dict[str, Trial] = {}
    for trial in some:
        kinds.setdefault(trial.group.title, trial)
    return {name: compiler.submit(make, trial) for name, trial in kinds.items()}
