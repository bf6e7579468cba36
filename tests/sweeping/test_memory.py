"""As many trials at a time as the memory holds, which changes no result."""

import dataclasses
import itertools

import numpy as np
import pytest
from tiny import ONE_DEVICE, plain_plan

from gdiff_jax.errors import ConfigError
from gdiff_jax.sweeping import memory, run, trials
from gdiff_jax.sweeping.records import MemoryStore


class Needs:
    """A compiled program that says that it needs so many bytes."""

    def __init__(self, size):
        self.argument_size_in_bytes, self.output_size_in_bytes, self.temp_size_in_bytes = 60, 0, 40 + 10 * size

    def memory_analysis(self):
        return self


@pytest.mark.parametrize(("limit", "size"), [(1000, 8), (180, 8), (179, 7), (150, 5), (119, 1), (110, 1)])
def test_as_many_trials_as_fit(limit, size):
    compiled = []

    def compile_for(n):
        compiled.append(n)
        return Needs(n)

    assert memory.fit(compile_for, 8, limit, "dsg mlp")[0] == size
    assert len(compiled) == (1 if size == 8 else 2 if size == 1 else 3)


def test_one_trial_that_does_not_fit_is_an_error_with_the_remedy():
    with pytest.raises(ConfigError, match=r"one trial of dsg mlp needs 0\.00 GiB.*--prior_remat"):
        memory.fit(Needs, 8, 109, "dsg mlp")
    assert memory.budget(0.5, ONE_DEVICE) == 2**29
    assert memory.budget(0, ONE_DEVICE) > 2**28


def test_a_memory_budget_changes_how_many_run_at_a_time_and_no_result(tiny_prior, capsys):
    plan = plain_plan(tiny_prior, seeds=2)
    chunk = list(itertools.islice(trials.make_grid(plan), 4))
    program = lambda most, gib=0.0: run.compile_program(plan, ONE_DEVICE, chunk[0], most, gib)
    plenty, one = program(4), program(1)
    little = program(4, (one.memory + plenty.memory) / 2 / memory.GIB)
    assert plenty.size == 4
    assert little.size < 4
    assert f"prior-only: {little.size} trials at a time fit, not 4" in "".join(capsys.readouterr())
    psnr = lambda program: [row["psnr"] for _, rows, _ in run.compute(plan, program, {0: chunk}) for row in rows]
    assert len(psnr(little)) == 4
    np.testing.assert_allclose(psnr(little), psnr(plenty), atol=1e-3)
    alone = dataclasses.replace(plan, methods={})
    with pytest.raises(ConfigError, match="one trial of prior-only needs"):
        run.run_trials(alone, MemoryStore(), 4, memory_gib=1e-6, mesh=ONE_DEVICE, progress=False)
