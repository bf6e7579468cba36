"""One trial of the sweep, its grid, and the compiled function that runs a chunk of trials.

A trial is (victim, training state, mechanism, method, sigma, image, seed). Its random numbers come from (image, seed) alone:
the same noise n at every sigma (g + sigma n), the same start and steps for every method and victim, so curves over sigma
compare like with like, and a result depends on neither its chunk nor its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import gdiff_jax as gd
from experiments import methods
from experiments.mechanism_specs import Spec
from gdiff_jax import attacks, parallel
from gdiff_jax.matching import cosine, equal_layers, l2, released
from gdiff_jax.metrics import match_images
from gdiff_jax.samplers import batched
from gdiff_jax.victims import Victim

if TYPE_CHECKING:
    from experiments.inputs import Inputs, SweepConfig

PRIOR_ONLY = "prior-only"


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
    image: int  # the first of its --group images
    seed: int


def make_grid(c: SweepConfig, inputs: Inputs) -> Iterator[Trial]:
    """All trials, group by group; prior-only once an image and seed, since neither victim nor mechanism touches it.

    A method that does not apply to a victim is left out there.
    """
    pairs = [(image, seed) for image in range(0, c.num_images, c.group) for seed in range(c.seeds)]
    for image, seed in pairs:
        yield Trial(Group(PRIOR_ONLY, "", 0, ""), float("nan"), image, seed)
    for victim in c.victims:
        for steps in c.training_steps:
            for mechanism, levels in inputs.sigmas.items():
                for method in c.methods:
                    if not methods.applies(method, inputs.victims[victim], c.group):
                        continue
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
    return parallel.trial_keys(seed, np.array([t.image for t in chunk]), np.array([t.seed for t in chunk]))


SHARED = 6  # arguments of the runner that all trials of a chunk have in common: the first ones


def make_runner(
    method: str, inputs: Inputs, victim: Victim | None, spec: Spec | None, c: SweepConfig, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """run(denoise, schedule, params, proxy, strength, given, key, sigma, image, label) for trials divided over the mesh.

    One jit serves the whole grid: weights, sigma and the method's strength are arguments. `proxy` (N, H, W, C) holds images of
    the prior, by which an attacker judges what it is not told; `given` is a leak from elsewhere, or None.
    The last four arguments have a leading trial axis, and so has all that is returned: arrays of the trial's images
    (B, H, W, C), metrics of each (B,), and scalars. `image` and `label` have an axis of B = --group images after that of the
    trials.
    """
    shape, clip, expected = inputs.prior.image_shape, inputs.prior.clip, jnp.asarray(inputs.prior.expected_image)
    alone = c.group == 1
    client = gd.LocalSGD(c.local_learning_rate, c.local_steps, c.local_batch or None) if c.local_steps > 1 else None

    def result(x: jax.Array, truth: jax.Array, trace: Any, scalars: dict[str, jax.Array]) -> dict[str, Any]:
        x = x[None] if alone else x[match_images(x, truth)]
        return dict(image=x, trace=trace._asdict(), metrics=gd.image_metrics(x, truth), scalars=scalars)

    def one(denoise, schedule, params, proxy, strength, given, key, sigma, images, labels):
        k_noise, k_sample = jax.random.split(key)
        if method == PRIOR_ONLY:
            sample = lambda k, truth=None: gd.unguided_sample(k, denoise, schedule, shape, clip=clip, truth=truth)
            if alone:
                x, trace = sample(k_sample, images[0])
            else:
                x, trace = jax.vmap(sample)(jax.random.split(k_sample, c.group))
                trace = jax.tree.map(lambda a: a[0], trace)
            return result(x, images, trace, {})
        x, y = (images[0], labels[0]) if alone else (images, labels)
        gradient = released(client, victim.loss, params, x, y) if given is None else given
        mechanism = spec.for_image(jax.random.fold_in(k_noise, 1), sigma, victim, params, x)
        leak = mechanism(k_noise, gradient) if given is None else given
        guess = y if c.labels == "known" else infer_labels(victim, params, proxy, leak, c.group)
        match = attacker_match(c, victim, params, proxy, x, leak, guess, mechanism, client)
        task = methods.Task(
            k_sample,
            denoise if alone else batched(denoise),
            schedule,
            match,
            strength,
            sigma,
            victim.first_dense,
            victim.num_classes,
            shape if alone else (c.group, *shape),
            clip,
            x if alone else None,
            expected,
        )
        found, trace = methods.METHODS[method].run(task, c)
        if isinstance(found, tuple):
            found, guess = found[0], jnp.argmax(found[1], axis=-1).astype(y.dtype)
            match = dataclasses.replace(match, label=guess)
        scalars = {
            "gradient_norm": l2(gradient, jax.tree.map(jnp.zeros_like, gradient)),
            "noise_norm": l2(leak, gradient),
            "leak_cosine": 1 - cosine(leak, gradient),
            "distance": dataclasses.replace(match, distance=l2, weights=None)(found),
            "label_accuracy": attacks.label_accuracy(jnp.atleast_1d(guess), labels),
        }
        return result(found, images, trace, scalars)

    return jax.jit(parallel.map_trials(one, mesh, SHARED))


def infer_labels(victim: Victim, params: Any, proxy: jax.Array, leak: Any, images: int) -> jax.Array:
    """The labels that the last layer's gradient betrays: a scalar for one image, (B,) in ascending order for more."""
    kernel, bias = leak[victim.last_kernel], leak[victim.last_bias]
    if images == 1:
        return attacks.infer_label(kernel, bias, jax.vmap(lambda x: victim.features(params, x))(proxy).mean(0)).astype(
            jnp.int32
        )
    likely = jax.nn.softmax(victim.logits(params, proxy)).mean(0)
    return attacks.counts_to_labels(attacks.label_counts(bias, images, likely), images)


def attacker_match(
    c: SweepConfig,
    victim: Victim,
    params: Any,
    proxy: jax.Array,
    x: jax.Array,
    leak: Any,
    label: jax.Array,
    mechanism: Any,
    client: gd.LocalSGD | None,
) -> gd.GradientMatching:
    """The objective of an attacker who knows what `c` says; of the private images x it sees their statistics, if those."""
    loss, y = victim.loss, label
    if victim.has_batch_norm and c.statistics != "batch":
        known = c.statistics == "known"
        loss = victim.loss_known_statistics if known else victim.loss_replaced_statistics
        y = (label, victim.batch_statistics(params, x if known else proxy))
    if client is not None and c.local_rate == "guessed":
        sent = leak[victim.last_bias] * (c.local_learning_rate * c.local_steps)
        per_step = c.local_batch or c.group
        rate = gd.guess_learning_rate(sent, per_step, victim.num_classes, c.local_steps)
        leak = jax.tree.map(lambda g: g * (c.local_learning_rate / rate), leak)
        client = dataclasses.replace(client, learning_rate=rate)
    weights = equal_layers(leak) if c.layer_weights == "equal" else None
    known_mechanism = mechanism if c.adaptive else None
    return gd.GradientMatching(params, y, leak, loss, methods.DISTANCES[c.distance], known_mechanism, weights, client)
