"""Every attack as a small frozen object with one call: `image, info = method(key, problem)`.

A method's options are bound once, when it is made; its numbers are leaves of a pytree, so a grid over them compiles once, and
what decides shapes is static. A `Problem` is what one attacker has of one leak; a batch of trials is a `jax.vmap` over keys and
problems. The functions behind (`dsg_sample`, `attacks.dlg`, ...) serve alone as well.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gdiff_jax import attacks, samplers
from gdiff_jax.analytic_mean import AnalyticMean, first_dense_of
from gdiff_jax.attacks.analytic import LayerInput
from gdiff_jax.auto import Auto
from gdiff_jax.matching import cosine, squared_l2
from gdiff_jax.problem import Info, Method, Outcome, Problem
from gdiff_jax.pytrees import pytree, static
from gdiff_jax.samplers.base import Signal, Start
from gdiff_jax.samplers.ensemble import CHAINS
from gdiff_jax.signal import CALIBRATED_RATE, NoiseCalibration
from gdiff_jax.trace import StepInfo, x0_error

__all__ = [
    "DLG",
    "DPS",
    "DSG",
    "METHODS",
    "Analytic",
    "AnalyticDSG",
    "AnalyticMean",
    "Auto",
    "CalibratedDSG",
    "Info",
    "InvertingGradients",
    "MeanOfChains",
    "Method",
    "Outcome",
    "Problem",
    "RedDiff",
]


@pytree
class DSG(Method):
    """`dsg_sample`: guidance with a spherical Gaussian constraint (Yang et al. 2024)."""

    guidance_rate: jax.Array | float = 0.2
    interval: int = static(default=1)
    through_prior: bool = static(default=True)
    name: ClassVar[str] = "dsg"

    def describe(self) -> str:
        return f"DSG guidance rate {self.guidance_rate:g}"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        return self.sample(key, problem)

    def sample(
        self, key: jax.Array, problem: Problem, start: Start | None = None, signal: Signal | None = None
    ) -> tuple[jax.Array, Info]:
        """`dsg_sample` with these options, of a problem."""
        p = problem
        image, trace = samplers.dsg_sample(
            key, p.denoise, p.match, p.schedule, p.shape, guidance_rate=self.guidance_rate, interval=self.interval,
            clip=p.clip, through_prior=self.through_prior, signal=signal, start=start, truth=p.truth,
        )  # fmt: skip
        return image, Info(trace, p.outcome(image))


@pytree
class CalibratedDSG(DSG):
    """DSG that measures how much of its guidance is signal, and how far it may go: one setting at every noise."""

    guidance_rate: jax.Array | float = CALIBRATED_RATE
    name: ClassVar[str] = "calibrated-dsg"
    needs_noise: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    def describe(self) -> str:
        return f"calibrated {super().describe()} at most"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        return self.sample(key, problem, signal=NoiseCalibration(problem.match))


@pytree
class MeanOfChains(Method):
    """Several reconstructions of one leak, combined by how far they agree (`samplers.posterior_mean`)."""

    chain: DSG = DSG()
    chains: int = static(default=CHAINS)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.chain.name.removesuffix('-dsg')}-mean"

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        return self.chain.needs_noise

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        return self.chain.calibrated

    def describe(self) -> str:
        return f"the mean of {self.chains} chains of {self.chain.describe()}"

    def __call__(self, key: jax.Array, problem: Problem, needed: jax.Array | None = None) -> tuple[jax.Array, Info]:
        """Of the first `needed` chains alone, where that is given: see `samplers.mean_of_chains`."""
        chain = lambda key: self.chain(key, problem)
        image, info = samplers.mean_of_chains(key, chain, problem.expected_image, self.chains, needed)
        return image, info._replace(outcome=problem.outcome(image))


@pytree
class DPS(Method):
    """`dps_sample`: diffusion posterior sampling (Chung et al. 2023)."""

    zeta: jax.Array | float = 8.0
    through_prior: bool = static(default=True)
    name: ClassVar[str] = "dps"

    def describe(self) -> str:
        return f"DPS zeta {self.zeta:g}"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        p = problem
        image, trace = samplers.dps_sample(
            key, p.denoise, p.match, p.schedule, p.shape, zeta=self.zeta, clip=p.clip, through_prior=self.through_prior,
            truth=p.truth,
        )  # fmt: skip
        return image, Info(trace, p.outcome(image))


@pytree
class RedDiff(Method):
    """`red_diff_sample`: inversion with the prior as regulariser (Mardani et al. 2024)."""

    weight: jax.Array | float = 0.5
    name: ClassVar[str] = "red-diff"

    def describe(self) -> str:
        return f"RED-diff weight {self.weight:g}"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        p = problem
        image, trace = samplers.red_diff_sample(key, p.denoise, p.match, p.schedule, p.shape, weight=self.weight, truth=p.truth)
        return image, Info(trace, p.outcome(image))


def _restarts(restarts: int) -> str:
    return f", {restarts} restarts" if restarts > 1 else ""


@pytree
class DLG(Method):
    """`attacks.dlg`: L-BFGS on the squared distance, without a prior (Zhu et al. 2019).

    With `joint_labels` the labels are optimised with the image, in place of those of the match.
    """

    steps: int = static(default=2000)
    restarts: int = static(default=1)
    joint_labels: bool = static(default=False)
    name: ClassVar[str] = "dlg"

    def describe(self) -> str:
        return f"DLG {self.steps} L-BFGS steps{_restarts(self.restarts)}"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        p, options = problem, dict[str, Any](steps=self.steps, restarts=self.restarts, truth=problem.truth)
        match = dataclasses.replace(p.match, distance=squared_l2)
        if not self.joint_labels:
            image, trace = attacks.dlg(key, match, p.shape, **options)
            return image, Info(trace, p.outcome(image))
        label_shape = (*p.shape[:-3], p.num_classes)
        (image, logits), trace = attacks.dlg(key, attacks.JointLabels(match), p.shape, label_shape=label_shape, **options)
        return image, Info(trace, p.outcome(image), logits)


@pytree
class InvertingGradients(Method):
    """`attacks.invert_gradients`: signed Adam on 1 - cosine with total variation (Geiping et al. 2020)."""

    tv: jax.Array | float = 1e-2
    steps: int = static(default=4000)
    restarts: int = static(default=1)
    name: ClassVar[str] = "inverting"

    def describe(self) -> str:
        return f"inverting gradients {self.steps} steps, TV {self.tv:g}{_restarts(self.restarts)}"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        match = dataclasses.replace(problem.match, distance=cosine)
        options = dict[str, Any](steps=self.steps, tv=self.tv, restarts=self.restarts, truth=problem.truth)
        image, trace = attacks.invert_gradients(key, match, problem.shape, **options)
        return image, Info(trace, problem.outcome(image))


def _layer_input(problem: Problem) -> LayerInput:
    return attacks.read_first_dense(first_dense_of(problem), problem.match.leak, problem.shape)


@pytree
class Analytic(Method):
    """The image read off the gradient of a first dense layer, without iterations (`attacks.dense_layer_input`)."""

    name: ClassVar[str] = "analytic"
    needs_first_dense: ClassVar[bool] = True

    def describe(self) -> str:
        return "analytic of the first dense layer"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        layer_input = _layer_input(problem)
        x = layer_input.x
        step = StepInfo(problem.match(x), jnp.full((), jnp.nan), x0_error(jnp.clip(x, -1.0, 1.0), problem.truth))
        outcome = problem.outcome(x, dead_layer=~jnp.isfinite(layer_input.std))
        return x, Info(jax.tree.map(lambda a: jnp.asarray(a)[None], step), outcome)


@pytree
class AnalyticDSG(DSG):
    """DSG that starts where the noise of the analytic estimate ends."""

    name: ClassVar[str] = "analytic-dsg"
    needs_first_dense: ClassVar[bool] = True
    needs_noise: ClassVar[bool] = True

    def describe(self) -> str:
        return f"{super().describe()} from the analytic estimate"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        layer_input = _layer_input(problem)
        k_start, k_sample = jax.random.split(key)
        start = samplers.start_from(k_start, problem.schedule, layer_input.x, problem.sigma * layer_input.std)
        image, info = self.sample(k_sample, problem, start)
        return image, info._replace(outcome=problem.outcome(image, dead_layer=~jnp.isfinite(layer_input.std)))


def strongest(dsg: DSG, by_noise: DSG | None = None, chains: int = CHAINS) -> Auto:
    """`Auto` that searches by the mean of chains, `by_noise` where the attacker can draw from the mechanism's.

    Half as many serve where that is refined, or one: more gain little there. A smooth network's begins with plain DSG: its
    curvatures differ so much that a step to the least distance along the pull is too short [measured].
    """
    first, fewer = by_noise or dsg, max(chains // 2, 2)
    return Auto(MeanOfChains(first, chains), MeanOfChains(first, fewer), MeanOfChains(dsg, fewer))


# The one list of them, with their default options, by name.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        DSG(),
        CalibratedDSG(),
        MeanOfChains(DSG()),
        MeanOfChains(CalibratedDSG()),
        DPS(),
        RedDiff(),
        DLG(),
        InvertingGradients(),
        Analytic(),
        AnalyticDSG(),
        AnalyticMean(),
        strongest(DSG(), CalibratedDSG()),
    )
}
