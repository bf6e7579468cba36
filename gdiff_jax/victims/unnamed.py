"""Arrays that a file holds in a list, without names, taken in the order of the victim's own where that is sure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gdiff_jax import tensor_files
from gdiff_jax.victims.tree_files import Tree

_BY_NAME = "torch.save({n: p.grad for n, p in model.named_parameters()}, 'leak.pt')"
STATE_DICT = "save module.state_dict(), which has buffers and what is frozen too"


def in_order(
    path: str, tree: Tree, expected: Iterable[str], trees: Sequence[Mapping[str, Any]], of_module: bool
) -> dict[str, str] | None:
    """Of each array of the victim the name of the file's; None where the file's arrays have names.

    Args:
      expected: names of the arrays that are asked for; a tree without one of them will not do.
      path: of the file, for errors.
      tree: what it holds; what is None in a list has its place there too.
      trees: arrays by name, in whose order the list may be.
      of_module: whether they are a torch module's, whose order and layouts such a list has. Of a loss on JAX the order is that
        of `jax.tree.leaves`, and is sure only where no two shapes are equal and one shows whose layout it is.

    Raises:
      ValueError: where the order is not sure, or the list is none of the trees, or of one that lacks what is expected.
    """
    ordered = _numbered(tree)
    if ordered is None:
        return None
    shapes = [tree.arrays[name].shape if name in tree.arrays else None for name in ordered]
    ours = {name: np.shape(value) for name, value in trees[0].items()}
    uneven = any(len(shape) > 1 and shape != shape[::-1] for shape in ours.values())
    if not of_module and (tree.is_torch or len(set(ours.values())) < len(ours) or not uneven):
        raise ValueError(
            f"{path} is a list of {len(shapes)} arrays without names, and shapes do not tell which is which; save them by the "
            f"parameters' names, such as {_BY_NAME}, or numpy.savez with names"
        )
    for one in trees:
        fits = (shape in (None, np.shape(value)) for shape, value in zip(shapes, one.values(), strict=False))
        if len(one) == len(shapes) and all(fits):
            if missing := [name for name in expected if name not in one]:
                raise ValueError(
                    f"{path} is a list of {len(shapes)} arrays without names, in the order of the module's parameters; "
                    f"{tensor_files.listed({'missing': missing})}; {STATE_DICT}"
                )
            return dict(zip(one, ordered, strict=True))
    pairs = zip(shapes, ours.items(), strict=False)
    differ = [f" (a {shape} for {name} {own})" for shape, (name, own) in pairs if shape not in (None, own)]
    raise ValueError(
        f"{path} is a list of {len(shapes)} arrays without names, and not of the victim's {len(ours)} parameters in their order"
        f"{differ[0] if differ else ''}; save all of them, of a torch module [p.grad for p in module.parameters()], or arrays "
        f"by name, such as {_BY_NAME}"
    )


def _numbered(tree: Tree) -> list[str] | None:
    """The file's names of a list's entries, in order."""
    number = lambda name: re.fullmatch(r"(.*\.)?(?:arr_)?(\d+)", name)
    numbers = [number(name) for name in tree.arrays]
    if not all(numbers) or len({n and n[1] for n in numbers}) > 1:
        return None
    numbers += [n for n in map(number, tree.nones) if n and numbers[0] and n[1] == numbers[0][1]]
    return [name for _, name in sorted((int(n[2]), n[0]) for n in numbers if n)]
