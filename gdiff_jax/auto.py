"""The strongest attack there is for a leak: what can be solved is solved, and only what is left is searched for."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import algebra, samplers
from gdiff_jax.analytic_mean import AnalyticMean
from gdiff_jax.matching import l2
from gdiff_jax.problem import SPREAD, Info, Method, Problem
from gdiff_jax.pytrees import pytree
from gdiff_jax.refinement import Refinement, compressed, known_noise, refined, refinement_of
from gdiff_jax.samplers.ensemble import CHAINS
from gdiff_jax.trace import StepInfo, x0_error
from gdiff_jax.weighing import preferred, tells_little, unexplained

FITTED = 50.0  # squared distance in units of the noise's variance that a search gains where noise is all [measured, up to 43]
# A search that leaves more than this share of what its refined end leaves unexplained is no reason to doubt that end: the
# gradient of a network that fits its images well is matched by images that are not the one [measured: at 0.5 and beyond].
MISLED = 1 / 3
UNEXPLAINED = "searched for, since what was solved does not have this gradient"
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


class Chains(Protocol):
    """A `Method` that is the mean of so many searches, or of the first of them (`methods.MeanOfChains`)."""

    @property
    def chains(self) -> int: ...
    def describe(self) -> str: ...
    def __call__(self, key: jax.Array, problem: Problem, needed: jax.Array | None = None) -> tuple[jax.Array, Info]: ...


@pytree
class Auto(Method):
    """`algebra.solve`; the prior for directions that it leaves open; then `search`, unless the gradient is explained.

    What will be refined is found by `start`, if there is one: it may be cheaper; of a smooth network by `smooth`. Of what they
    find the image that explains the leak best is kept, or a mean of two. It solves in float64 on the host, so it is called
    outside jit; `after` is what runs on the device. It can be run whatever the attacker knows: the search must be one that can.
    """

    search: Method
    start: Chains | None = None
    smooth: Method | None = None
    name: ClassVar[str] = "auto"

    def describe(self) -> str:
        refined = f", or one chain, under much noise {self.start.describe()}, which is refined" if self.start else ""
        smooth = f", of a smooth network {self.smooth.describe()}" if self.smooth else ""
        return f"algebra, then {self.search.describe()}{refined}{smooth}, where it does not reach"

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
        if float(problem.sigma) > 0 and len(problem.shape) == 3:
            return _estimate(problem)
        match = problem.match
        if len(problem.shape) == 4:
            return _batch(problem)
        try:
            solution = algebra.solve(match.loss, match.params, match.leak, problem.shape, match.label)
        except Exception as error:  # a stranger's loss may have no forward derivative: it is searched for then
            return _failed(problem, error)
        if solution.image is None:
            return Candidate(nothing, False, f"{_in_words(refinement_of(problem))}: {solution.steps[-1]}")
        steps = "; ".join(solution.steps)
        image, words = solution.image, f"{_solved(solution.exact)}: {steps}; residual {solution.residual:.1e}"
        if solution.open is None:
            return Candidate(image.astype(np.float32), solution.exact, words)
        space = samplers.null_space_of(*solution.open)
        filled = _filled(jax.random.fold_in(key, 1), problem, jnp.asarray(image, jnp.float32), space)
        misfit = float(_misfit(problem, filled))
        n, left = solution.open.null.shape
        exact = misfit < FILLED
        words = f"{_solved(exact)}: {steps}; {left} of {n} directions filled by the prior; residual {misfit:.1e}"
        return Candidate(np.asarray(filled), exact, words)

    def after(self, key: jax.Array, problem: Problem, image: jax.Array, exact: jax.Array) -> tuple[jax.Array, Info]:
        """The candidate where it is exact; else the search, or what explains the leak better than that by more than noise.

        Under known noise a first dense layer has a method of its own, which errs less than a search [measured] and takes the
        place of it but where it fails. What was found of a chain of ReLUs, or of a smooth network, is refined.
        """
        if known_noise(problem) and problem.first_dense is not None:
            found, deviation = self._of_first_dense(key, problem)
            kept = jnp.where(exact, image, preferred(problem, found, image))
            return alone(problem, kept, jnp.where((kept == found).all(), deviation, jnp.nan))
        refinement = refinement_of(problem)
        x, info = self._searched(key, problem, refinement)
        x = preferred(problem, x, image)
        if refinement is not None:
            # What was solved of a smooth network leads to the image; a search, though nearer to the leak, does not.
            begin = jnp.where(refinement.smooth & jnp.isfinite(image).all(), image, x)
            end = refined(problem, refinement, begin)
            trusted = ~(unexplained(problem, x) > MISLED * unexplained(problem, end))  # also where the end is not finite
            x = jnp.where(trusted, preferred(problem, end, x), end)
        x = jnp.where(exact, image, x)
        trace = info.trace  # a measured signal's fields are left out: a solved trial's trace has none
        steps = StepInfo(trace.distance, trace.guidance_norm, trace.x0_error)
        return x, Info(steps, problem.outcome(x))

    def _searched(self, key: jax.Array, problem: Problem, refinement: Refinement | None) -> tuple[jax.Array, Info]:
        """What will be refined, or will not; of a chain of ReLUs one search serves for that, unless the leak tells little."""
        if refinement is None:
            return self.search(key, problem)
        if refinement.smooth and self.smooth is not None:
            return self.smooth(key, problem)
        if self.start is None:
            return self.search(key, problem)
        return self.start(key, problem, jnp.where(tells_little(problem), self.start.chains, 1))

    def _of_first_dense(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
        """By its rank-one matrix, and what each pixel is expected to err by; where that fails, as a search finds it, and nan.

        It fails where the search is nearer to the leak by more than it can gain by fitting noise: of an estimate whose n pixels
        have errors of deviation s, twice the n / (1 + (s / SPREAD)^2) degrees of freedom as if the image were white [our
        choice, measured], and FITTED at least. Large noise and a network that fits its images well do that: what it makes of an
        image far off is then no delta to begin with. An estimate that errs by less than half of SPREAD is kept, and nothing is
        searched for: there a search's gain is in the layers above, and not in the image [measured].
        """
        found, info = AnalyticMean()(jax.random.fold_in(key, 2), problem)
        assert info.deviation is not None
        s, is_mean_image = info.trace.guidance_norm[-1], ~jnp.isfinite(info.deviation).all()  # which fits no noise
        unsure = (s > SPREAD / 2) | is_mean_image | ~jnp.isfinite(found).all()
        if self.start is None:
            searched, _ = self.search(key, problem)
        else:
            searched, _ = self.start(key, problem, jnp.where(unsure, self.start.chains, 0))
        freedom = jnp.where(is_mean_image, 0.0, 2 * found.size / (1 + jnp.square(s / SPREAD)))
        kept = jnp.where(unsure, preferred(problem, found, searched, jnp.maximum(freedom, FITTED)), found)
        return kept, jnp.where((kept == found).all(), info.deviation, jnp.nan)


def _estimate(problem: Problem) -> Candidate:
    """What the host makes of a noisy leak of one image: its tokens, where it gives them away."""
    match, refinement = problem.match, refinement_of(problem)
    nothing = np.full(problem.shape, np.nan, np.float32)
    if known_noise(problem) and problem.first_dense is not None:
        return Candidate(nothing, False, f"estimated by {AnalyticMean().describe()}, or searched for where that fails")
    if refinement is None:
        return Candidate(nothing, False, f"{_in_words(refinement)}: under noise nothing of this network is solved")
    words = _in_words(refinement)
    if not refinement.smooth:
        return Candidate(nothing, False, words)
    expected = np.broadcast_to(problem.expected_image, problem.shape)
    try:
        image = algebra.image_of_tokens(
            match.loss, match.params, match.leak, problem.shape, match.label, float(problem.sigma), expected
        )
    except Exception as error:  # a singular system: it is searched for then
        return Candidate(nothing, False, f"{words}; its tokens could not be solved ({type(error).__name__})")
    if image is None:
        return Candidate(nothing, False, words)
    return Candidate(image.astype(np.float32), False, f"{words}, beginning with its tokens")


def _in_words(refinement: Refinement | None) -> str:
    return "only searched for" if refinement is None else f"searched for, then refined by {refinement.words}"


def _solved(exact: bool) -> str:
    return "solved" if exact else UNEXPLAINED


def _failed(problem: Problem, error: Exception) -> Candidate:
    text = " ".join(str(error).split())[:200]
    words = f"only searched for: the algebra failed ({type(error).__name__}: {text})"
    return Candidate(np.full(problem.shape, np.nan, np.float32), False, words)


def _batch(problem: Problem) -> Candidate:
    """The images of a batch, by the algebra of its first dense layer; under noise each has errors, and is no explanation."""
    match, layer = problem.match, problem.first_dense
    assert layer is not None
    try:
        found = algebra.solve_batch(
            match.loss, match.params, match.leak, problem.shape, match.label, layer, float(problem.sigma)
        )
    except Exception as error:  # as in `candidate`
        return _failed(problem, error)
    if found.images is None:
        return Candidate(np.full(problem.shape, np.nan, np.float32), False, f"only searched for: {'; '.join(found.steps)}")
    images, words = jnp.asarray(found.images, jnp.float32), f"{'; '.join(found.steps)}; residual {found.residual:.1e}"
    if float(problem.sigma) == 0:
        return Candidate(np.asarray(images), found.exact, f"{_solved(found.exact)}: {words}")
    images = _denoised(problem, images, jnp.float32(found.std.max()))
    return Candidate(np.asarray(images), False, f"estimated, or searched for where that explains the leak better: {words}")


def alone(problem: Problem, image: jax.Array, deviation: jax.Array | None = None) -> tuple[jax.Array, Info]:
    """A candidate as a method's result: its trace holds its last step alone."""
    blank = jnp.full(problem.schedule.num_steps, jnp.nan)
    distance = problem.match.in_l2()(image)
    error = x0_error(jnp.clip(image, -1.0, 1.0), problem.truth)
    trace = StepInfo(blank.at[-1].set(distance), blank, blank.at[-1].set(error))
    return image, Info(trace, problem.outcome(image), deviation=deviation)


@jax.jit
def _after(auto: Auto, key: jax.Array, problem: Problem, image: jax.Array, exact: jax.Array) -> tuple[jax.Array, Info]:
    return auto.after(key, problem, image, exact)


@jax.jit
def _denoised(problem: Problem, images: jax.Array, std: jax.Array) -> jax.Array:
    """The images to be expected of estimates with errors of that deviation."""
    mean = jnp.broadcast_to(problem.expected_image, images.shape)
    return samplers.denoise_estimate(problem.denoise, problem.schedule, images, std, mean, clip=problem.clip)


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
    if problem.match.client is not None and not batch:  # of a batch the first steps' deltas are nearly those of the last
        return "the leak is an update of several local steps"
    if (mechanism := problem.match.mechanism) is not None and (name := compressed(mechanism)):
        return f"the mechanism changes more of the gradient than its length ({name})"
    return ""
