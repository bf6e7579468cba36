"""Reverse diffusion, unguided or guided by an objective: one method, one file."""

from gdiff_jax.samplers.base import Start, batched, start_from
from gdiff_jax.samplers.dpir import last_level, plug_and_play
from gdiff_jax.samplers.dps import dps_sample, dps_step
from gdiff_jax.samplers.dsg import SignalInfo, dsg_sample, dsg_step
from gdiff_jax.samplers.ensemble import mean_of_chains, posterior_mean
from gdiff_jax.samplers.estimate import denoise_estimate, posterior_deviation
from gdiff_jax.samplers.null_space import NullSpace, null_space_of, null_space_sample
from gdiff_jax.samplers.rank_one import RankOne, first_delta, leading_delta, rank_one_mean
from gdiff_jax.samplers.red_diff import red_diff_sample
from gdiff_jax.samplers.unguided import unguided_sample, unguided_step
from gdiff_jax.trace import StepInfo

__all__ = [
    "NullSpace",
    "RankOne",
    "SignalInfo",
    "Start",
    "StepInfo",
    "batched",
    "denoise_estimate",
    "dps_sample",
    "dps_step",
    "dsg_sample",
    "dsg_step",
    "first_delta",
    "last_level",
    "leading_delta",
    "mean_of_chains",
    "null_space_of",
    "null_space_sample",
    "plug_and_play",
    "posterior_deviation",
    "posterior_mean",
    "rank_one_mean",
    "red_diff_sample",
    "start_from",
    "unguided_sample",
    "unguided_step",
]
