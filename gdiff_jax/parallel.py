"""Independent trials over the devices of this process, and over processes.

Trials never need each other: a device computes its share of them with the weights replicated on it, and a program compiled here
holds no collective. Several processes (hosts of a Cloud TPU pod slice, tasks of Slurm, or plain processes) divide the trials
between them; they speak with each other only at the start, to agree on what is to be done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import custom_batching
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gdiff_jax import numerics

AXIS = "trial"


def use_every_core() -> None:
    """Makes each core of a CPU a device, before JAX is used, unless JAX was told how many there are.

    XLA:CPU runs a small convolution on one core, however many there are; a core for each share of the trials leaves none idle.
    """
    if jax.config.jax_num_cpu_devices < 1:  # type: ignore[attr-defined]  # mypy does not see what JAX sets
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


def trial_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `trial`, over these devices; over all of this process if None."""
    return Mesh(np.array(jax.local_devices() if devices is None else devices), (AXIS,))


def map_trials(function: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
    """function(common, own) of many trials, divided over the mesh: the results of a `jax.vmap` over `own`, in the same order.

    Args:
      function: of one trial. `common` is a pytree that all trials share, such as weights, replicated on every device; `own` a
        pytree of what is one trial's own.
      mesh: of `trial_mesh`; its size must divide the number of trials.

    Returns:
      a function of `common` and of `own` with a leading axis of trials, which is divided over the devices, as its result is.
    """

    def on_one_device(common: Any, own: Any) -> Any:
        return jax.vmap(lambda trial: function(common, trial))(own)

    # Without check_vma a device's derivative in the replicated weights is its own trials'. With it, unless each of them is cast
    # to "varying" first, it is summed over all devices' trials: wrong numbers, no error. And loops of other libraries, such as
    # optax's line search, do not type-check under it.
    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)


def one_by_one_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of pytrees of arrays, which under `jax.vmap` a CPU computes for one after another.

    Of loops whose ends differ: together all would last as long as the longest. Elsewhere it is as `jax.vmap` has it.
    """
    alone = custom_batching.sequential_vmap(function)
    return lambda *own: jax.lax.platform_dependent(*own, cpu=alone, default=function)


def compiled(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """The program of a lowered function for a mesh.

    On a CPU at LLVM's second level, unless XLA_FLAGS says another: as fast as the third that XLA takes, in three quarters of
    the time to compile [measured], which is half of what a small sweep takes.
    """
    level = "xla_backend_optimization_level"
    options: dict[str, str | bool] = (
        {level: "2"} if mesh.devices[0].platform == "cpu" and level not in os.environ.get("XLA_FLAGS", "") else {}
    )
    return lowered.compile(compiler_options=options)


def trial_keys(seed: int, images: np.ndarray, seeds: np.ndarray) -> jax.Array:
    """One key a trial, of the numbers (N,) of its image and its seed alone.

    So a trial's noise and start are the same at every noise level and for every method, whatever runs beside it.
    """
    base = numerics.key(seed)
    fold = lambda image, s: jax.random.fold_in(jax.random.fold_in(base, image), s)
    return jax.vmap(fold)(jnp.asarray(images), jnp.asarray(seeds))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a pytree, whole on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def divide(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a pytree, their leading axis divided over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P(AXIS)))


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several, by JAX's distributed runtime; call it before anything else of JAX.

    Args:
      coordinator: HOST:PORT of process 0, the same for all. None where the cluster says it, and the other two (Cloud TPU pod
        slices, Slurm, Open MPI, Kubernetes: see `jax.distributed.initialize`).
      num_processes: how many there are.
      process_id: which one this is, 0 .. num_processes - 1.

    Raises:
      RuntimeError: where the others cannot be reached.
      ValueError: where nothing says who the others are.
    """
    with contextlib.suppress(AttributeError):  # where JAX no longer has the switch
        jax.config.update("jax_enable_recoverability", True)  # the death of one that has work of its own ends no other
    jax.distributed.initialize(coordinator, num_processes, process_id)


def agree(values: np.ndarray) -> np.ndarray:
    """Process 0's values, in every process; itself where there is one. All must call it, with arrays of one shape and dtype."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils  # not at the start, which need not wait where there is one process

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def all_have(values: np.ndarray) -> bool:
    """Whether every process calls this with the same integers, in the same shape."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    return bool((np.asarray(multihost_utils.process_allgather(values)) == values[None]).all())
