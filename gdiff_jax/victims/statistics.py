"""A BatchNorm's statistics among a victim's params: floats as weights are, of which no gradient leaks."""

from __future__ import annotations

import collections
import re
from typing import Any

import jax

Path = tuple[Any, ...]


def first_statistic(params: Any) -> Path | None:
    """The path of one, as far as it can be told, at any depth; None where there is none.

    NNX and Equinox tell by a type, Linen by the name of a collection, Haiku by the module of a moving average. Where a
    collection has lost its name, as in a tuple (params, batch_stats), a mean or a var is told by the scale or bias that
    another entry has in its place.
    """
    typed = lambda node: type(node).__name__ in ("BatchStat", "StateIndex") and bool(jax.tree.leaves(node))
    leaves = jax.tree.leaves_with_path(params, is_leaf=typed)
    for path, node in leaves:
        names = [_name(key) for key in path]
        if typed(node) or "batch_stats" in names or any(re.search(r"(^|/)(mean|var)_ema$", name) for name in names):
            return path
    affine = collections.defaultdict(set)
    for path, _ in leaves:
        for place, entry in _places(path, ("scale", "bias")):
            affine[place].add(entry)
    in_place = (path for path, _ in leaves for place, entry in _places(path, ("mean", "var")) if affine[place] - {entry})
    return next(in_place, None)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", "")))  # of a dict's or an attribute's; a tuple's entries have none


def _places(path: Path, last: tuple[str, ...]) -> list[tuple[Path, Any]]:
    """Of a leaf with one of these names, in a layer within a tuple: its path without the tuple's entry, and that entry."""
    if not path or _name(path[-1]) not in last:
        return []
    within = [i for i, key in enumerate(path[:-2]) if isinstance(key, jax.tree_util.SequenceKey)]
    return [((path[:i], path[i + 1 : -1]), path[i]) for i in within]
