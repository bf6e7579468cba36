"""The strongest attack there is for a leak: what can be solved is solved, and only what is left is searched for."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import algebra, samplers
from gdiff_jax.matching import l2
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise, LaplaceNoise, UniformNoise
from gdiff_jax.problem import Info, Method, Problem
from gdiff_jax.pytrees import pytree
from gdiff_jax.samplers.ensemble import CHAINS
from gdiff_jax.trace import StepInfo, x0_error

FILLED = 0.02  # relative residual up to which a picture that the prior completed counts as an explanation of the gradient


class Candidate(NamedTuple):
    """What the algebra makes of one leak.

    Attributes:
      image: (H, W, C) float32; nan where nothing could be solved.
      exact: whether it explains the gradient, so that nothing is left to search for.
      words: how it came about, a sentence.
    """

    image: np.ndarray
    exact: bool
    words: str


@pytree
class Auto(Method):
    """`algebra.solve`; the prior for directions that it leaves open; then `search`, unless the gradient is explained.

    Of what they find the image of least distance to the leak is kept. It solves in float64 on the host, so it is called outside
    jit; `after` is what runs on the device. It can be run whatever the attacker knows: the search must be one that can.
    """

    search: Method
    name: ClassVar[str] = "auto"

    def describe(self) -> str:
        return f"algebra, then {self.search.describe()} where it does not reach"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(problem)):
            raise ValueError("auto solves on the host and cannot be traced; call it outside jit, vmap and grad")
        candidate = self.candidate(key, problem)
        if candidate.exact:
            return alone(problem, jnp.asarray(candidate.image))
        return _after(self, key, problem, jnp.asarray(candidate.image), jnp.asarray(False))

    def candidate(self, key: jax.Array, problem: Problem) -> Candidate:
        """By algebra and, in what it leaves open, the prior; on the host, of concrete arrays."""
        nothing, why = np.full(problem.shape, np.nan, np.float32), _not_solvable(problem)
        if why:
            return Candidate(nothing, False, f"only searched for: {why}")
        match = problem.match
        if len(problem.shape) == 4:
            return _batch(problem)
        try:
            solution = algebra.solve(match.loss, match.params, match.leak, problem.shape, match.label)
        except Exception as error:  # a stranger's loss may have no forward derivative: it is searched for then
            text = " ".join(str(error).split())[:200]
            return Candidate(nothing, False, f"only searched for: the algebra failed ({type(error).__name__}: {text})")
        if solution.image is None:
            return Candidate(nothing, False, f"only searched for: {solution.steps[-1]}")
        image, words = solution.image, f"solved: {'; '.join(solution.steps)}; residual {solution.residual:.1e}"
        if solution.open is None:
            return Candidate(image.astype(np.float32), solution.exact, words)
        space = samplers.NullSpace(*(jnp.asarray(a, jnp.float32) for a in solution.open))
        filled = _filled(jax.random.fold_in(key, 1), problem, jnp.asarray(image, jnp.float32), space)
        misfit = float(_misfit(problem, filled))
        n, left = space.basis.shape
        words = f"solved: {'; '.join(solution.steps)}; {left} of {n} directions filled by the prior; residual {misfit:.1e}"
        return Candidate(np.asarray(filled), misfit < FILLED, words)

    def after(self, key: jax.Array, problem: Problem, image: jax.Array, exact: jax.Array) -> tuple[jax.Array, Info]:
        """The search, and the closer of its image and the candidate; the candidate itself where it is exact."""
        searched, info = self.search(key, problem)
        distance = problem.match.in_l2()
        closer = exact | (jnp.isfinite(image).all() & (distance(image) < distance(searched)))
        x = jnp.where(closer, image, searched)
        trace = info.trace  # a measured signal's fields are left out: a solved trial's trace has none
        steps = StepInfo(trace.distance, trace.guidance_norm, trace.x0_error)
        return x, Info(steps, problem.outcome(x))


def _batch(problem: Problem) -> Candidate:
    """The images of a batch, by the algebra of its first dense layer; under noise each has errors, and is no explanation."""
    match, layer = problem.match, problem.first_dense
    assert layer is not None
    try:
        found = algebra.solve_batch(
            match.loss, match.params, match.leak, problem.shape, match.label, layer, float(problem.sigma)
        )
    except Exception as error:  # as in `candidate`
        text = " ".join(str(error).split())[:200]
        nothing = np.full(problem.shape, np.nan, np.float32)
        return Candidate(nothing, False, f"only searched for: the algebra failed ({type(error).__name__}: {text})")
    if found.images is None:
        return Candidate(np.full(problem.shape, np.nan, np.float32), False, f"only searched for: {'; '.join(found.steps)}")
    errors = f"; errors of deviation {found.std.min():.2g} to {found.std.max():.2g}" if not found.exact else ""
    words = f"solved: {'; '.join(found.steps)}; residual {found.residual:.1e}{errors}"
    return Candidate(found.images.astype(np.float32), found.exact, words)


def alone(problem: Problem, image: jax.Array) -> tuple[jax.Array, Info]:
    """A candidate as a method's result: its trace holds its last step alone."""
    blank = jnp.full(problem.schedule.num_steps, jnp.nan)
    distance = problem.match.in_l2()(image)
    error = x0_error(jnp.clip(image, -1.0, 1.0), problem.truth)
    trace = StepInfo(blank.at[-1].set(distance), blank, blank.at[-1].set(error))
    return image, Info(trace, problem.outcome(image))


@jax.jit
def _after(auto: Auto, key: jax.Array, problem: Problem, image: jax.Array, exact: jax.Array) -> tuple[jax.Array, Info]:
    return auto.after(key, problem, image, exact)


@jax.jit
def _misfit(problem: Problem, image: jax.Array) -> jax.Array:
    """Distance of an image's gradient to the leak over the leak's norm."""
    match = problem.match.in_l2()
    return match(image) / l2(match.leak, jax.tree.map(jnp.zeros_like, match.leak))


@jax.jit
def _filled(key: jax.Array, problem: Problem, image: jax.Array, space: samplers.NullSpace) -> jax.Array:
    """The mean of several images that agree with the system, which agrees as well: about the one to be expected."""
    sample = lambda key: samplers.null_space_sample(key, problem.denoise, problem.schedule, image, space, clip=problem.clip)[0]
    return jax.vmap(sample)(jax.random.split(key, CHAINS)).mean(0)


def _not_solvable(problem: Problem) -> str:
    """Why the algebra does not speak of this leak; empty where it does."""
    batch = len(problem.shape) != 3
    if batch and problem.first_dense is None:
        return "the leak is of several images, which only a first layer that is dense gives away"
    if problem.match.client is not None:
        return "the leak is an update of several local steps"
    mechanism = problem.match.mechanism
    stages = mechanism.stages if isinstance(mechanism, Chain) else () if mechanism is None else (mechanism,)
    unknown = [type(s).__name__ for s in stages if not isinstance(s, (Clip, GaussianNoise, LaplaceNoise, UniformNoise))]
    if unknown:
        return f"the mechanism changes more of the gradient than its length ({unknown[0]})"
    if float(problem.sigma) > 0 and not batch:
        return "under noise the equations err, and are not solved"
    return ""
