"""Trees of arrays in files of whatever training loop, told apart by what they begin with, and never unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gdiff_jax import tensor_files
from gdiff_jax.files import hollow

TAKEN = "give a .npz, .safetensors, torch .pt or Flax .msgpack file, or an orbax folder, of arrays by parameter name"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OTHERS = {
    b"\x89HDF": "an HDF5 file of Keras",
    b"\x93NUMPY": "a .npy or what Equinox writes, arrays without names",
}


class Tree(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: by dotted name.
      others: names of what is no array, such as a number of steps.
      is_torch: whether torch wrote it.
      nones: names of None, as a gradient is of what is not trained or not used.
    """

    arrays: dict[str, np.ndarray]
    others: tuple[str, ...] = ()
    is_torch: bool = False
    nones: tuple[str, ...] = ()


def read(path: str) -> Tree:
    """The arrays of a file or of an orbax folder.

    Raises:
      ValueError: where it cannot be read, with the formats that can.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{path} does not exist; {TAKEN}")
    if file.is_dir():
        return _flat(path, _read_orbax(file))
    with file.open("rb") as opened:
        start = opened.read(64)
    if why := hollow(start):
        raise ValueError(f"{path} cannot be read: {why}; {TAKEN}")
    for begin, what in _OTHERS.items():
        if start.startswith(begin):
            raise ValueError(f"{path} is {what}, which is not read; {TAKEN}")
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and not start.startswith(_LEGACY_TORCH):
        raise ValueError(f"{path} is a pickle, which would run code of its own when it is read; {TAKEN}")
    try:
        return _read(path, file, start)
    except Exception as error:  # zipfile, OSError, ValueError, by what is broken
        said = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {said.removeprefix(f'{path} ')}") from None


def _read(path: str, file: Path, start: bytes) -> Tree:
    if start.startswith(b"PK") and _is_npz(file):
        with np.load(file, allow_pickle=False) as arrays:
            return _flat(path, {name: _named_dtype(name, arrays) for name in arrays.files})
    if start[8:9] == b"{" or file.suffix.lower() == ".safetensors":
        return _flat(path, tensor_files.read_safetensors(file))
    if start.startswith((b"PK", _LEGACY_TORCH)) or file.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
        return _flat(path, tensor_files.read_torch(file))._replace(is_torch=True)
    return _flat(path, _read_msgpack(file))


def _is_npz(file: Path) -> bool:
    """Whether a zip is NumPy's: torch's has a `data.pkl`; a broken one is what its ending says."""
    if not zipfile.is_zipfile(file):
        return file.suffix.lower() == ".npz"
    with zipfile.ZipFile(file) as archive:
        return not any(name.endswith("data.pkl") for name in archive.namelist())


def _named_dtype(name: str, arrays: Any) -> np.ndarray:
    """An array of a .npz; NumPy writes bfloat16, which it does not know, as two raw bytes, and narrower types as one."""
    try:
        value = arrays[name]
    except ValueError as error:
        raise ValueError(f"{name} holds Python objects, not numbers ({error}); {TAKEN}") from None
    if value.dtype.str in ("|V2", "<V2"):
        return value.view(ml_dtypes.bfloat16)
    if value.dtype.kind == "V":
        raise ValueError(f"{name} has the dtype {value.dtype.str}, of raw bytes; save it in float32")
    return value


def _read_msgpack(file: Path) -> Any:
    from flax import serialization  # a second that no other format need wait

    try:
        return serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # msgpack has a type of its own for each thing that can be wrong
        raise ValueError(f"it is in no format that is known ({type(error).__name__}); {TAKEN}") from None


def _read_orbax(folder: Path) -> Any:
    """The tree of an orbax checkpoint, of whatever devices, as NumPy arrays."""
    if not any((folder / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")):
        inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and (p.name.isdigit() or p.name == "default"))
        steps = f"; one of its steps may be meant: {', '.join(inner[:5])}" if inner else ""
        raise ValueError(f"{folder} is a folder, and no orbax checkpoint{steps}; {TAKEN}")
    import jax
    import orbax.checkpoint as ocp

    if not (folder / "_METADATA").exists() and (folder / "default").is_dir():
        folder = folder / "default"  # as a CheckpointManager saves a step
    try:
        with ocp.PyTreeCheckpointer() as reader:
            found = reader.metadata(folder.absolute())
            tree = getattr(getattr(found, "item_metadata", found), "tree", found)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return reader.restore(folder.absolute(), restore_args=as_numpy)
    except Exception as error:  # orbax raises many types
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} cannot be read as an orbax checkpoint ({type(error).__name__}: {text}); {TAKEN}") from None


def _flat(path: str, tree: Any) -> Tree:
    """Its arrays by dotted name; an array without a name is `params`."""
    arrays: dict[str, np.ndarray] = {}
    others: list[str] = []
    nones: list[str] = []
    for name, value in _leaves(tree, ""):
        if name in arrays:
            raise ValueError(f"two arrays are called {name}; {TAKEN}")
        if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind not in "OSU":
            arrays[name] = np.asarray(value)
        else:
            (nones if value is None else others).append(name)
    if not arrays:
        raise ValueError(f"{path} holds no array of numbers; {TAKEN}")
    return Tree(arrays, tuple(others), nones=tuple(nones))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if children is None:
        yield prefix or "params", tree
        return
    for key, value in children:
        name = str(key).replace("/", ".").strip(".")
        yield from _leaves(value, f"{prefix}.{name}" if prefix else name)
