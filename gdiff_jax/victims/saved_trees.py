"""Weights and gradients that another training loop saved: .npz and .safetensors files, of JAX or of torch, by parameter name.

Names are compared with dots for slashes, and without a leading `params.`. An array that is there under the name of its
parameter is taken as it is. One that is there under torch's name for it (`weight` for `kernel`, `scale` and `embedding`) has
torch's layout: (out, in) becomes (in, out), OIHW becomes HWIO. What a torch network flattened was (C, H, W), ours is (H, W, C),
and no file says so: where a dense layer's input is no other layer's output its order must be told.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gdiff_jax import tensor_files
from gdiff_jax.modules import Params

_TORCH = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
Orders = dict[str, tuple[int, int, int] | None]  # by a dense kernel's name: (C, H, W); None: rows as they are


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


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file by name.

    Raises:
      ValueError: where it cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path} does not exist; give a .npz, .safetensors or torch .pt file of arrays by name")
    try:
        if file.suffix != ".npz":
            return tensor_files.read_tensors(file)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile, OSError, ValueError, by what is broken
        raise ValueError(f"{path} cannot be read: {error}") from None


def fit(path: str, expected: Params, orders: Orders) -> dict[str, np.ndarray]:
    """The file's arrays as the parameters `expected`, each used once, in float32.

    Raises:
      ValueError: with all that is missing, unexpected, of another shape, not finite, or of an order that must be told.
    """
    arrays = {_plain(name): value for name, value in read(path).items()}
    problems: dict[str, list[str]] = {"missing": [], "of another shape": [], "not finite": [], "of an unknown order": []}
    unknown = [name for name in orders if name not in expected]
    if unknown:
        raise ValueError(f"flattened {unknown[0]}: the victim has no such array; it has {', '.join(expected)}")
    tree = {}
    for name, target in expected.items():
        torch = _torch_name(name)
        if name in arrays:
            value = arrays.pop(name)
        elif torch in arrays:
            value = tensor_files.to_our_layout(arrays.pop(torch), target.ndim)
            if value.ndim == 2 and value.shape == target.shape and _is_flattened(name, value, expected):
                if name not in orders:
                    problems["of an unknown order"].append(f"{name} {value.shape} (say flattened={name}:CxHxW, or as-is)")
                    continue
                value = _reordered(name, value, orders[name])
        else:
            problems["missing"].append(name if torch == name else f"{name} or {torch}")
            continue
        if value.shape != target.shape:
            problems["of another shape"].append(f"{name} {value.shape}, the victim has {target.shape}")
        elif value.dtype.kind not in "fV" or not np.isfinite(value.astype(np.float32)).all():
            problems["not finite"].append(name)
        tree[name] = np.ascontiguousarray(value.astype(np.float32))
    problems["not of the victim"] = sorted(arrays)
    if any(problems.values()):
        raise ValueError(f"{path} does not fit the victim; {tensor_files.listed(problems)}")
    return tree


def _plain(name: str) -> str:
    return name.replace("/", ".").removeprefix("params.")


def _torch_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{_TORCH.get(leaf, leaf)}".removeprefix(".")


def _is_flattened(name: str, kernel: np.ndarray, expected: Params) -> bool:
    """Whether a dense layer's input is no other layer's output, by its width: then it is a flattened image or feature map."""
    own = name.rpartition(".")[0] + ".bias"
    return kernel.shape[0] not in {value.shape[-1] for other, value in expected.items() if value.ndim == 1 and other != own}


def _reordered(name: str, kernel: np.ndarray, order: tuple[int, int, int] | None) -> np.ndarray:
    if order is None:
        return kernel
    if math.prod(order) != len(kernel):
        shape = "x".join(map(str, order))
        raise ValueError(f"flattened {name}:{shape}: {name} has {len(kernel)} rows, not {math.prod(order)}")
    return kernel.reshape(*order, -1).transpose(1, 2, 0, 3).reshape(len(kernel), -1)
