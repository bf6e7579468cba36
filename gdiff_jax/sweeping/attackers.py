"""Who attacks: what is known beside the weights and the leak, as named threat models."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gdiff_jax.errors import need
from gdiff_jax.options import option

LABELS = ("known", "inferred", "joint")
RATES = ("known", "guessed")
STATISTICS = ("known", "batch", "replaced")


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What an attacker knows of labels, mechanism, rate of the local steps and statistics of BatchNorms."""

    labels: str
    adaptive: bool
    local_rate: str
    statistics: str

    def guesses_rate(self, local_steps: int) -> bool:
        """Whether the rate of a client's local steps, of which there are several, has to be guessed."""
        return local_steps > 1 and self.local_rate == "guessed"


ATTACKERS = {
    # The worst case, the one to plan for: whatever a protocol may reveal is taken as revealed.
    "informed": Knowledge("known", True, "known", "known"),
    # The server of federated learning, honest but curious: it set the protocol and sees the update, nothing else.
    "server": Knowledge("inferred", True, "known", "batch"),
    # Somebody on the wire who also has the model: no word of the protocol, no label.
    "eavesdropper": Knowledge("inferred", False, "guessed", "replaced"),
}


@dataclasses.dataclass(frozen=True)
class Attacker:
    """A threat model by its name, and where it is changed."""

    subject: ClassVar[str] = "What the attacker knows"
    attacker: str = option(
        "informed", f"threat model: {', '.join(ATTACKERS)}; it sets the next four flags where they are not given"
    )
    labels: str = option("", f"labels are {', '.join(LABELS)} (with the image, by dlg; inferred for the others)")
    adaptive: bool | None = option(None, "the attacker knows the mechanism and matches through it")
    local_rate: str = option("", f"learning rate of the local steps: {', or '.join(RATES)} from the last bias")
    statistics: str = option("", "of BatchNorms: known, batch (the candidate's own) or replaced (of the prior's samples)")

    def check(self) -> None:
        choices = {"labels": LABELS, "local_rate": RATES, "statistics": STATISTICS}
        need(self.attacker in ATTACKERS, f"--attacker {self.attacker!r} is not known; known: {', '.join(ATTACKERS)}")
        for name, known in choices.items():
            value = getattr(self, name)
            need(value in ("", *known), f"--{name} {value!r} is not known; known: {', '.join(known)}")

    @property
    def knowledge(self) -> Knowledge:
        named = dataclasses.asdict(ATTACKERS[self.attacker])
        changed = {name: value for name in named if (value := getattr(self, name)) not in ("", None)}
        return Knowledge(**{**named, **changed})
