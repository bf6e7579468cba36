"""Who attacks: what is known beside the weights and the leak, as named threat models, and in words."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments.victim_files import has_batch_norm

if TYPE_CHECKING:
    from experiments.inputs import SweepConfig

LABELS = ("known", "inferred", "joint")
RATES = ("known", "guessed")
STATISTICS = ("known", "batch", "replaced")


@dataclasses.dataclass(frozen=True)
class Attacker:
    """A threat model: the values of the flags of these names."""

    labels: str
    adaptive: bool
    local_rate: str
    statistics: str


ATTACKERS = {
    # The worst case, the one to plan for: whatever a protocol may reveal is taken as revealed.
    "informed": Attacker("known", True, "known", "known"),
    # The server of federated learning, honest but curious: it set the protocol and sees the update, nothing else.
    "server": Attacker("inferred", True, "known", "batch"),
    # Somebody on the wire who also has the model: no word of the protocol, no label.
    "eavesdropper": Attacker("inferred", False, "guessed", "replaced"),
}


def with_attacker(c: SweepConfig, given: set[str]) -> SweepConfig:
    """`c` with what its --attacker knows, but for the flags that the user gave."""
    knows = dataclasses.asdict(ATTACKERS[c.attacker])
    return dataclasses.replace(c, **{name: value for name, value in knows.items() if name not in given})


def threat_model(c: SweepConfig) -> str:
    """What the attacker knows, in words."""
    many, normed = c.group > 1, any(map(has_batch_norm, c.victims))
    known = ["the victim's weights and loss"]
    if c.labels == "known":
        known.append("the labels" if many else "the label")
    known.append("the prior")
    if many:
        known.append(f"that the gradient is the mean of {c.group} images")
    if c.local_steps > 1:
        known.append(f"that {c.local_steps} local steps were made" + (" and their rate" if c.local_rate == "known" else ""))
    if normed and c.statistics == "known":
        known.append("the statistics of the BatchNorms")
    noises_only = all(name in ("gaussian", "laplace", "uniform", "none") for name in c.mechanisms)
    if noises_only and c.mechanisms != ("none",):
        known.append("the noise's distribution" if c.adaptive else "that noise of mean zero was added")
    elif not noises_only and c.adaptive:
        known.append("the mechanism, which it matches through")
    unknown = []
    if c.labels == "inferred":
        unknown.append("labels are inferred from the last layer's gradient")
    if c.labels == "joint":
        unknown.append("DLG optimises the labels with the image; the other methods infer them from the last layer's gradient")
    if c.local_steps > 1 and c.local_rate == "guessed":
        unknown.append("the local rate is guessed from the last layer's bias")
    if normed and c.statistics != "known":
        source = {"batch": "the candidate's own", "replaced": "those of samples of the prior"}[c.statistics]
        unknown.append(f"for the statistics of the BatchNorms {source} are taken")
    if not noises_only and not c.adaptive:
        unknown.append("the mechanism is not known: the leak is taken for the gradient")
    text = f"Attacker '{c.attacker}'" + ("" if ATTACKERS[c.attacker] == _knowledge(c) else ", changed by flags")
    text += f", who knows {', '.join(known[:-1])} and {known[-1]}."
    return " ".join([text, *(f"{u[0].upper()}{u[1:]}." for u in unknown)])


def _knowledge(c: SweepConfig) -> Attacker:
    return Attacker(**{f.name: getattr(c, f.name) for f in dataclasses.fields(Attacker)})
