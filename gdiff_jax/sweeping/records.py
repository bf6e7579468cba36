"""What a sweep leaves on disk, so that a kill at any moment loses no finished chunk, and nothing damaged is believed.

    manifest.json        the configuration, hashes of all inputs, and for each run: versions, device, command, time
    chunks/00012.npz     images and traces of a chunk's trials, deviations of pixels where a method gives them
    chunks/00012.jsonl   one self-describing row a trial, then a seal: SHA-256 over configuration, rows and npz
    records.jsonl        all rows, made at the end

Every file is written beside its place and renamed into it, a chunk's rows last. A chunk is done when its seal is right: one
that was truncated, altered, or computed with another configuration is not, and is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gdiff_jax import numerics
from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.files import lock, need_folder, shown, write_atomic
from gdiff_jax.provenance import this_run

Row = dict[str, Any]

# Raised with what a chunk holds, or what a method does: no run goes on from records that would not be its own.
VERSION = 4

DRAWN = (
    "where weights are drawn at random at each call, seed them, as by torch.manual_seed(0), or load them from a file, as an "
    "audit's --weights does"
)


def strict_json(value: Any) -> str:
    """Strict JSON: a number that is not finite becomes null, a byte of a path that is not UTF-8 is escaped."""

    def finite(v: Any) -> Any:
        if isinstance(v, str):
            return shown(v)
        if isinstance(v, dict):
            return {shown(k) if isinstance(k, str) else k: finite(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [finite(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(finite(value), allow_nan=False)


def _digest(*parts: bytes) -> str:
    """SHA-256 of the parts and where each ends."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()


def _differ_in_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether nothing but the weights of models of the user's own differ, and what follows from them."""
    settings = lambda identity: {name: value for name, value in identity.items() if name != "sha256"}
    hashes = lambda identity: {**identity.get("sha256", {}), **identity.get("sha256", {}).get("trained_victims", {})}
    ours, theirs = hashes(one), hashes(other)
    differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} - {"trained_victims"}
    weights = {name for name in differ if name == "params" or (":" in name and not name.endswith(" loss"))}
    losses = {name for name in differ if name == "loss" or (":" in name and name.endswith(" loss"))}  # buffers are constants
    return settings(one) == settings(other) and bool(weights) and differ == weights | losses


class MemoryStore:
    """The records of one process that leaves nothing on disk: what a `Store` is asked while trials run."""

    folder: Path | None = None

    def __init__(self, identity: dict[str, Any] | None = None):
        self.identity = identity or {}
        self._chunks: dict[int, tuple[list[Row], dict[str, np.ndarray]]] = {}

    def open(self, run: int = 0) -> None:
        """Nothing to make."""

    def close(self) -> None:
        """Nothing to let go of."""

    def exists(self, chunk: int) -> bool:
        return chunk in self._chunks

    is_done = exists

    def discard(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self._chunks.pop(chunk, None)

    def save(self, chunk: int, rows: list[Row], arrays: dict[str, np.ndarray]) -> None:
        self._chunks[chunk] = json.loads(strict_json(rows)), arrays  # the rows as they would be read back

    def rows(self, chunks: Iterable[int]) -> list[Row]:
        return [row for chunk in chunks for row in self._chunks[chunk][0]]

    def arrays(self, chunk: int) -> dict[str, np.ndarray]:
        return self._chunks[chunk][1]


class Store:
    """The output folder of one configuration."""

    def __init__(self, folder: Path, identity: dict[str, Any], reading: dict[str, Any] | None = None):
        """Checks the folder without touching it.

        Args:
          folder: may be absent, empty, or hold an earlier run of the same identity.
          identity: everything that decides the results; JSON-able. The settings of JAX that do, where they are not the usual
            ones (`numerics`), are put beside it.
          reading: how the images' files were read, which the manifest tells of each run.

        Raises:
          ConfigError: where the folder belongs to another configuration or to something else.
        """
        need_folder(folder)
        self.folder = folder
        self.identity = json.loads(strict_json({"version of records": VERSION, **identity, **numerics.unusual()}))
        self.reading = {"images": reading} if reading else {}
        self.runs: list[dict[str, Any]] = []
        self._lock: TextIO | None = None
        path = folder / "manifest.json"
        if path.is_file():
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                theirs, runs = manifest["identity"], manifest["runs"]
                intact = manifest["sha256"] == _digest(strict_json([theirs, runs]).encode())
                other = numerics.differences(theirs, self.identity)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                theirs, other, runs, intact = None, "", [], False
            if intact and theirs == self.identity:
                self.runs = runs
            elif self._holds_own_chunks():
                print(f"{path} is damaged and is made anew; the records are of this configuration, by their seals")
            elif not intact:
                raise ConfigError(f"{folder}: its manifest.json cannot be read or was altered; give another folder")
            else:
                remedy = f"{DRAWN}, or give" if _differ_in_weights(theirs, self.identity) else "give"
                raise ConfigError(f"{folder} holds another configuration ({other}); {remedy} another folder")
        elif folder.exists() and (not folder.is_dir() or self._is_of_something_else()):
            raise ConfigError(f"{folder} exists and is not a sweep's output; give another folder")

    def _is_of_something_else(self) -> bool:
        # A run that died before its manifest was whole leaves that part of it, and the lock.
        return any(not file.name.startswith(".") for file in self.folder.iterdir())

    def _holds_own_chunks(self) -> bool:
        return any(self.is_done(int(file.stem)) for file in self.folder.glob("chunks/[0-9]*.jsonl"))

    def open(self, run: int = 0) -> None:
        """Creates the folder, locks it against another sweep, and notes this run in the manifest.

        Args:
          run: a number by which other processes know that they see this folder (`is_shared`).

        Raises:
          ConfigError: where another sweep is writing to it.
        """
        self.close()  # of an earlier run of its own
        self._lock = lock(self.folder, "sweep")
        weakref.finalize(self, self._lock.close)
        runs = [*self.runs, {"run": run, **this_run(), **self.reading}]
        manifest = {"identity": self.identity, "runs": runs, "sha256": _digest(strict_json([self.identity, runs]).encode())}
        write_atomic(
            self.folder / "manifest.json", lambda p: p.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        )

    def close(self) -> None:
        """Lets go of the lock; the end of the process does too, however it ends."""
        if self._lock is not None:
            self._lock.close()

    def is_shared(self, run: int) -> bool:
        """Whether this process sees the manifest that another one wrote with `open(run)`."""
        with contextlib.suppress(OSError, ValueError, LookupError):
            return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))["runs"][-1]["run"] == run
        return False

    def _path(self, chunk: int, suffix: str) -> Path:
        return self.folder / "chunks" / f"{chunk:05d}{suffix}"

    def exists(self, chunk: int) -> bool:
        """Whether the chunk was written; `is_done` says whether it can be believed."""
        return self._path(chunk, ".jsonl").is_file()

    def discard(self, chunks: Iterable[int]) -> None:
        """Removes what there is of these chunks."""
        for chunk in chunks:
            self._path(chunk, ".jsonl").unlink(missing_ok=True)

    def is_done(self, chunk: int) -> bool:
        try:
            self._read(chunk)
        except (OSError, RunError):
            return False
        return True

    def _read(self, chunk: int) -> tuple[bytes, bytes]:
        """Rows and npz of a chunk, where the seal is right.

        Raises:
          RunError: where it is not.
          OSError: where a file is missing.
        """
        path = self._path(chunk, ".jsonl")
        *lines, seal = path.read_bytes().splitlines(keepends=True) or [b""]
        rows, arrays = b"".join(lines), self._path(chunk, ".npz").read_bytes()
        if seal != self._seal(rows, arrays):
            raise RunError(f"{path} or its .npz is damaged; the same command computes them again")
        return rows, arrays

    def _seal(self, rows: bytes, arrays: bytes) -> bytes:
        return json.dumps({"seal": _digest(strict_json(self.identity).encode(), rows, arrays)}).encode() + b"\n"

    def save(self, chunk: int, rows: list[Row], arrays: dict[str, np.ndarray]) -> None:
        """Arrays first, rows last: the rows are what says that the chunk is done."""
        (self.folder / "chunks").mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
        packed = buffer.getvalue()
        text = "".join(strict_json(row) + "\n" for row in rows).encode()
        write_atomic(self._path(chunk, ".npz"), lambda p: p.write_bytes(packed))
        write_atomic(self._path(chunk, ".jsonl"), lambda p: p.write_bytes(text + self._seal(text, packed)))

    def rows(self, chunks: Iterable[int]) -> list[Row]:
        """The rows of finished chunks; RunError where one is damaged."""
        return [json.loads(line) for chunk in chunks for line in self._read(chunk)[0].splitlines()]

    def arrays(self, chunk: int) -> dict[str, np.ndarray]:
        """Those of a finished chunk; RunError where it is damaged."""
        with np.load(io.BytesIO(self._read(chunk)[1])) as file:
            return {k: file[k] for k in file.files}

    def write_text(self, name: str, text: str) -> None:
        write_atomic(self.folder / name, lambda p: p.write_text(shown(text), encoding="utf-8"))

    def write_records(self, rows: list[Row]) -> None:
        self.write_text("records.jsonl", "".join(strict_json(row) + "\n" for row in rows))
