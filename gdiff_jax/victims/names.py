"""Which array of a file is which parameter, by its name: prefixes and wrappers are taken off on either side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_TORCH = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# What torch's wrappers put between the names of layers; at the front any word may stand.
_WRAPPERS = {"module", "_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ATTRIBUTES = (".value", ".grad")  # after a parameter's name: NNX's, and torch's

Tied = Mapping[str, Sequence[str]]  # of a parameter the other names that it has


class Match(NamedTuple):
    """A reading of a file's names.

    Attributes:
      prefix: of the arrays that are meant, in the file.
      names: of each parameter the array's.
      left: other arrays below the prefix.
      beside: arrays that are not below it.
      wrapped: whether words of a wrapper were taken out of the middle of names.
    """

    prefix: str
    names: dict[str, str]
    left: tuple[str, ...]
    beside: tuple[str, ...]
    wrapped: bool = False


def torch_name(name: str) -> str:
    """`conv.weight` for `conv.kernel`, `norm.scale` and `pos.embedding`."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{_TORCH.get(leaf, leaf)}".removeprefix(".")


def leaf(name: str) -> str:
    """The last word of a file's name, as `weight` of `net/a/weight` and `a.weight.grad`."""
    dotted = _dotted(name)
    for what in _ATTRIBUTES:
        dotted = dotted.removesuffix(what)
    return dotted.rpartition(".")[2]


def matches(expected: Iterable[str], found: Iterable[str], tied: Tied | None = None) -> list[Match]:
    """All readings in which every parameter has an array; the same arrays are read in one way only."""
    readings: dict[frozenset[str], Match] = {}
    for reading in _readings(list(expected), list(found), tied or {}):
        if len(set(reading.names.values())) == len(list(expected)):  # each its own
            readings.setdefault(frozenset(reading.names.values()), reading)
    return list(readings.values())


def closest(expected: Iterable[str], found: Iterable[str], tied: Tied | None = None) -> Match:
    """The reading in which the fewest parameters lack an array."""
    return max(_readings(list(expected), list(found), tied or {}), key=lambda match: len(match.names))


def _readings(expected: list[str], found: list[str], tied: Tied) -> Iterable[Match]:
    ours, theirs = _plain(expected), _plain(found)
    for wrapped, change in ((False, lambda name: name), (True, _unwrapped)):
        if wrapped and not any(_WRAPPERS & set(name.split(".")) for name in [*ours, *theirs]):
            continue
        for prefix in _prefixes(theirs):
            below = {name: name[len(prefix) :].removeprefix(".") for name in theirs if _is_below(name, prefix)}
            by_name = {change(short): name for name, short in below.items()}
            if len(by_name) < len(below):
                continue  # two arrays would have one name
            for start in _common_prefixes(ours):
                names = {}
                for name, original in ours.items():
                    called = [name, *(other for other in tied.get(original, ()) if _is_below(other, start))]
                    shorts = [change(one[len(start) :].removeprefix(".")) for one in called]
                    array = next((by_name[one] for one in (*shorts, torch_name(shorts[0])) if one in by_name), None)
                    if array is not None:
                        names[original] = theirs[array]
                used = set(names.values())
                left = tuple(theirs[name] for name in below if theirs[name] not in used)
                beside = tuple(theirs[name] for name in theirs if name not in below)
                yield Match(prefix, names, left, beside, wrapped)


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _plain(names: list[str]) -> dict[str, str]:
    """The names by what they are with dots between keys, and without NNX's `.value`, or a `.grad`, where all have it."""
    dotted = {_dotted(name): name for name in names}
    for what in _ATTRIBUTES:
        if all(name.endswith(what) and name != what for name in dotted):
            dotted = {name.removesuffix(what): original for name, original in dotted.items()}
    return dotted


def _dotted(name: str) -> str:
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", name).replace("/", ".").strip(".")


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(names: Iterable[str]) -> list[str]:
    """All beginnings of names, "" first, the shorter before the longer."""
    parts = [name.split(".")[:-1] for name in names]
    found = {".".join(p[:k]) for p in parts for k in range(len(p) + 1)}
    return sorted(found, key=lambda prefix: (prefix.count(".") + bool(prefix), prefix))


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """Beginnings that all names share, "" first."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(parts[0][:k]) for k in range(shared + 1)]
