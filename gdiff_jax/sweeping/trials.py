"""One trial, the grid of them, and the compiled function that runs many of a kind.

A trial is (victim, training state, mechanism, method, sigma, image, seed). Its random numbers come from (image, seed) alone:
the same noise n at every sigma (g + sigma n), the same start and steps for every method and victim, so curves over sigma
compare like with like, and a result depends on neither its chunk nor its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import attacks, parallel
from gdiff_jax.federated import guess_learning_rate
from gdiff_jax.matching import GradientMatching, cosine, equal_layers, l2, released
from gdiff_jax.mechanisms import noise_of
from gdiff_jax.methods import Method, Problem
from gdiff_jax.metrics import image_metrics, match_images
from gdiff_jax.sweeping.conditioning import sample_unguided, told
from gdiff_jax.sweeping.plan import PRIOR_ONLY, Plan, VictimState
from gdiff_jax.victims import Victim


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

    @property
    def state(self) -> VictimState:
        return VictimState(self.victim, self.training_steps)


@dataclasses.dataclass(frozen=True)
class Trial:
    group: Group
    sigma: float  # nan for prior-only
    image: int  # the first of its --group images
    seed: int


def make_grid(plan: Plan) -> Iterator[Trial]:
    """All trials, group by group; prior-only once an image and seed, since neither victim nor mechanism touches it.

    A method that does not apply to a victim is left out there.
    """
    pairs = [(image, seed) for image in range(0, len(plan.images), plan.client.group) for seed in range(plan.seeds)]
    for image, seed in pairs:
        yield Trial(Group(PRIOR_ONLY, "", 0, ""), float("nan"), image, seed)
    for victim, steps in plan.params:
        for mechanism, levels in plan.sigmas.items():
            for name, method in plan.methods.items():
                if not method.fits(plan.victims[victim].first_dense, plan.client.group):
                    continue
                for sigma in levels:
                    for image, seed in pairs:
                        yield Trial(Group(name, victim, steps, mechanism), sigma, image, seed)


def chunks(trials: Iterator[Trial], size: int, solved: Collection[str] = ()) -> list[list[Trial]]:
    """At most `size` trials of one group each, in order.

    Where methods that are `solved` begin with a leak without noise, that is a chunk of its own: a first result, in seconds.
    """
    result: list[list[Trial]] = []
    most = size
    for trial in trials:
        new = not result or result[-1][0].group != trial.group
        if new or len(result[-1]) == most:
            result.append([])
            most = 1 if new and trial.group.method in solved and trial.sigma == 0 else size
        result[-1].append(trial)
    return result


def trial_keys(seed: int, chunk: list[Trial]) -> jax.Array:
    """One key a trial, of (image, seed) alone."""
    return parallel.trial_keys(seed, np.array([t.image for t in chunk]), np.array([t.seed for t in chunk]))


class Shared(NamedTuple):
    """What all trials of a group have in common, on every device: arguments of its compiled program, never constants."""

    denoise: Any
    schedule: Any
    params: Any
    proxy: jax.Array  # (K, H, W, C), see `Plan`
    method: Method | None  # its numbers are traced
    leak: Any  # from elsewhere, or None


class Private(NamedTuple):
    """One trial's own: images (B, H, W, C) and labels (B, ...) of its client, B = `Client.group`."""

    key: jax.Array
    sigma: jax.Array
    images: jax.Array
    labels: Any


class Released(NamedTuple):
    """What a client let out."""

    gradient: Any  # before the mechanism
    leak: Any
    mechanism: Any


def shared_arguments(plan: Plan, group: Group) -> Shared:
    """For the trials of a group, not yet on the devices; without a method for prior-only."""
    method = jax.tree.map(jnp.float32, plan.methods.get(group.method))
    params, proxy = plan.params.get(group.state), jnp.asarray(plan.proxy)
    return Shared(plan.prior.denoise, plan.schedule, params, proxy, method, plan.leak)


def own_arguments(plan: Plan, batch: list[Trial]) -> Private:
    """For these trials, with a leading axis of them."""
    index = np.array([t.image for t in batch])[:, None] + np.arange(plan.client.group)
    sigmas = jnp.array([t.sigma for t in batch], jnp.float32)
    labels = jax.tree.map(lambda a: jnp.asarray(a[index]), plan.labels)
    return Private(trial_keys(plan.seed, batch), sigmas, jnp.asarray(plan.images[index]), labels)


def make_runner(plan: Plan, group: Group, mesh: jax.sharding.Mesh) -> Any:
    """A jitted run(shared, private) for trials divided over the mesh: one compilation serves the whole grid.

    `private` has a leading axis of trials, and so has all that is returned: images (B, H, W, C) of each, the trace of its
    method, metrics of its images (B,), and scalars.
    """
    if group.method == PRIOR_ONLY:
        trial = lambda shared, own: sample_prior(plan, shared, own)
    else:
        trial = lambda shared, own: attack(plan, group, shared, own)
    return jax.jit(parallel.map_trials(trial, mesh))


def _result(
    x: jax.Array, truth: jax.Array, trace: Any, deviation: jax.Array | None = None, **scalars: jax.Array
) -> dict[str, Any]:
    """Of one trial; x is (H, W, C), or (B, H, W, C) in an order of its own. `deviation` is of one image, nan without."""
    deviation = jnp.full_like(truth, jnp.nan) if deviation is None else deviation[None]
    x = x[None] if x.ndim == 3 else x[match_images(x, truth)]
    return dict(image=x, deviation=deviation, trace=trace._asdict(), metrics=image_metrics(x, truth), scalars=scalars)


def sample_prior(plan: Plan, shared: Shared, own: Private) -> dict[str, Any]:
    """As many samples of the prior as a leak has images, which ignore it."""
    _, k_sample = jax.random.split(own.key)
    shape, clip = plan.prior.image_shape, plan.prior.clip
    sample = lambda key, truth=None: sample_unguided(key, shared.denoise, shared.schedule, shape, clip=clip, truth=truth)
    if plan.client.group == 1:
        x, trace = sample(k_sample, own.images[0])
    else:
        x, trace = jax.vmap(sample)(jax.random.split(k_sample, plan.client.group))
        trace = jax.tree.map(lambda a: a[0], trace)
    return _result(x, own.images, trace)


def release(plan: Plan, group: Group, shared: Shared, own: Private, key: jax.Array) -> Released:
    """What the client of a trial lets out, its mechanism drawing from `key`; a leak from elsewhere as it is."""
    victim = plan.victims[group.victim]
    x, y = _of_client(plan, own)
    gradient = released(plan.local_sgd, victim.loss, shared.params, x, y) if shared.leak is None else shared.leak
    spec = plan.mechanisms[group.mechanism]
    mechanism = spec.for_image(jax.random.fold_in(key, 1), own.sigma, victim, shared.params, x)
    leak = mechanism(key, gradient) if shared.leak is None else shared.leak
    return Released(gradient, leak, mechanism)


def _of_client(plan: Plan, own: Private) -> tuple[jax.Array, Any]:
    """Images and labels as the loss takes them: of a batch, or one without its axis."""
    if plan.client.group > 1:
        return own.images, own.labels
    return own.images[0], jax.tree.map(lambda a: a[0], own.labels)


def guess_labels(plan: Plan, group: Group, shared: Shared, own: Private, leak: Any) -> Any:
    """The labels that the attacker goes by, as the loss takes them: those of the client, or what the leak betrays."""
    if plan.attacker.knowledge.labels == "known":
        return _of_client(plan, own)[1]
    victim: Any = plan.victims[group.victim]
    spec = plan.mechanisms[group.mechanism]
    guess = infer_labels(victim, shared, leak, plan.client.group)
    if plan.client.group > 1 or not (spec.only_noise or spec.clip_norm is not None):
        return guess
    # Without noise the one negative entry of the bias tells it for sure, whatever the features are.
    return jnp.where(own.sigma == 0, jnp.argmin(leak[victim.last_bias]).astype(guess.dtype), guess)


def infer_labels(victim: Any, shared: Shared, leak: Any, images: int) -> jax.Array:
    """The labels that the last layer's gradient betrays: a scalar for one image, (B,) in ascending order for more."""
    kernel, bias = leak[victim.last_kernel], leak[victim.last_bias]
    if images == 1:
        features = jax.vmap(lambda x: victim.features(shared.params, x))(shared.proxy).mean(0)
        return attacks.infer_label(kernel, bias, features).astype(jnp.int32)
    likely = jax.nn.softmax(victim.logits(shared.params, shared.proxy)).mean(0)
    return attacks.counts_to_labels(attacks.label_counts(bias, images, likely), images)


def attacker_match(plan: Plan, group: Group, shared: Shared, own: Private, out: Released, labels: Any) -> GradientMatching:
    """The objective of an attacker who knows what the plan says; of the private images it sees their statistics, if those."""
    victim, knows, leak, client = plan.victims[group.victim], plan.attacker.knowledge, out.leak, plan.local_sgd
    loss, y = victim.loss, labels
    if isinstance(victim, Victim) and victim.has_batch_norm and knows.statistics != "batch":
        known = knows.statistics == "known"
        loss = victim.loss_known_statistics if known else victim.loss_replaced_statistics
        y = (labels, victim.batch_statistics(shared.params, _of_client(plan, own)[0] if known else shared.proxy))
    if client is not None and knows.guesses_rate(client.steps):
        assert isinstance(victim, Victim)  # of others the last layer is not known, which is checked before
        sent = leak[victim.last_bias] * (client.learning_rate * client.steps)
        rate = guess_learning_rate(sent, client.batch_size or plan.client.group, victim.num_classes, client.steps)
        ratio = client.learning_rate / rate
        leak, client = jax.tree.map(lambda g: g * ratio, leak), dataclasses.replace(client, learning_rate=rate)
    weights = equal_layers(leak) if plan.equal_layers else None
    mechanism = out.mechanism if knows.adaptive else None
    return GradientMatching(shared.params, y, leak, loss, plan.distance, mechanism, weights, client)


def problem_of(plan: Plan, group: Group, shared: Shared, own: Private, match: GradientMatching, labels: Any = None) -> Problem:
    """What the attacker of a trial has, who goes by these labels."""
    victim, one = plan.victims[group.victim], plan.client.group == 1
    return Problem(
        told(shared.denoise, labels, victim, several=not one),
        shared.schedule,
        match,
        jnp.asarray(plan.prior.expected_image),
        own.sigma,
        shape=plan.prior.image_shape if one else (plan.client.group, *plan.prior.image_shape),
        clip=plan.prior.clip,
        first_dense=victim.first_dense,
        num_classes=victim.num_classes,
        truth=own.images[0] if one else None,
    )


def leaked(plan: Plan, group: Group, shared: Shared, own: Private) -> tuple[jax.Array, Released, Any, Problem]:
    """The key that a trial's method draws from, what its client lets out, the labels gone by, and what its attacker has."""
    k_noise, k_sample = jax.random.split(own.key)
    out = release(plan, group, shared, own, k_noise)
    own = own._replace(sigma=noise_of(out.mechanism, own.sigma))  # a user's mechanism may have levels in units of its own
    guess = guess_labels(plan, group, shared, own, out.leak)
    match = attacker_match(plan, group, shared, own, out, guess)
    return k_sample, out, guess, problem_of(plan, group, shared, own, match, guess)


def attack(plan: Plan, group: Group, shared: Shared, own: Private, method: Any = None) -> dict[str, Any]:
    """One trial: a client releases, an attacker reconstructs by `method` or the shared one, the result is scored."""
    method = method or shared.method
    k_sample, out, guess, problem = leaked(plan, group, shared, own)
    x, info = method(k_sample, problem)
    match = problem.match
    if info.label_logits is not None:
        guess = jnp.argmax(info.label_logits, axis=-1).astype(own.labels.dtype)
        match = dataclasses.replace(match, label=guess)
    known = plan.attacker.knowledge.labels == "known"
    return _result(
        x,
        own.images,
        info.trace,
        info.deviation,
        outcome=info.outcome,
        gradient_norm=l2(out.gradient, jax.tree.map(jnp.zeros_like, out.gradient)),
        noise_norm=l2(out.leak, out.gradient),
        leak_cosine=1 - cosine(out.leak, out.gradient),
        distance=match.in_l2()(x),
        label_accuracy=jnp.ones(()) if known else attacks.label_accuracy(jnp.atleast_1d(guess), own.labels),
    )
