"""In which settings audits differ: one of them is compared, the others stand in its way. Pure Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gdiff_jax.auditing.record import AuditRecord

SHORT = 12  # digits of a hash

# What a reader may want to compare, and the settings that belong to each. Versions and machines are no such thing: see OTHER.
TOPICS = {
    "victim": ("victim", "weights", "parameters", "module", "weights and loss"),
    "defence": ("mechanism", "clip_norm"),
    "client": ("group", "gradient"),
    "attacker": ("attacker", "labels", "adaptive", "local_rate", "statistics", "methods", "attacks", "prior", "steps"),
    "random numbers": ("seed",),
    "measure": ("threshold", "share", "candidates", "candidates_from", "recognised_by", "delta"),
    "extent": ("images", "num_images", "images' hash", "images_classes", "seeds", "noise levels"),
}
ALIKE = ("measure", "extent")  # what is compared is measured alike, of the part that all have; see the warnings for what is not
OTHER = "made with"
LEFT_OUT = {
    *("started", "command", "seconds", "film_steps", "failed_parts", "doubt", "unfinished", "has_truth", "has_lpips"),
    *("no_lpips", "hashes", "victim_given", "threat_model", "assumed", "images_notes"),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One that is not the same in all audits.

    Attributes:
      topic: of `TOPICS`, or `OTHER`.
      name: of the setting.
      values: as text, of each audit.
    """

    topic: str
    name: str
    values: tuple[str, ...]


def settings_apart(audits: Sequence[AuditRecord]) -> list[Setting]:
    """The settings in which the audits differ, by topic."""
    every = [_settings(audit) for audit in audits]
    names = list(dict.fromkeys(name for own in every for name in own))
    topic_of = {name: topic for topic, some in TOPICS.items() for name in some}
    found = []
    for name in names:
        values = tuple(_text(own.get(name)) for own in every)
        if len(set(values)) > 1:
            found.append(Setting(topic_of.get(name, OTHER), name, values))
    order = [*TOPICS, OTHER]
    return sorted(found, key=lambda setting: order.index(setting.topic))


def topics_apart(settings: Sequence[Setting]) -> list[str]:
    """What may make a difference: neither what they were made with, nor what the comparison makes `ALIKE`."""
    return [topic for topic in TOPICS if topic not in ALIKE and any(setting.topic == topic for setting in settings)]


def _settings(audit: AuditRecord) -> dict[str, Any]:
    """Of an audit all that may make a difference, by name."""
    about = audit.about
    found = {name: value for name, value in about.items() if name not in LEFT_OUT}
    versions = found.pop("versions", {})
    hashes = about.get("hashes", {})
    # A file of the same name may hold other weights.
    found["weights and loss"] = [str(sha256)[:SHORT] for sha256 in hashes.get("trained_victims", {}).values()]
    found["images' hash"] = str(hashes.get("images", ""))[:SHORT]
    row = audit.attacks[0]
    # The threat model's text names the mechanism, so that a defence would seem to change the attacker.
    found |= {name: row.get(name) for name in ("attacker", "labels", "adaptive", "local_rate", "statistics")}
    found["noise levels"] = [f"{sigma:.3g}" for sigma in audit.sigmas]
    return found | {f"{name}, version": version for name, version in versions.items()}


def _text(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} -> {inner}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
