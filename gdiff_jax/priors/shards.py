"""Weights in one file, or in several with an index of which tensor is in which, as diffusers saves large ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gdiff_jax import tensor_files
from gdiff_jax.priors import weights
from gdiff_jax.tensor_files import Tensors, listed


def is_index(path: Path) -> bool:
    return path.suffix == ".json"


def read_index(path: Path) -> dict[Path, set[str]]:
    """The shards of an index, in the order of their names, with the names of the tensors in each.

    Raises:
      FileNotFoundError: naming the shards that are missing.
      ValueError: where the file is no such index, or names a file outside its folder.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"]
        inside = all(isinstance(file, str) and Path(file).name == file for file in names.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of shards ({type(error).__name__}: {error})") from None
    if not inside:
        raise ValueError(f"{path} names a file that is not beside it")
    files = sorted(set(names.values()))
    if missing := [file for file in files if not (path.parent / file).is_file()]:
        raise FileNotFoundError(f"{path.name} names shards that are missing in {path.parent}: {', '.join(missing)}")
    return {path.parent / file: {name for name, where in names.items() if where == file} for file in files}


def read(path: Path) -> Tensors:
    """All tensors of a weight file, or of the shards of an index, each of which is read from where the index says it is.

    Raises:
      ValueError: where a file is broken (see `tensor_files.read_tensors`), or holds other tensors than the index says.
    """
    if not is_index(path):
        return tensor_files.read_tensors(path)
    tensors: Tensors = {}
    for file, names in read_index(path).items():
        found = tensor_files.read_tensors(file)
        problems = {"missing": sorted(names - found.keys()), "unexpected": sorted(found.keys() - names)}
        if any(problems.values()):
            raise ValueError(f"{file} does not hold what {path.name} says; {listed(problems)}")
        tensors |= found
    return tensors


def sha256(path: Path) -> str:
    """Hex digest of a weight file; of an index, over those of its shards."""
    if not is_index(path):
        return weights.sha256(path)
    return hashlib.sha256("".join(weights.sha256(file) for file in read_index(path)).encode()).hexdigest()
