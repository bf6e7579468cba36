"""Files that are whole or not there, the folder of what may be made again, and lines with the names of files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


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


def cache_folder() -> Path:
    """The environment's GDIFF_JAX_CACHE, or gdiff_jax in the user's cache folder."""
    return Path(os.environ.get("GDIFF_JAX_CACHE") or Path.home() / ".cache" / "gdiff_jax").absolute()


def say(text: str) -> None:
    """Prints a line, whatever the names of files in it are: what the terminal's encoding lacks is written out in escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
