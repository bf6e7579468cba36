"""One trial of the sweep, its grid, and the compiled function that runs a chunk of trials.

A trial is (victim, training state, mechanism, method, sigma, image, seed). Its random numbers come from (image, seed) alone:
the same noise n at every sigma (g + sigma n), the same start and steps for every method and victim, so curves over sigma
compare like with like, and a result depends on neither its chunk nor its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import gdiff_jax as gd
from experiments.mechanism_specs import Spec
from gdiff_jax.matching import cosine, l2
from gdiff_jax.victims import Victim

PRIOR_ONLY = "prior-only"
GUIDED = ("dsg", "dps")


@dataclasses.dataclass(frozen=True)
class Group:
    """Trials that share a compiled program and the victim's weights."""

    method: str
    victim: str  # "" for prior-only
    training_steps: int
    mechanism: str = "gaussian"  # "" for prior-only

    @property
    def title(self) -> str:
        """Of the compiled program: the victim's training state is an argument of it."""
        return f"{self.method} {self.victim} {self.mechanism}".strip()


@dataclasses.dataclass(frozen=True)
class Trial:
    group: Group
    sigma: float  # nan for prior-only
    image: int
    seed: int


def make_grid(
    methods: tuple[str, ...],
    victims: tuple[str, ...],
    training: tuple[int, ...],
    sigmas: dict[str, tuple[float, ...]],
    images: int,
    seeds: int,
) -> Iterator[Trial]:
    """All trials, group by group; prior-only once an image and seed, since neither victim nor mechanism touches it.

    `sigmas` holds the noise levels of each mechanism.
    """
    pairs = [(image, seed) for image in range(images) for seed in range(seeds)]
    for image, seed in pairs:
        yield Trial(Group(PRIOR_ONLY, "", 0, ""), float("nan"), image, seed)
    for victim in victims:
        for steps in training:
            for mechanism, levels in sigmas.items():
                for method in methods:
                    group = Group(method, victim, steps, mechanism)
                    for sigma in levels:
                        for image, seed in pairs:
                            yield Trial(group, sigma, image, seed)


def chunks(trials: Iterator[Trial], size: int) -> list[list[Trial]]:
    """At most `size` trials of one group each, in order."""
    result: list[list[Trial]] = []
    for trial in trials:
        if not result or len(result[-1]) == size or result[-1][0].group != trial.group:
            result.append([])
        result[-1].append(trial)
    return result


def trial_keys(seed: int, chunk: list[Trial]) -> jax.Array:
    """One key a trial, of (image, seed) alone."""
    base = jax.random.key(seed)
    images, seeds = jnp.array([t.image for t in chunk]), jnp.array([t.seed for t in chunk])
    return jax.vmap(lambda image, s: jax.random.fold_in(jax.random.fold_in(base, image), s))(images, seeds)


def make_runner(
    method: str, victim: Victim | None, spec: Spec | None, adaptive: bool, shape: tuple[int, ...], interval: int, clip: bool
) -> Callable[..., Any]:
    """run(denoise, schedule, params, step_size, key, sigma, image, label) for a chunk of trials.

    One jit serves the whole grid: weights, sigma and step_size (zeta of dps, guidance rate of dsg) are arguments. The last four
    arguments have a leading trial axis, and so has everything in the dict that it returns.
    """

    def one(denoise, schedule, params, step_size, key, sigma, image, label):
        k_noise, k_sample = jax.random.split(key)
        if method == PRIOR_ONLY:
            x, trace = gd.unguided_sample(k_sample, denoise, schedule, shape, clip=clip, truth=image)
            return dict(image=x, trace=trace._asdict(), scalars=gd.image_metrics(x, image))
        gradient = gd.victim_gradient(victim.loss, params, image, label)
        mechanism = spec.for_image(jax.random.fold_in(k_noise, 1), sigma, victim, params, image)
        leak = mechanism(k_noise, gradient)
        match = gd.GradientMatching(params, label, leak, victim.loss, l2, mechanism if adaptive else None)
        if method == "dsg":
            sample = functools.partial(gd.dsg_sample, guidance_rate=step_size, interval=interval)
        else:
            sample = functools.partial(gd.dps_sample, zeta=step_size)
        x, trace = sample(k_sample, denoise, match, schedule, shape, clip=clip, truth=image)
        norms = {
            "gradient_norm": l2(gradient, jax.tree.map(jnp.zeros_like, gradient)),
            "noise_norm": l2(leak, gradient),
            "leak_cosine": 1 - cosine(leak, gradient),
            "distance": match(x),
        }
        return dict(image=x, trace=trace._asdict(), scalars={**norms, **gd.image_metrics(x, image)})

    return jax.jit(jax.vmap(one, in_axes=(None, None, None, None, 0, 0, 0, 0)))
