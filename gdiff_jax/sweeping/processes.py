"""Several processes, one sweep: who computes what, and the wait at the end."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np

from gdiff_jax import parallel
from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.sweeping.records import MemoryStore, Store

LOOK_AGAIN, SIGN_OF_LIFE, PATIENCE = 0.5, 5.0, 60.0  # seconds


def is_first() -> bool:
    """Whether this process speaks, and writes what is said of the whole."""
    return jax.process_index() == 0


def share(store: Store | MemoryStore, todo: list[int], digest: bytes) -> list[int]:
    """Opens the output folder and returns the chunks of `todo` that are this process's to compute.

    All processes take process 0's word for what is to be done. What is there of it, damaged, is removed: from then on a chunk
    that is there is done.

    Raises:
      ConfigError: where the processes were not given the same command, or do not see one folder.
    """
    if jax.process_count() == 1:
        store.open()
        store.discard(todo)
        return todo
    if isinstance(store, MemoryStore):
        raise ConfigError("several processes leave their records in a folder that all of them see; give one")
    if not parallel.all_have(np.frombuffer(digest, np.uint32)):
        raise ConfigError("the processes were given different flags, images or weights; give all the same command")
    run = int(parallel.agree(np.array(time.time_ns() % 2**31, np.int32)))
    if is_first():
        store.open(run)
        store.discard(todo)
    count = int(parallel.agree(np.array(len(todo), np.int32)))
    todo = parallel.agree(np.resize(np.array([*todo, 0], np.int32), count)).tolist() if count else []
    seen = _seen(store, run)
    if not (parallel.all_have(np.array(seen, np.int32)) and seen):
        raise ConfigError(
            f"{store.folder}: process {jax.process_index()} does not see what process 0 writes there; "
            "several processes need a folder that all of them see"
        )
    _live(store.folder)
    return todo[jax.process_index() :: jax.process_count()]


def _seen(store: Store, run: int) -> bool:
    """Whether this process sees what process 0 wrote; a network's folder may lag behind."""
    for _ in range(60):
        if store.is_shared(run):
            return True
        time.sleep(LOOK_AGAIN)
    return False


@functools.cache
def _live(folder: Path) -> None:
    """Gives a sign of life at once, and every few seconds, from a thread, as long as this process lives."""

    def touch() -> None:
        with contextlib.suppress(OSError):
            (folder / f".process-{jax.process_index()}").touch()

    def go_on() -> None:
        while True:
            time.sleep(SIGN_OF_LIFE)
            touch()

    touch()
    threading.Thread(target=go_on, daemon=True).start()


def wait_for_all(store: Store, chunks: Collection[int]) -> None:
    """Returns once all these chunks are on disk.

    Raises:
      RunError: where the other processes give no sign of life, and no chunk, for a minute.
    """
    others = [store.folder / f".process-{i}" for i in range(jax.process_count()) if i != jax.process_index()]
    signs, since = None, time.monotonic()
    while left := sum(not store.exists(k) for k in chunks):
        now = left, [file.stat().st_mtime_ns for file in others if file.exists()]
        if now != signs:
            signs, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise RunError(
                f"another process ended before its share was done: {left} of {len(chunks)} chunks are missing in "
                f"{store.folder}; the same command computes them"
            )
        time.sleep(LOOK_AGAIN)
