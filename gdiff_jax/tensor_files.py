"""Arrays by name in files of torch models, read without torch and without trust, and their change of layout to ours."""

from __future__ import annotations

import collections
import functools
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from gdiff_jax.files import need_content

Tensors = dict[str, np.ndarray]


def read_tensors(path: Path) -> Tensors:
    """Tensors by name, of a `.safetensors` file or a zip-format torch pickle (`.bin`, `.pt`, `.pth`, `.ckpt`).

    Raises:
      ValueError: where the file is broken, or is a pickle that asks for anything but plain tensors; nothing in it is run.
    """
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path)
    tensors = read_torch(path)
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{path} cannot be read as a torch file of plain tensors (it holds a {type(tensors).__name__}, not a state dict)"
        )
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            what = f"entry {name!r} is a {type(value).__name__}, not a tensor"
            raise ValueError(f"{path} cannot be read as a torch file of plain tensors ({what})")
    return dict(tensors)


def read_safetensors(path: Path) -> Tensors:
    """Tensors by name, of a `.safetensors` file.

    Raises:
      ValueError: where the file is broken, or holds a dtype that NumPy has not.
    """
    need_content(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if file.get_slice(name).get_dtype() not in _NARROW}
    except Exception as error:  # safetensors raises its own type, and others for a truncated header
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    narrow = [name for name in names if name not in tensors]
    if narrow:
        raise ValueError(f"{path} holds {narrow[0]} in float8 or less; save it in bfloat16, float16 or float32")
    return tensors


_NARROW = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"}


def read_torch(path: Path) -> Any:
    """What a zip-format torch pickle holds: dicts, lists, numbers, and arrays in place of tensors.

    Raises:
      ValueError: as `read_tensors`.
    """
    need_content(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no zip-format torch file: it is truncated, or a legacy pickle, which cannot be read safely. "
            'Convert it where torch is installed: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\""
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_torch_zip(archive)
    except Exception as error:  # a hostile or broken pickle may raise anything
        raise ValueError(f"{path} cannot be read as a torch file of plain tensors ({error})") from None


_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


# What checkpoints hold beside tensors, such as an accuracy or a command's arguments: it is left aside, and never made.
_BESIDE = {
    *((module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *(("torch", name) for name in ("Size", "device", "float64", "float32", "float16", "bfloat16", "int64")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(("datetime", name) for name in ("date", "datetime", "timedelta", "timezone")),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("argparse", "Namespace"),
}


class _Beside:
    """In the place of such a thing, whatever it is made of and whatever state it is given."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Knows OrderedDict, tensors, parameters and torch's storage types, each as a function of this module; nothing else.

    What is known to lie beside tensors is left out.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _BESIDE:
            return _Beside
        what = f"it asks for {module}.{name}, which a file of tensors does not need"
        raise pickle.UnpicklingError(f"{what}; save the tensors alone, such as torch.save(model.state_dict(), path)")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it asks for {kind} {key} of {dtype}, which is no tensor storage")
        return self._storage(dtype, key, count)

    @functools.cache  # noqa: B019 - the reader lives for one file
    def _storage(self, dtype: np.dtype, key: str, count: int) -> np.ndarray:
        raw = self.archive.read(f"{self.root}data/{key}")  # checks the CRC
        if len(raw) != count * dtype.itemsize:
            raise ValueError(f"storage {key} holds {len(raw)} bytes, {count} of {dtype} were announced")
        return np.frombuffer(raw, dtype)


def _rebuild(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> np.ndarray:
    """A strided view of a storage, never beyond its end; hooks are never run, metadata (a negated view, say) is refused."""
    if metadata:
        raise ValueError(f"a tensor with metadata {metadata!r}")
    if not isinstance(storage, np.ndarray) or len(shape) != len(strides):
        raise ValueError("a tensor without a storage, or without a stride a dimension")
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError(f"a tensor of offset {offset}, shape {shape} and strides {strides}")
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and end > storage.size:
        raise ValueError(f"a tensor of shape {shape} reaches to {end} in a storage of {storage.size}")
    if math.prod(shape) > storage.size:
        raise ValueError(f"a tensor of shape {shape} repeats the elements of a storage of {storage.size}")
    size = storage.itemsize
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, [stride * size for stride in strides], writeable=False)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    """The tensor of a torch.nn.Parameter; hooks are never run."""
    return data


def _read_torch_zip(archive: zipfile.ZipFile) -> Any:
    (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
    root = pickled.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its byte order is not little-endian")
    return _Unpickler(archive, root).load()


def to_our_layout(value: np.ndarray, ndim: int) -> np.ndarray:
    """OIHW to HWIO, or (out, in) to (in, out); 1 x 1 convolutions become matrices where ours is one."""
    if ndim == 2 and value.ndim > 2 and math.prod(value.shape[2:]) == 1:
        value = value.reshape(value.shape[:2])
    if value.ndim not in (2, 4):
        return value
    return value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))


def listed(problems: dict[str, list[str]]) -> str:
    """What is wrong with the arrays of a file, the first of each kind by name."""
    more = lambda names: f" and {len(names) - 5} more" if len(names) > 5 else ""
    return "; ".join(f"{title}: {', '.join(names[:5])}{more(names)}" for title, names in problems.items() if names)
