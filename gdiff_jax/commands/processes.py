"""Flags that make this process one of several."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gdiff_jax.commands import flags
from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.options import option


@dataclasses.dataclass(frozen=True)
class Processes:
    subject: ClassVar[str] = "Several processes"
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
    from gdiff_jax import parallel

    try:
        parallel.join(*((c.coordinator, c.num_processes, c.process_id) if c.coordinator else ()))
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"--{'coordinator' if c.coordinator else 'distributed'}: the other processes were not found: {error}"
        ) from None
    flags.end_at_once_on_signals()  # the runtime has put a handler of its own in place
