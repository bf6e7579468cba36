"""The attack on a ReLU network whose gradient carries noise: its equations with masks that are probabilities, and the prior."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from gdiff_jax import samplers
from gdiff_jax.algebra.masks import ReluChain, equations_at, relu_chain, residual_of
from gdiff_jax.matching import GradientMatching, at_full_precision, l2, victim_gradient
from gdiff_jax.problem import Info, Method, Problem
from gdiff_jax.pytrees import pytree, static
from gdiff_jax.samplers.proximal import Residual


@pytree
class ExpectedMasks(Method):
    """`samplers.proximal_sample` of a ReLU network's equations (`algebra.masks`), of one image.

    It needs a chain of affine layers and ReLUs (`chain_of` says whether there is one), and noise that the attacker knows; of
    the mechanism it takes clipping into account and no compression. The mean of a few chains errs by half a decibel less than
    one [measured].
    """

    chains: int = static(default=2)
    levels: int = static(default=25)
    inner: int = static(default=2)
    iterations: int = static(default=10)
    name: ClassVar[str] = "expected-masks"
    needs_noise: ClassVar[bool] = True

    def describe(self) -> str:
        return f"expected masks, {self.levels} levels, the mean of {self.chains} chains"

    def __call__(self, key: jax.Array, problem: Problem) -> tuple[jax.Array, Info]:
        p, chain = problem, chain_of(problem)
        if chain is None:
            raise ValueError("this problem's network is no chain of affine layers and ReLUs of one image; take another method")
        match, noise = p.match, p.noise()
        measured = lambda x, variance: _measured(chain, match, noise, x, variance)

        def sample(key: jax.Array) -> tuple[jax.Array, samplers.ProximalInfo]:
            return samplers.proximal_sample(
                key, p.denoise, p.schedule, measured, p.shape, levels=self.levels, inner=self.inner, iterations=self.iterations,
                clip=p.clip, truth=p.truth,
            )  # fmt: skip

        images, trace = jax.vmap(sample)(jax.random.split(key, self.chains))
        image = jnp.clip(images, -1.0, 1.0).mean(0)
        return image, Info(jax.tree.map(lambda a: a[0], trace), p.outcome(image))


def chain_of(problem: Problem) -> ReluChain | None:
    """The ReLU chain behind a leak of one gradient of one image; None where it is no such leak or no such network."""
    match = problem.match
    if len(problem.shape) != 3 or match.client is not None:
        return None
    return relu_chain(match.loss, match.params, problem.shape, match.label)


@at_full_precision
def _measured(chain: ReluChain, match: GradientMatching, noise: jax.Array, x: jax.Array, variance: jax.Array) -> Residual:
    """The equations at an estimate, of the gradient before it was clipped, as far as the estimate tells by how much."""
    share = jnp.ones(())
    if match.mechanism is not None:
        gradient = victim_gradient(match.loss, match.params, x, match.label)
        zero = jax.tree.map(jnp.zeros_like, gradient)
        length = l2(gradient, zero)
        share = l2(match.mechanism.simulate(gradient, match.leak), zero) / jnp.where(length > 0, length, 1.0)
        share = jnp.where(share > 0, share, 1.0)
    leak = [g / share for g in jax.tree.leaves(match.leak)]
    leaves = jax.tree.leaves((match.params, match.label))
    equations = equations_at(chain, leaves, leak, noise / share, x, variance)
    return at_full_precision(residual_of(chain, leaves, leak, equations))
