"""Reverse diffusion, unguided or guided by an objective: one method, one file."""

from gdiff_jax.samplers.base import Start, batched, start_from
from gdiff_jax.samplers.dps import dps_sample, dps_step
from gdiff_jax.samplers.dsg import SignalInfo, dsg_sample, dsg_step
from gdiff_jax.samplers.ensemble import mean_of_chains, posterior_mean
from gdiff_jax.samplers.estimate import denoise_estimate
from gdiff_jax.samplers.gauss_newton import gauss_newton_sample
from gdiff_jax.samplers.null_space import NullSpace, null_space_of, null_space_sample
from gdiff_jax.samplers.proximal import ProximalInfo, proximal_sample
from gdiff_jax.samplers.rank_one import RankOne, rank_one_mean
from gdiff_jax.samplers.red_diff import red_diff_sample
from gdiff_jax.samplers.unguided import unguided_sample, unguided_step
from gdiff_jax.trace import StepInfo

__all__ = [
    "NullSpace",
    "ProximalInfo",
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
    "gauss_newton_sample",
    "mean_of_chains",
    "null_space_of",
    "null_space_sample",
    "posterior_mean",
    "proximal_sample",
    "rank_one_mean",
    "red_diff_sample",
    "start_from",
    "unguided_sample",
    "unguided_step",
]
