"""Trials of `Auto`: leaks and scores are the devices' work, as of every method; the algebra between them is the host's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gdiff_jax import auto, numerics, parallel
from gdiff_jax.auto import Auto, Candidate
from gdiff_jax.methods import Problem
from gdiff_jax.modules import digest
from gdiff_jax.sweeping import memory, trials
from gdiff_jax.sweeping.plan import Plan
from gdiff_jax.sweeping.trials import Group, Private, Shared, Trial

Fit = Callable[[Callable[[int], Any]], tuple[int, Any]]


def _of(key: jax.Array, problem: Problem) -> tuple[str, bytes]:
    """What a trial's leak and label are known by, and its key."""
    arrays = jax.tree.leaves((problem.match.leak, problem.match.label))
    leak = digest(dict(zip(map(str, range(len(arrays))), arrays, strict=True)))
    return leak, np.asarray(jax.random.key_data(key)).tobytes()


@dataclasses.dataclass(eq=False)
class Solver:
    """run(shared, private) of many trials, in the place of a compiled program.

    Attributes:
      fit: `size, program = fit(compile_for)`, for as many trials a device as its memory holds; called when a trial is first
        left unsolved, as searching for one is by far what needs most.
      most: trials a device at a time, as far as memory does not say fewer.
      bytes_per_trial: of the largest program that has been compiled so far.
    """

    plan: Plan
    group: Group
    mesh: Mesh
    fit: Fit
    most: int
    bytes_per_trial: float = 0.0
    _compiled: bool = False  # by the solution of a first leak
    _scorer: tuple[int, Any] | None = None
    _searcher: tuple[int, Any] | None = None
    _exact: dict[str, Candidate] = dataclasses.field(default_factory=dict)  # by the leak
    _first: dict[tuple[str, bytes], Candidate] = dataclasses.field(default_factory=dict)  # that `solves` found, not exact

    def __call__(self, shared: Shared, own: Private) -> dict[str, Any]:
        problems = self._problems(shared, own)
        solve = numerics.carried(self._candidate)
        # The algebra of one leak is one core's work, of all until the last has ended.
        with numerics.one_blas_thread(), ThreadPoolExecutor(self.mesh.size) as pool:
            first = [pool.submit(solve, *problem) for problem in problems[:1]]
            if not self._compiled:  # threads that need a program at the same time each compile it
                wait(first)
                self._compiled = True
            found = [one.result() for one in [*first, *(pool.submit(solve, *problem) for problem in problems[1:])]]
        images = np.stack([candidate.image for candidate in found])
        exact = np.array([candidate.exact for candidate in found])
        # Each by its own: what a trial's trace holds must not depend on its neighbours.
        parts, order = list[Any](), list[int]()
        for rows, run in ((np.flatnonzero(exact), self._scored), (np.flatnonzero(~exact), self._searched)):
            if len(rows):
                parts.append(run(shared, jax.tree.map(lambda a, rows=rows: a[rows], (own, images, exact))))
                order.extend(rows)
        result = jax.tree.map(lambda *a: np.concatenate(a)[np.argsort(order)], *parts)
        return {**result, "how": np.array([candidate.words for candidate in found])}

    def solves(self, shared: Shared, trial: Trial) -> bool:
        """Whether a trial's leak, without noise, is solved, so that its result can be had before others are looked at."""
        if trial.sigma != 0:
            return False
        ((key, problem),) = self._problems(shared, trials.own_arguments(self.plan, [trial]))
        self._compiled = True
        candidate = self._candidate(key, problem)
        if not candidate.exact:  # it is asked for again, with the others
            self._first[_of(key, problem)] = candidate
        return candidate.exact

    def _candidate(self, key: jax.Array, problem: Problem) -> Candidate:
        """As before where a leak is the same, as without noise it is for every seed."""
        method = self.plan.methods[self.group.method]
        assert isinstance(method, Auto)
        leak, _ = mine = _of(key, problem)
        if mine in self._first:
            return self._first.pop(mine)
        if leak not in self._exact:
            candidate = method.candidate(key, problem)
            if not candidate.exact:
                return candidate
            self._exact[leak] = candidate
        return self._exact[leak]

    def _problems(self, shared: Shared, own: Private) -> list[tuple[jax.Array, Problem]]:
        """Key and problem of each trial, on the first device."""
        shared, own = jax.device_put((shared, own), self.mesh.devices[0])
        return [self._released(shared, jax.tree.map(lambda a, i=i: a[i], own)) for i in range(len(own.sigma))]

    @cached_property
    def _released(self) -> Any:
        def released(shared: Shared, own: Private) -> tuple[jax.Array, Problem]:
            key, _, _, problem = trials.leaked(self.plan, self.group, shared, own)
            return key, problem

        return jax.jit(released)

    def _scored(self, shared: Shared, both: Any) -> Any:
        """Candidates, all of which are exact, as results."""
        if self._scorer is None:
            known = lambda key, problem, image, exact: auto.alone(problem, image)
            lowered = jax.jit(parallel.map_trials(self._trial(known), self.mesh)).lower(shared, self._rows(both, 0, self.most))
            self._scorer = self.most, self._noted(self.most, parallel.compiled(lowered, self.mesh))
        return self._in_parts(self._scorer, shared, both)

    @cached_property
    def searching(self) -> Any:
        """The jitted search(shared, (private, images, exact)) of many trials, beside their candidates."""
        return jax.jit(parallel.map_trials(self._trial(None), self.mesh))

    def _searched(self, shared: Shared, both: Any) -> Any:
        if self._searcher is None:
            lower = lambda n: self.searching.lower(shared, self._rows(both, 0, n))
            size, program = self.fit(lambda n: parallel.compiled(lower(n), self.mesh))
            self._searcher = size, self._noted(size, program)
        return self._in_parts(self._searcher, shared, both)

    def _in_parts(self, sized: tuple[int, Any], shared: Shared, both: Any) -> Any:
        """What a program of so many trials a device makes of any number of them."""
        (size, program), count = sized, len(both[1])
        starts = range(0, count, size * self.mesh.size)
        parts = [jax.device_get(program(shared, self._rows(both, start, size))) for start in starts]
        return jax.tree.map(lambda *a: np.concatenate(a)[:count], *parts)

    def _noted(self, size: int, program: Any) -> Any:
        """A compiled program of so many trials a device, whose memory counts."""
        self.bytes_per_trial = max(self.bytes_per_trial, memory.needed(program) / size)
        return program

    def _rows(self, both: Any, start: int, size: int) -> Any:
        """So many trials a device from the start on, the last repeated."""
        rows = np.minimum(np.arange(start, start + size * self.mesh.size), len(both[1]) - 1)
        return parallel.divide(jax.tree.map(lambda a: a[rows], both), self.mesh)

    def _trial(self, method: Any) -> Callable[[Shared, Any], Any]:
        def trial(shared: Shared, both: Any) -> dict[str, Any]:
            own, image, exact = both
            chosen = method or shared.method.after  # type: ignore[union-attr]
            run = lambda key, problem: chosen(key, problem, image, exact)
            return trials.attack(self.plan, self.group, shared, own, run)

        return trial
