"""What a sweep leaves on disk, so that a kill at any moment loses one chunk at the most.

    manifest.json        the configuration, hashes of all inputs, and for each run: versions, device, command, time
    chunks/00012.npz     images and traces of a chunk's trials
    chunks/00012.jsonl   one self-describing row a trial; written last: a chunk is done when this file is there
    records.jsonl        all rows, made at the end

Every file is written beside its place and renamed into it.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.cli import ConfigError, write_atomic

Row = dict[str, Any]


def strict_json(value: Any) -> str:
    """Strict JSON: a number that is not finite becomes null."""

    def finite(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [finite(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(finite(value), allow_nan=False)


def this_run() -> dict[str, Any]:
    """Who computes: versions, device, command, commit and time."""
    root = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    packages = ("jax", "jaxlib", "flax", "numpy", "optax", "dm-pix", "diffusers")
    device = jax.devices()[0]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cores": os.cpu_count(),
    }


class Store:
    """The output folder of one configuration."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        """Checks the folder without touching it.

        Args:
          folder: may be absent, empty, or hold an earlier run of the same identity.
          identity: everything that decides the results; JSON-able.

        Raises:
          ConfigError: where the folder belongs to another configuration or to something else.
        """
        self.folder = folder
        self.identity = json.loads(strict_json(identity))
        self.runs: list[dict[str, Any]] = []
        path = folder / "manifest.json"
        if path.is_file():
            try:
                manifest = json.loads(path.read_text())
                theirs, self.runs = manifest["identity"], manifest["runs"]
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(f"--out {folder}: its manifest.json cannot be read; give another folder") from None
            keys = sorted(set(theirs) | set(self.identity))
            other = [k for k in keys if theirs.get(k) != self.identity.get(k)]
            if other:
                what = "; ".join(f"{k} was {theirs.get(k)!r}, is {self.identity.get(k)!r}" for k in other[:3])
                raise ConfigError(f"--out {folder} holds another configuration ({what}); give another folder")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--out {folder} exists and is not a sweep's output; give another folder")

    def open(self) -> None:
        """Creates the folder and notes this run in the manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = {"identity": self.identity, "runs": [*self.runs, this_run()]}
        write_atomic(self.folder / "manifest.json", lambda p: p.write_text(json.dumps(manifest, indent=2) + "\n"))

    def _path(self, chunk: int, suffix: str) -> Path:
        return self.folder / "chunks" / f"{chunk:05d}{suffix}"

    def is_done(self, chunk: int) -> bool:
        return self._path(chunk, ".jsonl").is_file()

    def save(self, chunk: int, rows: list[Row], arrays: dict[str, np.ndarray]) -> None:
        """Arrays first, rows last: the rows are what says that the chunk is done."""
        (self.folder / "chunks").mkdir(exist_ok=True)
        write_atomic(self._path(chunk, ".npz"), lambda p: np.savez_compressed(p, **arrays))
        text = "".join(strict_json(row) + "\n" for row in rows)
        write_atomic(self._path(chunk, ".jsonl"), lambda p: p.write_text(text))

    def rows(self, chunks: Iterable[int]) -> list[Row]:
        return [json.loads(line) for c in chunks for line in self._path(c, ".jsonl").read_text().splitlines()]

    def arrays(self, chunk: int) -> dict[str, np.ndarray]:
        with np.load(self._path(chunk, ".npz")) as file:
            return {k: file[k] for k in file.files}

    def write_text(self, name: str, text: str) -> None:
        write_atomic(self.folder / name, lambda p: p.write_text(text))

    def write_records(self, rows: list[Row]) -> None:
        self.write_text("records.jsonl", "".join(strict_json(row) + "\n" for row in rows))
