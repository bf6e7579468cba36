"""A plan in words: who attacks, what is released, with which settings."""

from __future__ import annotations

from gdiff_jax.sweeping.attackers import ATTACKERS
from gdiff_jax.sweeping.conditioning import described
from gdiff_jax.sweeping.plan import Plan


def threat_model(plan: Plan) -> str:
    """What the attacker knows."""
    known, unknown = _known(plan), _unknown(plan)
    name = plan.attacker.attacker
    text = f"Attacker '{name}'" + ("" if ATTACKERS[name] == plan.attacker.knowledge else ", changed by flags")
    text += f", who knows {', '.join(known[:-1])} and {known[-1]}."
    return " ".join([text, *(f"{u[0].upper()}{u[1:]}." for u in unknown)])


def _has_batch_norm(plan: Plan) -> bool:
    return any(victim.has_batch_norm for victim in plan.victims.values())


def _only_noise(plan: Plan) -> bool:
    return all(mechanism.only_noise for mechanism in plan.mechanisms.values())


def _known(plan: Plan) -> list[str]:
    knows, client, many = plan.attacker.knowledge, plan.client, plan.client.group > 1
    known = ["the victim's weights and loss"]
    if knows.labels == "known":
        known.append("the labels" if many else "the label")
    known.append("the prior")
    if many:
        known.append(f"that the gradient is the mean of {client.group} images")
    if client.local_steps > 1:
        rate = " and their rate" if knows.local_rate == "known" else ""
        known.append(f"that {client.local_steps} local steps were made{rate}")
    if _has_batch_norm(plan) and knows.statistics == "known":
        known.append("the statistics of the BatchNorms")
    if _only_noise(plan) and tuple(plan.mechanisms) != ("none",):
        known.append("the noise's distribution" if knows.adaptive else "that noise of mean zero was added")
    elif not _only_noise(plan) and knows.adaptive:
        known.append("the mechanism, which it matches through")
    return known


def _unknown(plan: Plan) -> list[str]:
    knows, unknown = plan.attacker.knowledge, []
    if knows.labels == "inferred":
        unknown.append("labels are inferred from the last layer's gradient")
    if knows.labels == "joint":
        unknown.append("DLG optimises the labels with the image; the other methods infer them from the last layer's gradient")
    if knows.guesses_rate(plan.client.local_steps):
        unknown.append("the local rate is guessed from the last layer's bias")
    if _has_batch_norm(plan) and knows.statistics != "known":
        source = {"batch": "the candidate's own", "replaced": "those of samples of the prior"}[knows.statistics]
        unknown.append(f"for the statistics of the BatchNorms {source} are taken")
    if not _only_noise(plan) and not knows.adaptive:
        unknown.append("the mechanism is not known: the leak is taken for the gradient")
    return unknown


def released(plan: Plan) -> str:
    """What of the images is released, where it is not the gradient of one."""
    c = plan.client
    of = f", {c.group} to a gradient, matched to the truth by assignment" if c.group > 1 else ""
    batch = f" of {c.local_batch} images" if c.local_batch else ""
    rate = f"at rate {c.local_learning_rate:g}"
    return of + (f", released after {c.local_steps} local steps{batch} {rate}" if c.local_steps > 1 else "")


def settings(plan: Plan) -> str:
    """The methods that ran, with their options, and what guided them."""
    through_prior = all(getattr(method, "through_prior", True) for method in plan.methods.values())
    where = "" if through_prior else " at x0hat, without a derivative of the prior"
    guided = f"guided by {getattr(plan.distance, '__name__', plan.distance)}{where}" + (
        ", layers weighted alike" if plan.equal_layers else ""
    )
    told = described(plan.prior, plan.victims, plan.labels)
    return ", ".join([*(method.describe() for method in plan.methods.values()), guided, *told])
