"""The programs of the main job are lowered for TPU, CUDA and CPU on a CPU: nothing in them is a CPU's alone, nothing float64.

It says that they can be compiled there, not that they have run.
"""

import re

import jax
import numpy as np
import pytest
from jax import export
from tiny import ONE_DEVICE, plan_of

from gdiff_jax.sweeping import memory, trials
from gdiff_jax.sweeping.config import SweepConfig
from gdiff_jax.sweeping.solving import Solver

# What the partitioner resolves before a device sees the program.
NO_KERNEL = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
MAIN_JOB = SweepConfig()


@pytest.fixture(scope="module")
def plan(tiny_prior):
    return plan_of(tiny_prior, victims=MAIN_JOB.victims.victims, num_images=2, steps=2)


def lowered(plan, group, *platforms):
    """The program's text, for one trial; what differs between the platforms stands in branches of it."""
    trial = trials.Trial(group, 0.1, 0, 0)
    shared, own = trials.shared_arguments(plan, group), trials.own_arguments(plan, [trial])
    if group.method == "auto":  # whose algebra is the host's; what the devices run is its search
        runner = Solver(plan, group, ONE_DEVICE, memory.fit, 1).searching
        own = own, own.images[:, 0], np.zeros(1, bool)
    else:
        runner = trials.make_runner(plan, group, ONE_DEVICE)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (shared, own))
    return export.export(runner, platforms=platforms)(*shapes).mlir_module()


GROUPS = [
    trials.Group(trials.PRIOR_ONLY, "", 0, ""),
    *(
        pytest.param(trials.Group(m, v, 0), marks=[] if m == "dsg" else pytest.mark.long)
        for v in MAIN_JOB.victims.victims
        for m in MAIN_JOB.attacks.methods
    ),
]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_runners_of_the_main_job_are_lowered_without_a_kernel_of_one_platform(plan, group):
    text = lowered(plan, group, "tpu", "cuda", "cpu")
    assert set(re.findall(r"custom_call @(\w+)", text)) <= NO_KERNEL
    assert not re.search(r"tensor<(\d+x)*f64>", text)
    assert re.search(r"tensor<(\d+x)*f32>", text)


def test_a_kernel_of_one_platform_would_be_seen(tiny_prior):
    """The analytic attack calls LAPACK's eigensolver on a CPU."""
    plan = plan_of(tiny_prior, victims=("mlp-narrow",), methods=("analytic",), num_images=2, steps=2)
    assert "custom_call @lapack" in lowered(plan, trials.Group("analytic", "mlp-narrow", 0), "cpu")
