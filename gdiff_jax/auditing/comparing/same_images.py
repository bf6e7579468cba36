"""Which images audits have in common, as far as their files tell. Pure Python."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from gdiff_jax.auditing.record import AuditRecord

Identity = tuple[str, int]  # of an image: what its pixels are known by, and which of several alike


def identities(audits: Sequence[AuditRecord], names: Sequence[str]) -> tuple[list[dict[int, Identity]], bool]:
    """Of each audit, by place, what its images are known by; and whether that is their pixels, or the hash of the whole set.

    Raises:
      ValueError: where neither tells.
    """
    own = [{row["image"]: row.get("image_sha256") for row in audit.attacks} for audit in audits]
    if all(all(hashes.values()) for hashes in own):
        return [_numbered(hashes) for hashes in own], True
    sets = [audit.about.get("hashes", {}).get("images") for audit in audits]
    told = ", ".join(f"{name}: {str(sha256)[:12]}" for name, sha256 in zip(names, sets, strict=True))
    if None in sets or len(set(sets)) > 1:
        raise ValueError(
            "it cannot be told which images these audits share: one of them, made by an earlier version, does not "
            f"say it of each image, and the sets' hashes ({told}) are not the same; audit both again with the same --images"
        )
    return [{image: (str(image), 0) for image in sorted(hashes)} for hashes in own], False


def _numbered(hashes: dict[int, str | None]) -> dict[int, Identity]:
    """Images of the same pixels within a set are told apart by their order."""
    seen: Counter[str] = Counter()
    found = {}
    for image in sorted(hashes):
        sha256 = str(hashes[image])
        found[image] = sha256, seen[sha256]
        seen[sha256] += 1
    return found


def in_common(audits: Sequence[AuditRecord], known_by: Sequence[dict[int, Identity]]) -> set[tuple[Identity, int]]:
    """(image, seed) that each audit attacked."""
    each = [{(own[r["image"]], r["seed"]) for r in audit.attacks} for audit, own in zip(audits, known_by, strict=True)]
    return set.intersection(*each)


def restricted(
    audit: AuditRecord, own: dict[int, Identity], kept: set[tuple[Identity, int]], first: AuditRecord
) -> AuditRecord:
    """The audit of these images and seeds alone, by what the first takes for recovered."""
    trials = [row for row in audit.trials if row["image"] in own and (own[row["image"]], row["seed"]) in kept]
    about = {**audit.about, "threshold": first.about["threshold"], "share": first.about["share"]}
    about["num_images"] = len({row["image"] for row in trials})
    return dataclasses.replace(audit, about=about, trials=trials)


def labels_apart(audits: Sequence[AuditRecord], common: Sequence[Sequence[int]]) -> int:
    """How many images in common, each by its places in the audits, have another label in one of them."""
    labels = [{row["image"]: row.get("label") for row in audit.attacks} for audit in audits]
    differs = lambda places: len({str(own[place]) for own, place in zip(labels, places, strict=True)}) > 1
    return sum(map(differs, common))
