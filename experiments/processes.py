"""Several processes, one sweep: flags that make this process one of them, who computes what, and the wait at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time

import jax
import numpy as np

from experiments import cli
from experiments.cli import ConfigError, RunError, option
from experiments.records import Store
from gdiff_jax import parallel

LOOK_AGAIN, SIGN_OF_LIFE, PATIENCE = 0.5, 5.0, 60.0  # seconds


@dataclasses.dataclass(frozen=True)
class Processes:
    distributed: bool = option(False, "one of several processes; the cluster says which (Cloud TPU pod slice, Slurm, ...)")
    coordinator: str = option("", "HOST:PORT of process 0, the same for all, where there is no such cluster")
    num_processes: int = option(0, "how many processes there are, with --coordinator")
    process_id: int = option(-1, "which of them this is, 0 .. num_processes - 1, with --coordinator")


def join(c: Processes) -> None:
    """Joins the others that the flags speak of, if any; before anything else of JAX."""
    if c.coordinator:
        if c.num_processes < 1 or not 0 <= c.process_id < c.num_processes:
            raise ConfigError(
                f"--coordinator {c.coordinator} needs --num_processes (at least 1, is {c.num_processes}) and --process_id "
                f"(0 .. num_processes - 1, is {c.process_id})"
            )
        if not c.coordinator.rpartition(":")[2].isdigit():
            raise ConfigError(f"--coordinator {c.coordinator!r} is not HOST:PORT, such as localhost:12345")
    elif c.num_processes or c.process_id >= 0:
        raise ConfigError("--num_processes and --process_id go with --coordinator=HOST:PORT")
    elif not c.distributed:
        return
    try:
        parallel.join(*((c.coordinator, c.num_processes, c.process_id) if c.coordinator else ()))
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"--{'coordinator' if c.coordinator else 'distributed'}: the other processes were not found: {error}"
        ) from None
    cli.end_at_once_on_signals()  # the runtime has put a handler of its own in place


def is_first() -> bool:
    """Whether this process speaks, and writes what is said of the whole."""
    return jax.process_index() == 0


def share(store: Store, todo: list[int], digest: bytes) -> list[int]:
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
    if not parallel.all_have(np.frombuffer(digest, np.uint32)):
        raise ConfigError("the processes were given different flags, images or weights; give all the same command")
    run = int(parallel.agree(np.array(time.time_ns() % 2**31, np.int32)))
    if is_first():
        store.open(run)
        store.discard(todo)
    count = int(parallel.agree(np.array(len(todo), np.int32)))
    todo = parallel.agree(np.resize(np.array([*todo, 0], np.int32), count)).tolist() if count else []
    seen = any(store.is_shared(run) or time.sleep(LOOK_AGAIN) for _ in range(60))  # a network's folder may lag behind
    if not (parallel.all_have(np.array(seen, np.int32)) and seen):
        raise ConfigError(
            f"--out {store.folder}: process {jax.process_index()} does not see what process 0 writes there; "
            "several processes need a folder that all of them see"
        )
    _live(store)
    return todo[jax.process_index() :: jax.process_count()]


def _live(store: Store) -> None:
    """Gives a sign of life every few seconds, from a thread, as long as this process lives."""

    def touch() -> None:
        while True:
            with contextlib.suppress(OSError):
                (store.folder / f".process-{jax.process_index()}").touch()
            time.sleep(SIGN_OF_LIFE)

    threading.Thread(target=touch, daemon=True).start()


def wait_for_all(store: Store, chunks: int) -> None:
    """Returns once all chunks, so many of them, are on disk.

    Raises:
      RunError: where the other processes give no sign of life, and no chunk, for a minute.
    """
    others = [store.folder / f".process-{i}" for i in range(jax.process_count()) if i != jax.process_index()]
    signs, since = None, time.monotonic()
    while left := sum(not store.exists(k) for k in range(chunks)):
        now = left, [file.stat().st_mtime_ns for file in others if file.exists()]
        if now != signs:
            signs, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise RunError(
                f"another process ended before its share was done: {left} of {chunks} chunks are missing in {store.folder}; "
                "the same command computes them"
            )
        time.sleep(LOOK_AGAIN)
