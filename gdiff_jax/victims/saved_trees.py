"""Weights and gradients that another training loop saved, of JAX or of torch, by parameter name.

Names are compared with dots for slashes; a prefix that all of a file's names or all of the victim's have is taken off
(`names`). An array that is there under the name of its parameter is taken as it is. One that is there under torch's name for it
(`weight` for `kernel`, `scale` and `embedding`) has torch's layout, and is turned as what the loss does with it asks
(`layouts`): (out, in) becomes (in, out), OIHW becomes HWIO, a table stays. What a torch network flattened was (C, H, W), our
rows are (H, W, C), and no file says so: where a dense layer's input is no other layer's output its order must be told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gdiff_jax import files, tensor_files
from gdiff_jax.modules import Params
from gdiff_jax.victims import layouts, names
from gdiff_jax.victims.tree_files import Tree, read
from gdiff_jax.victims.uses import Use, Uses

Orders = dict[str, tuple[int, int, int] | None]  # by a dense kernel's name: (C, H, W); None: rows as they are


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
    weights: bool = False,
    in_order: Sequence[Mapping[str, Any]] = (),
    say: Callable[[str], None] = files.say,
) -> dict[str, np.ndarray]:
    """The file's arrays as the parameters `expected`, each used once, in float32.

    Args:
      path: of a file that `tree_files.read` reads.
      expected: the victim's parameters.
      orders: of rows that torch flattened.
      uses: what the victim's loss does with each, asked only where layouts may differ; without, names alone tell layouts.
      weights: whether weights are meant, and not what an optimiser keeps of the same shapes.
      in_order: of a torch module, whose layouts its files have: trees in whose order arrays without names may be.
      say: takes a line of what was taken off names or left aside.

    Raises:
      ValueError: with all that is missing, unexpected, of another shape, not finite, no floats, or of an order or a layout
        that must be told.
    """
    tree = read(path)
    unknown = [name for name in orders if name not in expected]
    if unknown:
        raise ValueError(f"flattened {unknown[0]}: the victim has no such array; it has {', '.join(expected)}")
    if in_order and orders:
        raise ValueError(f"flattened {next(iter(orders))}: a torch module's files have its own order; leave it away")
    found = _named(path, tree, expected, weights, in_order, say)
    of_torch = {name for name, original in found.items() if _leaf(original) == "weight" and not in_order}
    used = uses() if uses and of_torch else {}
    arrays = [_Array(name, tree.arrays[found[name]], expected[name], used.get(name)) for name in expected]
    told = layouts.is_torchs([a.layouts for a in arrays if a.name in of_torch and _leaf(a.name) == "weight"])
    problems: dict[str, list[str]] = {}
    fitted = {}
    for array in arrays:
        name, order = array.name, orders.get(array.name, ...)
        try:
            if name not in of_torch:
                value = array.value
            elif _leaf(name) == "weight":
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
        raise ValueError(f"{path} does not fit the victim; {tensor_files.listed(problems)}")
    return fitted


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
    in_order: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Of each parameter the name of its array in the file."""
    of_optimiser = lambda match: weights and any(part.startswith("opt") for part in match.prefix.split("."))
    found = [match for match in names.matches(expected, tree.arrays) if not of_optimiser(match)]
    if len(found) > 1:
        several = ", ".join(match.prefix or "the top" for match in found)
        raise ValueError(f"{path} holds several trees that fit the victim ({several}): save the one that is meant alone")
    unnamed = None if found else _in_order(path, tree, in_order) if in_order else _unnamed(path, tree, expected)
    if unnamed:
        say(f"{path}: arrays without names are taken in the order of the victim's, which their shapes confirm")
        return {name: unnamed[name] for name in expected}
    match = found[0] if found else names.closest(expected, tree.arrays)
    missing = [n if (t := names.torch_name(n)) == n else f"{n} or {t}" for n in expected if n not in match.names]
    below = [name for name in tree.others if match.prefix and name.startswith(f"{match.prefix}.")]
    arrays = list(match.names.values())
    shared = [name for name, array in match.names.items() if arrays.count(array) > 1]
    known = {name for one in in_order for name in one}  # a module's buffers, which have no gradient, may lie beside
    buffers = [name for name in match.left if name.removeprefix(f"{match.prefix}.") in known]
    left = sorted({*match.left, *below}.difference(buffers))
    problems = {"missing": missing, "one array for several": shared, "not of the victim": left}
    if any(problems.values()):
        remedy = "save the victim's parameters alone, under their names"
        raise ValueError(f"{path} does not fit the victim; {tensor_files.listed(problems)}; {remedy}")
    beside = [*match.beside, *buffers, *(name for name in tree.others if name not in below)]
    if beside:
        under = f"the arrays under {match.prefix} are taken" if match.prefix else "its arrays are taken"
        say(f"{path}: {under}, {tensor_files.listed({'left aside': beside})}")
    elif (match.prefix and match.prefix != "params") or match.wrapped:
        what = "what a wrapper put into its names" if match.wrapped else f"{match.prefix}. before all names"
        say(f"{path}: {what} is taken off")
    return match.names


def _unnamed(path: str, tree: Tree, expected: Params) -> dict[str, str] | None:
    """Arrays in the order of `jax.tree.leaves`, where shapes leave no other; None where arrays have names."""
    numbers = [name.removeprefix("arr_") for name in tree.arrays]
    if not all(number.isdigit() for number in numbers):
        return None
    ordered = sorted(tree.arrays, key=lambda name: int(name.removeprefix("arr_")))
    shapes, ours = [tree.arrays[name].shape for name in ordered], [value.shape for value in expected.values()]
    by_torch = "torch.save({n: g for (n, _), g in zip(model.named_parameters(), grads)}, 'leak.pt')"
    # A matrix or kernel that is not square shows whose layout it is.
    uneven = any(len(shape) > 1 and shape != shape[::-1] for shape in ours)
    if tree.is_torch or shapes != ours or len(set(ours)) < len(ours) or not uneven:
        raise ValueError(
            f"{path} is a list of {len(shapes)} arrays without names, and shapes do not tell which is which; save them by the "
            f"parameters' names, such as {by_torch}, or numpy.savez with names"
        )
    return dict(zip(expected, ordered, strict=True))


def _in_order(path: str, tree: Tree, trees: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Arrays in the order of one of the trees, which their shapes confirm; None where arrays have names."""
    numbers = [re.fullmatch(r"(.*\.)?(?:arr_)?(\d+)", name) for name in tree.arrays]
    if not all(numbers) or len({n and n[1] for n in numbers}) > 1:
        return None
    ordered = [name for _, name in sorted((int(n[2]), n[0]) for n in numbers if n)]
    shapes = [tree.arrays[name].shape for name in ordered]
    for one in trees:
        if [np.shape(value) for value in one.values()] == shapes:
            return dict(zip(one, ordered, strict=True))
    ours = {name: np.shape(value) for name, value in trees[0].items()}
    differ = [
        f" (a {shape} for {name} {own})" for shape, (name, own) in zip(shapes, ours.items(), strict=False) if shape != own
    ]
    raise ValueError(
        f"{path} is a list of {len(shapes)} arrays without names, and not of the module's {len(ours)} parameters in their order"
        f"{differ[0] if differ else ''}; save [p.grad for p in module.parameters()], or arrays by name"
    )


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


def _leaf(name: str) -> str:
    return name.replace("/", ".").removesuffix(".value").rpartition(".")[2]


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
