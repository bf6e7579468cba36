"""Reverse diffusion, unguided or guided by an objective: one method, one file."""

from gdiff_jax.samplers.base import StepInfo
from gdiff_jax.samplers.dps import dps_sample, dps_step
from gdiff_jax.samplers.dsg import dsg_sample, dsg_step
from gdiff_jax.samplers.unguided import unguided_sample, unguided_step

__all__ = ["StepInfo", "dps_sample", "dps_step", "dsg_sample", "dsg_step", "unguided_sample", "unguided_step"]
