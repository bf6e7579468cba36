"""Tensors of torch models by diffusers' names as parameters of ours, and back.

A file is refused as a whole, with all that is wrong in it, or read as a whole: every tensor is used exactly once.
"""

from __future__ import annotations

import collections
import hashlib
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdiff_jax import modules
from gdiff_jax.modules import Params
from gdiff_jax.tensor_files import Tensors, listed, to_our_layout

# Of the program that `to_params` is: a cache of what an older one made must not be read.
CONVERTER_VERSION = 1
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Names that diffusers gave its attention before 0.18.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern(name: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_NAMES[m[2]]}.", name)


def _torch_name(name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    return f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"


def to_params(spec: modules.Spec, tensors: Tensors, source: str) -> Params:
    """Every tensor to exactly one float32 parameter and back, or an error that lists what does not fit.

    Raises:
      ValueError: naming tensors that are missing, unexpected, of another shape, not finite, or not of the floating type
        of the others.
    """
    found = {_modern(name): value for name, value in tensors.items()}
    params: Params = {}
    problems: dict[str, list[str]] = collections.defaultdict(list)
    if len(found) < len(tensors):
        old = sorted(name for name in tensors if _modern(name) != name)
        problems["there under an old and a new name"] = [name for name in old if _modern(name) in tensors]
    dtypes = collections.Counter(str(value.dtype) for value in found.values())
    usual = max(dtypes, key=dtypes.__getitem__, default="")
    for name, shape in modules.param_shapes(spec).items():
        key = _torch_name(name)
        if key not in found:
            problems["missing"].append(key)
            continue
        original = found.pop(key)
        value = to_our_layout(original, len(shape)) if name.endswith("kernel") else original
        if value.shape != shape:
            problems["of another shape"].append(f"{key} {original.shape}, expected {name} {shape}")
        elif str(value.dtype) not in _FLOATS or str(value.dtype) != usual:
            problems["of another type"].append(f"{key} {value.dtype} among {usual}")
        else:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named
                value = np.ascontiguousarray(value, np.float32)
            if np.isfinite(value).all():
                params[name] = jnp.asarray(value, jnp.float32)  # without the type it would compile a cast for each shape
            else:
                problems["not finite"].append(key)
    problems["unexpected"] = sorted(found)
    if any(problems.values()):
        raise ValueError(f"the weights in {source} do not fit its config; {listed(problems)}")
    return params


def to_torch(params: Params, dtype: Any = np.float16) -> Tensors:
    """Names and layouts of diffusers' state dict."""
    tensors = {}
    for name, param in params.items():
        value = np.asarray(param)
        if name.endswith("kernel"):
            value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
        tensors[_torch_name(name)] = np.ascontiguousarray(value.astype(dtype))
    return tensors
