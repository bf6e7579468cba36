"""A sweep from what is asked for to its table and pictures."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from gdiff_jax.sweeping import inputs, processes
from gdiff_jax.sweeping.config import SweepConfig
from gdiff_jax.sweeping.plan import Plan
from gdiff_jax.sweeping.records import Row, Store
from gdiff_jax.sweeping.run import run_trials


def sweep(config: SweepConfig, plan: Plan | None = None, quiet: bool = False, mesh: Mesh | None = None) -> list[Row]:
    """Runs the trials, then writes records, table, plot and contact sheet into the output folder; returns all rows.

    Several processes share the work; the first writes what is said of the whole.

    Args:
      config: what is asked for.
      plan: the same, loaded; loaded here if None.
      quiet: leave the table to the files.
      mesh: of the devices to use, all of this process if None.
    """
    plan = plan or inputs.load(config)
    store = Store(Path(config.run.out), plan.identity, plan.reading)
    rows = run_trials(plan, store, config.run.batch, config.run.memory_gib, mesh)
    if processes.is_first():
        from gdiff_jax.sweeping import report  # not at the start, which need not wait a second for matplotlib

        store.write_records(rows)
        report.write(plan, config.private.images, config.prior, rows, store, quiet)
    return rows
