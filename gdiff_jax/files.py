"""Files that are whole or not there, the folder of what may be made again, and lines with the names of files."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from gdiff_jax.errors import ConfigError, need


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary path) and renames: the file appears whole or not at all, also after a crash."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    except OSError:  # a full disk: leave no more on it than was there
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def _place(folder: Path) -> Path:
    """What is there of a folder's path: the folder itself, or where it would be made."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place


def _takes_files(place: Path) -> bool:
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def hollow(data: bytes) -> str:
    """Why the first bytes of a file are those of none that could be read, whatever its kind; "" where they are not."""
    if not data:
        return "it is empty"
    pointer = data.startswith(b"version https://git-lfs")
    return "it is a pointer of Git LFS, not the file itself: `git lfs pull` fetches it" if pointer else ""


def need_content(path: Path) -> None:
    """That a file is neither empty nor a pointer.

    Raises:
      ValueError: where it is.
      OSError: where it cannot be read.
    """
    with open(path, "rb") as file:
        why = hollow(file.read(64))
    if why:
        raise ValueError(f"{path} cannot be read: {why}")


def cache_folder() -> Path | None:
    """The environment's GDIFF_JAX_CACHE, or gdiff_jax in the user's cache folder; None where that cannot be written to.

    A user without an entry in passwd and without HOME has no such folder, one whose home is read-only cannot use it.
    """
    try:
        folder = Path(os.environ.get("GDIFF_JAX_CACHE") or Path.home() / ".cache" / "gdiff_jax").absolute()
    except RuntimeError:
        return None
    return folder if _takes_files(_place(folder)) else None


def need_folder(folder: Path, flag: str = "") -> None:
    """That the folder is there or can be made, and can be written to; it is not made.

    Raises:
      ConfigError: naming what stands in the way, and the flag that the folder was given by.
    """
    name, place = f"{flag} {folder}".strip(), _place(folder)
    need(place.is_dir(), f"{name}: no folder can be made there, {place} is something else; give another folder")
    need(_takes_files(place), f"{name}: {place} cannot be written to; give another folder")


def lock(folder: Path, what: str) -> TextIO:
    """Makes the folder, and locks it against another `what` that writes to it until the file that is returned is closed.

    The end of the process closes it too, however it ends. On a file system without locks there is none.

    Raises:
      ConfigError: where another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - the caller's to close
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{folder}: another {what} writes to it; wait for it or give another folder") from None
    except OSError:
        pass
    return file


def shown(text: str) -> str:
    """Text as any file or screen takes it: bytes of a path that are not UTF-8 are escaped, as in caf\\xe9."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def say(text: str) -> None:
    """Prints a line, whatever the names of files in it are: what the terminal's encoding lacks is written out in escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
