"""One reconstruction, to be looked at while it comes into being."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gdiff_jax.methods import Problem
from gdiff_jax.samplers.base import reverse
from gdiff_jax.samplers.dsg import dsg_step
from gdiff_jax.schedule import Schedule

FRAMES = 24


def film_steps(schedule: Schedule) -> list[int]:
    """Of the frames of `film` the timestep that each was made by; of a prior with a time of its own its steps, counted to 0."""
    t = np.asarray(schedule.t)
    t = t if np.issubdtype(t.dtype, np.integer) else np.arange(schedule.num_steps)
    return [int(t) for t in t[::-1][_frames(schedule.num_steps)]]


def _frames(num_steps: int) -> np.ndarray:
    return np.unique(np.round(np.linspace(0, num_steps - 1, min(FRAMES, num_steps))).astype(int))


def film(key: jax.Array, problem: Problem, guidance_rate: Any) -> list[np.ndarray]:
    """The iterates of one reconstruction by DSG at about `FRAMES` of its steps, the last one included; `key` of the sampler."""

    @jax.jit
    def run(key: jax.Array, p: Problem) -> Any:
        def step(key: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
            x, _ = dsg_step(key, x, i, p.denoise, p.match, p.schedule, guidance_rate=guidance_rate, clip=p.clip)
            return x, x

        return reverse(key, step, p.schedule, p.shape)[1]

    iterates = run(key, problem)
    return list(np.asarray(iterates)[_frames(problem.schedule.num_steps)])
