"""How many trials fit into a device's memory at a time, by what the compiler says that the program needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gdiff_jax.errors import ConfigError

GIB = 2**30


def is_shared(mesh: Mesh) -> bool:
    """Whether the devices have one memory: those of a CPU."""
    return mesh.devices[0].platform == "cpu"


def budget(memory_gib: float, mesh: Mesh) -> int:
    """Bytes a device: the user's own figure, or what it has, three quarters of it on a CPU; its devices share either."""
    shares = mesh.size if is_shared(mesh) else 1
    if memory_gib:
        return int(memory_gib * GIB) // shares
    stats = mesh.devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = Path("/sys/fs/cgroup/memory.max")  # "max" where there is no limit
    limit = container.read_text(encoding="utf-8").strip() if container.is_file() else "max"
    return min([machine, *([int(limit)] if limit.isdigit() else [])]) * 3 // 4 // shares


def needed(compiled: Any) -> int:
    """Bytes, on each device, of a compiled program's arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def fit(compile_for: Callable[[int], Any], largest: int, limit: int, what: str) -> tuple[int, Any]:
    """The program for as many trials at a time as fit: `largest` is tried first, so that usually one is compiled.

    Args:
      compile_for: the compiled program for a number of trials.
      largest: trials at a time, at most.
      limit: bytes.
      what: the program's name in the error.

    Raises:
      ConfigError: where one trial does not fit.
    """
    program = compile_for(largest)
    at_largest = needed(program)
    if at_largest <= limit:
        return largest, program
    size, program = 1, compile_for(1)
    alone = needed(program)
    if alone > limit:
        raise ConfigError(
            f"one trial of {what} needs {alone / GIB:.2f} GiB, there are {limit / GIB:.2f}; "
            "raise --memory_gib, or take --prior_remat, --prior_dtype=bfloat16 or a smaller victim"
        )
    # Between the two the need is close to a straight line; where it is not, fewer trials are tried.
    guess = 1 + int((limit - alone) * (largest - 1) / (at_largest - alone)) if at_largest > alone else 1
    guess = min(guess, largest - 1)
    while guess > size:
        candidate = compile_for(guess)
        if needed(candidate) <= limit:
            return guess, candidate
        guess = min(guess - 1, guess * 3 // 4)
    return size, program
