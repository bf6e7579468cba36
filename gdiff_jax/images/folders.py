"""Pictures in a folder or a .zip: which files they are, and which of the folders are wrappers, splits and classes."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from gdiff_jax.files import need_content

Split = Literal["train", "test"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Pictures too, but not read: that they are passed over is said.
_NOT_READ = {".heic", ".heif", ".avif", ".jp2", ".dcm", ".dng", ".cr2", ".nef", ".arw", ".raw", ".tga", ".psd", ".svg"}
_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx"}  # which may hold labels
_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"), "test"),
}
# What datasets of segmentation keep beside each other, and no one means as two classes.
_PICTURES, _ABOUT = {"image", "images", "img", "imgs"}, {"mask", "masks", "annotation", "annotations", "segmentation", "labels"}
_LEFT_BEHIND = {"__macosx", "@eadir", "$recycle.bin", "__pycache__"}  # by systems and devices, beside what begins with a dot


@dataclasses.dataclass(frozen=True)
class PictureFiles:
    """Pictures that are not decoded yet.

    Attributes:
      source: the folder or the .zip.
      names: relative to it, sorted.
      labels: of each, an index of `classes`; None where a picture lies in no class's folder.
      classes: names of the folders, by label; () where there are none.
      has_splits: whether the folders are those of a training set and of others.
      notes: what was decided that a reader may not expect, in sentences.
      read: the bytes of a name.
    """

    source: Path
    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    has_splits: bool
    notes: tuple[str, ...]
    read: Callable[[str], bytes]


def in_folder(path: Path, split: Split) -> PictureFiles:
    """Of a folder, through links too; see `arrange`."""
    return arrange(path, list(_walk(path, "", frozenset())), split, lambda name: (path / name).read_bytes())


def in_zip(path: Path, split: Split) -> PictureFiles:
    """Of a .zip; see `arrange`."""
    need_content(path)
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a .zip file ({error})") from None
    plain = lambda name: name.replace("\\", "/").removeprefix("./")  # some programs of Windows write backslashes
    members = {plain(name): name for name in archive.namelist()}
    return arrange(path, members, split, lambda name: archive.read(members[name]))


def arrange(source: Path, entries: Iterable[str], split: Split, read: Callable[[str], bytes]) -> PictureFiles:
    """The pictures of a split among all that lies in `source`, and their classes.

    What is hidden, or left behind by a system, is passed over, and so is a folder that holds all the others. Folders are
    splits where all of them are named so, in whatever case, or by a word of their names where they hold folders of the same
    names, such as train2017/cat and val2017/cat; else they are the classes, in the order of `class_order`, which
    is of all splits, so that a label means the same in each. Splits below the classes, cat/train, are read as well. A name that
    is written with composed accents in one place and with combining ones in another is one name.

    Args:
      source: for messages.
      entries: names relative to it; that of a folder ends in a slash.
      split: which pictures are asked for.
      read: the bytes of a name.

    Raises:
      FileNotFoundError: where the split holds no picture.
      ValueError: where folders of splits lie beside others, or below some of the classes alone, or pictures beside masks.
    """
    shown = sorted(name for name in entries if not any(map(_is_hidden, name.split("/"))))
    as_found = _without_wrapper({name: _parts(name) for name in shown if _suffix(name) in SUFFIXES})
    paths = _splits_above(source, as_found)
    splits_below = paths is not as_found
    tops = {path[0] if len(path) > 1 else "" for path in paths.values()}
    below = {top: {path[1] for path in paths.values() if path[0] == top and len(path) > 2} for top in tops}
    recurring = {name for name, times in Counter(name for names in below.values() for name in names).items() if times > 1}
    kinds = {top: _SPLITS.get(top.lower()) or (_split_within(top) if below[top] & recurring else None) for top in tops}
    splits = sorted(top for top, kind in kinds.items() if kind)
    others = [top or "pictures" for top, kind in sorted(kinds.items()) if not kind]
    of_classes = any(len(below[top]) > 1 for top in splits)  # a class that is named so has no folders of its own
    if others and (of_classes or {"train", "test"} <= set(kinds.values())):
        raise ValueError(
            f"{source} holds {' and '.join(splits)}, which are splits, beside {_few(others)}; "
            f"give a folder of classes, such as {source / splits[0]}, or move what is no split away"
        )
    has_splits = bool(splits) and not others
    names = list(paths)
    if has_splits:
        names = [name for name, path in paths.items() if kinds[path[0]] == split]
        paths = _without_wrapper({name: path[1:] for name, path in paths.items()})
    if not names:
        found = f"; its folders are {_few(splits)}" if has_splits else ""
        passed = _passed_over(shown)
        raise FileNotFoundError(
            f"{source} holds no picture for the split {split} ({', '.join(sorted(SUFFIXES))}){found}"
            + (f"; {passed}" if passed else "")
        )
    classes, notes = class_order({path[0] for path in paths.values() if len(path) > 1})
    said = {name.lower(): name for name in classes}
    if (pictures := _PICTURES & set(said)) and (about := _ABOUT & set(said)):
        raise ValueError(
            f"{source} holds {said[min(pictures)]} beside {said[min(about)]}, which are no two classes; "
            f"give the folder of the pictures, such as {source / said[min(pictures)]}"
        )
    empty = "" if splits_below else _without_pictures(shown, paths, classes)
    notes += [text for text in (empty, _passed_over(shown), _of_one_class(shown, classes)) if text]
    loose = [name for name in names if len(paths[name]) == 1]
    if loose and classes:
        notes.append(f"pictures lie beside the folders {_few(classes)}, so that none has a label: {_few(loose)}")
    labels = None if loose else tuple(classes.index(paths[name][0]) for name in names)
    return PictureFiles(source, tuple(names), labels, classes, has_splits, tuple(notes), read)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", name).split("/"))


def _splits_above(source: Path, paths: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """With the splits before the classes, where each class has its own: cat/train/1.png."""
    kinds: dict[str, set[Split | None]] = {}
    for path in paths.values():
        kinds.setdefault(path[0], set()).add(_SPLITS.get(path[1].lower()) if len(path) > 2 else None)
    split = [top for top, found in sorted(kinds.items()) if {"train", "test"} <= found and top.lower() not in _SPLITS]
    if not split:
        return paths
    others = [top for top, found in sorted(kinds.items()) if None in found]
    if others:
        raise ValueError(
            f"{source}: {_few(split)} hold splits, such as train and test, and {_few(others)} pictures that are in none; "
            "give every class its splits, or none"
        )
    return {name: (path[1], path[0], *path[2:]) for name, path in paths.items()}


def _split_within(name: str) -> Split | None:
    """The split that a word of a folder's name says, as training_set, val2017 and seg_test do."""
    said = {_SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in _SPLITS}
    return said.pop() if len(said) == 1 else None


def class_order(folders: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """Names of classes by label, and what is to be said of their order.

    As text, which is the order of torchvision's ImageFolder; by value where all of them are whole numbers.
    """
    as_text = sorted(folders)
    if as_text and all(re.fullmatch(r"-?[0-9]+", name) for name in as_text):
        by_value = sorted(as_text, key=int)
        notes = []
        if by_value != as_text:
            notes.append(f"folders are numbers, in their order; torchvision's ImageFolder sorts them as text: {_few(as_text)}")
        if [int(name) for name in by_value] != list(range(len(by_value))):
            last = f"folder {by_value[-1]} has {len(by_value) - 1}"
            notes.append(f"labels count the folders from 0 and are not their numbers: {last}")
        return tuple(by_value), notes
    natural = sorted(as_text, key=lambda name: [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in _digits(name)])
    said = f"folders are sorted as text, as torchvision's ImageFolder does: {_few(as_text)}"
    return tuple(as_text), [said] if natural != as_text else []


def _digits(name: str) -> list[str]:
    return re.split(r"([0-9]+)", name)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part.lower() in _LEFT_BEHIND


def _without_wrapper(paths: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Without a folder that holds all the others, and is no split."""
    tops = {path[0] for path in paths.values()}
    if len(tops) != 1 or max(map(len, paths.values())) < 3 or min(map(len, paths.values())) < 2 or min(tops).lower() in _SPLITS:
        return paths
    return _without_wrapper({name: path[1:] for name, path in paths.items()})


def _without_pictures(shown: list[str], paths: dict[str, tuple[str, ...]], classes: tuple[str, ...]) -> str:
    """Which folders beside those of classes are none, for they hold no picture."""
    above = {_parts(name)[: -len(path)] for name, path in paths.items()}
    level = len(min(above))
    parts = [_parts(name) for name in shown]
    beside = {path[level] for path in parts if path[:level] in above and len(path) > level + 1}
    empty = sorted(beside - set(classes))
    return f"folders without a picture are no class: {_few(empty)}" if empty and classes else ""


def _of_one_class(shown: list[str], classes: tuple[str, ...]) -> str:
    """That a folder may be no class, where it is the only one, and what lies beside it."""
    tables = [name for name in shown if _suffix(name) in _TABLES]
    beside = f"; {_few(tables)} is not read" if tables else ""
    only = f"the only folder, {classes[0]}, is taken for a class, so that every label is 0{beside}" if len(classes) == 1 else ""
    return only or (f"labels are not read from {_few(tables)}" if tables else "")


def _passed_over(shown: list[str]) -> str:
    """Which pictures are not read."""
    counts = Counter(suffix for suffix in map(_suffix, shown) if suffix in _NOT_READ)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    return f"pictures of these kinds are not read: {kinds}; convert them to .png" if kinds else ""


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" ... {len(names)} in all" if len(names) > 5 else "")


def _walk(folder: Path, prefix: str, above: frozenset[str]) -> Iterator[str]:
    """What is not hidden below a folder; a link to a folder above is not followed."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in os.scandir(folder):
        if _is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield f"{prefix}{entry.name}/"
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", above | {here})
        elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is named when it is read
            yield prefix + entry.name
