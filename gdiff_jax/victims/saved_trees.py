"""Weights and gradients that another training loop saved, of JAX or of torch, by parameter name.

Names are compared with dots for slashes; a prefix that all of a file's names or all of the victim's have is taken off
(`names`). An array that is there under the name of its parameter is taken as it is. One that is there under torch's name for it
(`weight` for `kernel`, `scale` and `embedding`) has torch's layout, and is turned as what the loss does with it asks
(`layouts`): (out, in) becomes (in, out), OIHW becomes HWIO, a table stays. What a torch network flattened was (C, H, W), our
rows are (H, W, C), and no file says so: where a dense layer's input is no other layer's output its order must be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gdiff_jax import files, tensor_files
from gdiff_jax.modules import Params
from gdiff_jax.victims import layouts, names, unnamed
from gdiff_jax.victims.tree_files import Tree, read
from gdiff_jax.victims.uses import Use, Uses

FROZEN = "what the client does not train is to be frozen in the victim, by requires_grad_(False) in a torch module"
ALONE = "save the victim's parameters alone, under their names"
UNEQUAL = "tied, but not equal"

Orders = dict[str, tuple[int, int, int] | None]  # by a dense kernel's name: (C, H, W); None: rows as they are


class OfModule(NamedTuple):
    """What a torch module tells of its files, which have its own layouts.

    Attributes:
      trees: arrays by name, in whose order arrays without names may be: what is trained, all parameters, the state dict.
      tied: of a parameter the other names that it has.
    """

    trees: tuple[Mapping[str, Any], ...]
    tied: names.Tied


class _Unknown(Exception):
    """What must be told of an array: the kind of problem, and the array with the remedy."""


def parse_orders(texts: tuple[str, ...]) -> Orders:
    """`fc1.kernel:16x8x8`: its rows are flattened (C, H, W) = (16, 8, 8); `fc1.kernel:as-is`: they are in our order.

    Raises:
      ValueError: naming a text that is neither.
    """
    orders: Orders = {}
    for text in texts:
        name, colon, shape = text.partition(":")
        parts = shape.split("x")
        if shape == "as-is":
            orders[name] = None
        elif colon and len(parts) == 3 and all(p.isdigit() and int(p) > 0 for p in parts):
            c, h, w = map(int, parts)
            orders[name] = (c, h, w)
        else:
            raise ValueError(f"{text!r} is not NAME:CxHxW, such as fc1.kernel:16x8x8, nor NAME:as-is")
    return orders


def fit(
    path: str,
    expected: Params,
    orders: Orders,
    uses: Callable[[], Uses] | None = None,
    *,
    reached: Callable[[], set[str]] | None = None,
    beside: Callable[[Mapping[str, np.ndarray]], None] | None = None,
    weights: bool = False,
    module: OfModule | None = None,
    say: Callable[[str], None] = files.say,
) -> dict[str, np.ndarray]:
    """The file's arrays as the parameters `expected`, each used once, in float32.

    None in a gradient's place is zero where the loss has no gradient of the parameter, and refused where it has.

    Args:
      path: of a file that `tree_files.read` reads.
      expected: the victim's parameters.
      orders: of rows that torch flattened.
      uses: what the victim's loss does with each, asked only where layouts may differ; without, names alone tell layouts.
      reached: those that the victim's loss has a gradient of, asked only where a gradient is None; without, it is all.
      beside: takes the arrays that lie beside the victim's own, by name, such as statistics of a collection of their own.
      weights: whether weights are meant, and not what an optimiser keeps of the same shapes.
      module: what is known of a torch module's files.
      say: takes a line of what was taken off names or left aside.

    Raises:
      ValueError: with all that is missing, unexpected, of another shape, not finite, no floats, or of an order or a layout
        that must be told.
    """
    tree = read(path)
    if weights:
        tree = tree._replace(nones=())
    unknown = [name for name in orders if name not in expected]
    if unknown:
        raise ValueError(f"flattened {unknown[0]}: the victim has no such array; it has {', '.join(expected)}")
    if module and orders:
        raise ValueError(f"flattened {next(iter(orders))}: a torch module's files have its own order; leave it away")
    found = _named(path, tree, expected, weights, module, say)
    if beside:
        own = set(found.values())
        beside({name: value for name, value in tree.arrays.items() if name not in own})
    none = [name for name in expected if found[name] in tree.nones]
    of_torch = {name for name, original in found.items() if names.leaf(original) == "weight" and not module}
    used = uses() if uses and of_torch else {}
    arrays = [_Array(name, tree.arrays[found[name]], expected[name], used.get(name)) for name in expected if name not in none]
    told = layouts.is_torchs([a.layouts for a in arrays if a.name in of_torch and names.leaf(a.name) == "weight"])
    with_one = reached() if reached and none else set(expected)
    lacking = [name for name in none if name in with_one]
    problems = {"None, though the loss has a gradient of it": lacking} if lacking else {}
    fitted = {name: np.zeros(expected[name].shape, np.float32) for name in none}
    for array in arrays:
        name, order = array.name, orders.get(array.name, ...)
        try:
            if name not in of_torch:
                value = array.value
            elif names.leaf(name) == "weight":
                value = _under_one_name(array, told, tree.is_torch, order)
            else:
                dense = array.target.ndim == 2 and layouts.may_be_dense(array.uses)
                asked = dense and _is_flattened(name, array.target.shape[array.rows], expected)
                value = _from_torch(array, asked, order)
            fitted[name] = _as_floats(name, value, array.target)
        except _Unknown as error:
            kind, text = error.args
            problems.setdefault(kind, []).append(text)
    if problems:
        remedy = f"; {FROZEN}" if lacking else ""
        raise ValueError(f"{path} does not fit the victim; {tensor_files.listed(problems)}{remedy}")
    if none:
        say(f"{path}: None is a gradient of zero of what the loss does not use, or detaches: {', '.join(none)}")
    return {name: fitted[name] for name in expected}


class _Array(NamedTuple):
    """An array of a file, and the parameter that it is."""

    name: str
    value: np.ndarray
    target: Any
    uses: set[Use] | None

    @property
    def axes(self) -> layouts.Axes | None:
        return layouts.torch_axes(self.name, self.target.ndim, self.uses)

    @property
    def rows(self) -> int:
        return layouts.rows_of(self.target.ndim, self.uses)

    @property
    def layouts(self) -> tuple[np.ndarray, Any, layouts.Axes]:
        """As it is where torch's layout is not known."""
        return self.value, self.target, self.axes or tuple(range(self.target.ndim))


def _under_one_name(array: _Array, told: bool | None, is_torch: bool, order: Any) -> np.ndarray:
    """Of `weight` on both sides: as it is, or turned where the file's other arrays say that it has torch's layout."""
    name, (value, target, axes) = array.name, array.layouts
    if axes == tuple(range(target.ndim)):
        return _from_torch(array, False, order) if is_torch and target.ndim > 1 and array.axes else value
    if told is None and order is ... and value.shape == target.shape == layouts.turned(value, axes).shape:
        raise _Unknown("of an unknown layout", f"{name} {value.shape} (flattened={name}:as-is says that it is the victim's)")
    return _from_torch(array, False, order) if told or order not in (None, ...) else value


def _from_torch(array: _Array, asked: bool, order: Any) -> np.ndarray:
    """The array in our layout; the order of its rows must be told if `asked`, or where it is multiplied with a map."""
    name, value, target, axes = array.name, array.value, array.target, array.axes
    if axes is None and (target.ndim > 2 or value.shape == target.shape):  # a matrix that fits when turned is one of torch's
        remedy = f"torch's layout of it is not known; save it as {name}, in the victim's"
        raise _Unknown("of an unknown layout", f"{name} {value.shape} ({remedy})")
    value = layouts.turned(value, (1, 0) if axes is None else axes)
    if value.ndim != 2 or value.shape != target.shape:
        return value
    if order is ... and (asked or layouts.takes_map(array.uses)):
        raise _Unknown("of an unknown order", f"{name} {value.shape} (say flattened={name}:CxHxW, or as-is)")
    return value if order is ... else _reordered(name, value, order, array.rows)


def _named(
    path: str,
    tree: Tree,
    expected: Params,
    weights: bool,
    module: OfModule | None,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Of each parameter the name of its array, or of its None, in the file."""
    trees, tied = module or OfModule((expected,), {})
    there = [*tree.arrays, *tree.nones]
    of_optimiser = lambda match: weights and any(part.startswith("opt") for part in match.prefix.split("."))
    found = [match for match in names.matches(expected, there, tied) if not of_optimiser(match)]
    if len(found) > 1:
        several = ", ".join(match.prefix or "the top" for match in found)
        raise ValueError(f"{path} holds several trees that fit the victim ({several}): save the one that is meant alone")
    ordered = None if found else unnamed.in_order(path, tree, expected, trees, module is not None)
    if ordered:
        twins = {other: name for name, others in tied.items() for other in others if {name, other} <= ordered.keys()}
        unequal = [f"{other}, {name}" for other, name in twins.items() if not _is_equal(tree, ordered[other], ordered[name])]
        if unequal:
            raise ValueError(f"{path} does not fit the victim; {tensor_files.listed({UNEQUAL: unequal})}; {ALONE}")
        aside = [name for name in ordered if name not in expected and name not in twins]
        more = [name for name in aside if ordered[name] in tree.arrays]
        rest = f"; {tensor_files.listed({'left aside': more})}" if more else ""
        say(f"{path}: arrays without names are taken in the order of the victim's, which their shapes confirm{rest}")
        return {name: ordered[name] for name in expected}
    match = found[0] if found else names.closest(expected, there, tied)
    missing = [n if (t := names.torch_name(n)) == n else f"{n} or {t}" for n in expected if n not in match.names]
    below = [name for name in tree.others if match.prefix and name.startswith(f"{match.prefix}.")]
    arrays = list(match.names.values())
    shared = [name for name, array in match.names.items() if arrays.count(array) > 1]
    # What has no gradient may lie beside: a module's buffers, what it does not train, and a tied parameter's other names.
    short = {name: name.removeprefix(f"{match.prefix}.") for name in match.left}
    aside = [name for name in match.left if name in tree.nones or any(short[name] in one for one in trees)]
    left = sorted({*match.left, *below}.difference(aside))
    first = {other: match.names.get(name) for name, others in tied.items() for other in others}
    twins = {name: one for name in aside if (one := first.get(short[name])) is not None}
    unequal = [f"{name}, {one}" for name, one in twins.items() if not _is_equal(tree, name, one)]
    problems = {"missing": missing, "one array for several": shared, UNEQUAL: unequal, "not of the victim": left}
    if any(problems.values()):
        remedy = unnamed.STATE_DICT if weights and module and missing else ALONE
        raise ValueError(f"{path} does not fit the victim; {tensor_files.listed(problems)}; {remedy}")
    aside = [name for name in aside if name not in twins]
    beside = [*match.beside, *aside, *(name for name in tree.others if name not in below)]
    if beside:
        under = f"the arrays under {match.prefix} are taken" if match.prefix else "its arrays are taken"
        say(f"{path}: {under}, {tensor_files.listed({'left aside': beside})}")
    elif (match.prefix and match.prefix != "params") or match.wrapped:
        what = "what a wrapper put into its names" if match.wrapped else f"{match.prefix}. before all names"
        say(f"{path}: {what} is taken off")
    return match.names


def _is_equal(tree: Tree, name: str, other: str) -> bool:
    if name in tree.nones or other in tree.nones:
        return name in tree.nones and other in tree.nones
    return np.array_equal(tree.arrays[name], tree.arrays[other])


def _as_floats(name: str, value: np.ndarray, target: Any) -> np.ndarray:
    """A finite float32 array of the parameter's shape; a buffer of whole numbers as it is."""
    if np.asarray(target).dtype.kind in "iub" and value.shape == target.shape:
        return value
    if value.dtype.kind not in "fV":
        scale = ": integers have a scale that the file does not say; save them times it, as floats" * (value.dtype.kind in "iu")
        raise _Unknown("no floats", f"{name} is {value.dtype}{scale}")
    if value.shape != target.shape:
        more = ", with an axis more; give one leak of one example" * (value.shape[1:] == target.shape)
        raise _Unknown("of another shape", f"{name} {value.shape}, the victim has {target.shape}{more}")
    with np.errstate(over="ignore"):
        floats = np.array(value, np.float32, order="C")  # not ascontiguousarray, which makes a scalar an array of one
    if not np.isfinite(floats).all():
        raise _Unknown("not finite", name)
    return floats


def _is_flattened(name: str, width: int, expected: Params) -> bool:
    """Whether a dense layer's input is no other layer's output, by its width: then it is a flattened image or feature map."""
    own = name.rpartition(".")[0] + ".bias"
    widths = {value.shape[-1] for other, value in expected.items() if value.ndim == 1 and other != own}
    return name.endswith("kernel") and width not in widths


def _reordered(name: str, kernel: np.ndarray, order: tuple[int, int, int] | None, axis: int) -> np.ndarray:
    """A dense kernel whose input goes along `axis`, from (C, H, W) to (H, W, C)."""
    if order is None:
        return kernel
    rows = np.moveaxis(kernel, axis, 0)
    if math.prod(order) != len(rows):
        shape = "x".join(map(str, order))
        raise ValueError(f"flattened {name}:{shape}: {name} has {len(rows)} rows, not {math.prod(order)}")
    ours = rows.reshape(*order, -1).transpose(1, 2, 0, 3).reshape(rows.shape)
    return np.moveaxis(ours, 0, axis)
