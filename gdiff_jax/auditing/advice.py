"""What an audit says to those who build: where the leak comes from, what to change, how to check again. Pure NumPy."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from gdiff_jax.auditing import against_bound, worst
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.summary import levels, smallest_noise


def advice(record: AuditRecord) -> list[str]:
    """For those who build: where the leak comes from, what to change, and how to check again."""
    change = [] if record.about.get("unfinished") else _change(record)
    return [*how(record), *_of_module(record), *_layers(record), *change]


def how(record: AuditRecord) -> list[str]:
    """How `auto` came by its pictures: by algebra, or by search alone, which is no evidence that there is nothing to find."""
    lines: dict[str, list[str]] = defaultdict(list)  # noise levels by what is said of them
    searched = False
    for sigma in record.sigmas:
        rows = [r["how"] for r in record.at(sigma) if r.get("how")]
        solved = [text for text in rows if text.startswith("solved: ")]
        others = [text for text in rows if text not in solved]
        searched |= any("searched for" in text for text in others)
        if solved:
            lines[f"{len(solved)} of {len(rows)} leaks were {solved[0]}"].append(f"{sigma:.3g}")
        if others:
            lines[f"{len(others)} of {len(rows)} leaks were {others[0]}"].append(f"{sigma:.3g}")
    said = [f"At sigma {', '.join(levels)}: {text}." for text, levels in lines.items()]
    if searched:
        said.append("That a search finds little does not show that little can be found: see what the information limits allow.")
    return said


def _of_module(record: AuditRecord) -> list[str]:
    """What was assumed or found of a torch module, which does not say all that its gradient depends on."""
    said = record.about.get("module")
    return [f"Of the module: {'; '.join(said)}."] if said else []


def _layers(record: AuditRecord) -> list[str]:
    """Which array of the parameters answers most to the pixels."""
    shares = (record.theory or {}).get("shares")
    if not shares or not max(shares.values()) > 0:
        return []
    most = max(shares, key=shares.__getitem__)
    return [f"Of all that the gradient answers to the pixels {shares[most]:.0%} is in {most}."]


def _needed(record: AuditRecord) -> list[tuple[float, str]]:
    """The noise that each figure of the audit asks for, 0 where none, and against what that is.

    Where it is interpolated it is the next level, which was tried.
    """
    tried = lambda noise: next((sigma for sigma in record.sigmas if sigma >= noise), math.inf) if noise > 0 else 0.0
    needed = [(tried(smallest_noise(record).value), "")]
    needed += [(tried(leaking.noise), " for the image that leaks most") for leaking in worst.ranked(record)[:1]]
    if named := against_bound.seldom_named(record):
        sigma = named.noise.value if named.noise.value > record.sigmas[0] else 0.0
        needed.append((sigma, " against who knows the candidates"))
    return needed


def _change(record: AuditRecord) -> list[str]:
    """What follows of the figures for those who can change the release, and how that is checked."""
    about = record.about
    if not record.has_truth:
        return ["How close an attacker comes is told by an audit of the model with images of your own."]
    lines, by_command = list[str](), "victim_given" in about
    by_mechanism = f", by {about['mechanism']}" if by_command else ""
    noise, against = max(_needed(record), key=lambda pair: pair[0])
    if against_bound.findings(record):
        lines.append("First mend the mechanism: the other figures are of it as it is.")
    elif noise == 0:
        lines.append("These attacks ask for no change, which is no proof that none is needed.")
    elif math.isinf(noise):
        lines.append(f"More noise is needed{against}: try more than sigma {record.sigmas[-1]:.3g}.")
    else:
        lines.append(f"Release with noise of at least sigma {noise:.3g}{against}{by_mechanism}.")
    norms = [r["gradient_norm"] for r in record.at(record.sigmas[0]) if r["gradient_norm"]]
    if norms and any((g["reason"] or "").startswith("no clipping") for g in record.guarantees):
        norm = f"{np.median(norms):.2g}"
        clip = f"clip:{norm}+gaussian" if by_command else f"Chain((Clip({norm}), GaussianNoise(sigma)))"
        lines.append(f"A guarantee takes clipping as well, for instance to the gradients' median norm, by {clip}.")
    compare = "audit.py compare BEFORE AFTER" if by_command else "gd.compare(before, after)"
    fail_if = f"; --fail_if='recovered > {about['share']:g}' keeps a pipeline to it" if by_command else ""
    return [
        *lines,
        *_few(record),
        f"Then audit again with the same images and seed, and see what changed by {compare}{fail_if}.",
    ]


def _few(record: AuditRecord) -> list[str]:
    """Where none or few of these images come back at the largest noise, and of others too many may."""
    last, share = levels(record)[-1], record.about["share"]
    if not last.recovered.value < share <= last.recovered.high:
        return []
    of = "images" if record.about["group"] == 1 else "groups"
    return [
        f"With {len({r['leak'] for r in record.attacks})} {of} even a share of {last.recovered.value:.0%} may be one of "
        f"{last.recovered.high:.0%}: audit more of them before you rely on the {share:.0%}."
    ]
