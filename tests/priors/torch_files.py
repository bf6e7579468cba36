"""Zip-format torch files, written without torch: what `torch.save(state_dict)` writes, or anything a test wants instead."""

import collections
import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "float64": "DoubleStorage", "int64": "LongStorage"}


class _Storage:
    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array


class _Tensor:
    def __init__(self, storage: _Storage, shape: tuple, strides: tuple, offset: int = 0):
        self.parts = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.parts


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = getattr(sys.modules["torch"], STORAGES.get(str(obj.array.dtype), "BoolStorage"))
        return ("storage", kind, obj.key, "cpu", obj.array.size)


def _stand_in() -> dict[str, types.ModuleType]:
    """Modules that own the names a torch pickle refers to; pickle looks them up while writing."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in (*STORAGES.values(), "BoolStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*args):
        raise AssertionError("only its name is used")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    return {"torch": torch, "torch._utils": utils}


def tensor(key: str, array: np.ndarray, shape: tuple | None = None, strides: tuple | None = None, offset: int = 0) -> _Tensor:
    strides = strides if strides is not None else tuple(s // array.itemsize for s in array.strides)
    return _Tensor(_Storage(key, array), array.shape if shape is None else shape, strides, offset)


def save(path: Path, tensors: dict[str, Any], pickled: bytes | None = None, storages: dict[str, bytes] | None = None) -> None:
    """Writes arrays (or what `tensor` makes) as torch.save would; `pickled` and `storages` replace what would be written."""
    named = {}
    for i, (name, value) in enumerate(tensors.items()):
        named[name] = value if isinstance(value, _Tensor) else tensor(str(i), np.ascontiguousarray(value))
    if pickled is None:
        before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
        sys.modules.update(_stand_in())
        try:
            buffer = io.BytesIO()
            _Pickler(buffer, protocol=2).dump(collections.OrderedDict(named))
            pickled = buffer.getvalue()
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
    if storages is None:
        storages = {t.parts[0].key: t.parts[0].array.tobytes() for t in named.values()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
