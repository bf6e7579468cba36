"""What a diffusers `scheduler_config.json` says of a prior: its levels, what its network predicts, the variance of its steps.

A scheduler is two things in one file. How the network was trained is a part of the prior; how that scheduler would sample from
it (its solver, and which of the timesteps it takes) is not, for the samplers here choose their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gdiff_jax.parametrisation import EDM, Epsilon, Flow, Parametrisation, Sample, Score, V
from gdiff_jax.schedule import VarianceType, betas_of, make_betas, zero_terminal_snr

# Of a discrete process whose network sees x_t of unit variance. The last four sample with an x_t that is scaled otherwise, and
# scale it back for the network.
_DISCRETE = (
    *("DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"),
)
_EDM, _FLOW, _SCORE = ("EDMEuler", "EDMDPMSolverMultistep"), ("FlowMatchEulerDiscrete",), ("ScoreSdeVe",)
_KINDS = (*_DISCRETE, *_EDM, *_FLOW, *_SCORE)
_VARIANCES: dict[str, VarianceType] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same variance, by way of its logarithm
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_PREDICTIONS: dict[str, Parametrisation] = {"epsilon": Epsilon(), "sample": Sample(), "v_prediction": V()}
_SPACINGS = ("leading", "trailing", "linspace")  # of the scheduler's own sampling, which is not ours
_LEVELS = 10**5


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """What a sampler needs to know of how a prior was trained."""

    betas: np.ndarray  # (T,) float64, of a process continuous in time those of a fine table of its levels
    variance: VarianceType
    clip: bool  # x0hat to [-1, 1] in every step
    parametrisation: Parametrisation = Epsilon()


def read_scheduler(config: Mapping[str, Any]) -> Diffusion:
    """A diffusers `scheduler_config.json`; absent fields have the class defaults of diffusers.

    Raises:
      ValueError: naming the fields whose values are not implemented.
    """
    kind = str(config.get("_class_name", "DDPMScheduler")).removesuffix("Scheduler")
    read = _edm if kind in _EDM else _flow if kind in _FLOW else _score if kind in _SCORE else _discrete
    bad: list[str] = []
    if kind not in _KINDS:
        bad.append(f"_class_name={config['_class_name']!r} (implemented: {', '.join(_KINDS)})")
    total = config.get("num_train_timesteps", 1000)
    if type(total) is not int or not 1 <= total <= _LEVELS:
        bad.append(f"num_train_timesteps={total!r} (needed: an integer in 1..{_LEVELS})")
    diffusion = read(config, kind, bad)
    # Of levels that float64 does not tell apart, or that are none, no step can be computed.
    if diffusion is not None and not np.all(np.diff(np.cumprod(1 - diffusion.betas), prepend=1.0) < 0):
        bad.append(_alike(config, kind))
    if diffusion is None or bad:
        raise ValueError("this scheduler config cannot be used: " + "; ".join(bad))
    return diffusion


def _alike(config: Mapping[str, Any], kind: str) -> str:
    """What to change where a level has no more noise than the one before."""
    sde, flow = kind in (*_EDM, *_SCORE), kind in _FLOW
    names = ("sigma_min", "sigma_max", "rho") if sde else ("shift",) if flow else ("beta_start", "beta_end", "trained_betas")
    given = ", ".join(f"{name}={config[name]!r}"[:80] for name in names if config.get(name) is not None) or "its fields"
    of_sde = "larger sigma_min" + ", or another rho" * (kind in _EDM)
    remedy = of_sde if sde else "shift nearer to 1" if flow else "larger beta_start, or a smaller beta_end"
    return f"{given}, of which some levels differ by nothing (needed: each with more noise than the one before, so a {remedy})"


def _only(config: Mapping[str, Any], bad: list[str], **known: tuple[Any, ...]) -> None:
    for field, values in known.items():
        if (value := config.get(field, values[0])) not in values:
            bad.append(f"{field}={value!r} (implemented: {' or '.join(map(repr, dict.fromkeys(values)))})")


def _number(config: Mapping[str, Any], bad: list[str], field: str, default: float) -> float:
    value = config.get(field, default)
    if type(value) not in (int, float) or not 0 < value < 1e6:
        bad.append(f"{field}={value!r} (needed: a number in (0, 1e6))")
        return default
    return float(value)


def _discrete(config: Mapping[str, Any], kind: str, bad: list[str]) -> Diffusion | None:
    _only(
        config, bad,
        prediction_type=tuple(_PREDICTIONS), predict_epsilon=(True, False), rescale_betas_zero_snr=(False, True),
        timestep_spacing=_SPACINGS, timestep_type=("discrete",), thresholding=(False,), use_flow_sigmas=(False,),
        timestep_values=(None,), clip_sample_range=(1, 1.0),
    )  # fmt: skip
    # Old files say `predict_epsilon`.
    predicts = config.get("prediction_type", "epsilon" if config.get("predict_epsilon", True) else "sample")
    rescaled = config.get("rescale_betas_zero_snr", False)
    if rescaled and predicts == "epsilon":
        bad.append(
            "rescale_betas_zero_snr=True with prediction_type='epsilon', of which x0hat is not a function where nothing is "
            "left of the image; say what the network predicts, 'v_prediction' or 'sample', or rescale_betas_zero_snr=False"
        )
    variance = config.get("variance_type")
    variance = "fixed_small" if variance is None else variance
    if not isinstance(variance, str) or variance not in _VARIANCES:
        bad.append(f"variance_type={variance!r} (implemented: {', '.join(_VARIANCES)})")
    clip = config.get("clip_sample", kind in ("DDPM", "DDIM"))
    if type(clip) is not bool:
        bad.append(f"clip_sample={clip!r} (needed: true or false)")
    total, trained = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if rescaled and total == 1:
        bad.append("rescale_betas_zero_snr=True of one timestep (needed: two or more)")
    ends = [config.get("beta_start", 1e-4), config.get("beta_end", 0.02)] if trained is None else trained
    if not isinstance(ends, list) or not all(type(v) is float and 0 < v < 1 for v in ends):
        bad.append(f"{'beta_start, beta_end' if trained is None else 'trained_betas'}={ends!r} (needed: numbers in (0, 1))")
    elif trained is not None and len(trained) != total:
        bad.append(f"trained_betas of length {len(trained)} (needed: num_train_timesteps {total})")
    if bad:
        return None
    betas = make_betas(config.get("beta_schedule", "linear"), total, *ends) if trained is None else np.asarray(trained)
    return Diffusion(zero_terminal_snr(betas) if rescaled else betas, _VARIANCES[variance], clip, _PREDICTIONS[predicts])


def edm_betas(total: int = 1000, least: float = 0.002, most: float = 80.0, rho: float | None = 7.0) -> np.ndarray:
    """(total,) betas of the levels that EDM samples at (Karras et al. 2022, Eq. 5), or of a geometric row without rho.

    Kept uniformly they are the paper's levels for fewer steps. beta = (sigma^2 - sigma_prev^2) / (1 + sigma^2) [derived].
    """
    u = np.linspace(0, 1, total)
    with np.errstate(all="ignore"):  # an odd rho gives levels that are none, which is seen of the betas
        if rho is None:
            sigma = least * (most / least) ** u
        else:
            low, high = np.power([least, most], 1 / rho)
            sigma = (low + u * (high - low)) ** rho
        return np.diff(np.square(sigma), prepend=0.0) / (1 + np.square(sigma))


def _edm(config: Mapping[str, Any], kind: str, bad: list[str]) -> Diffusion | None:
    _only(
        config, bad,
        prediction_type=("epsilon", "v_prediction"), sigma_schedule=("karras", "exponential"), thresholding=(False,),
    )  # fmt: skip
    least, most = _number(config, bad, "sigma_min", 0.002), _number(config, bad, "sigma_max", 80.0)
    data, rho = _number(config, bad, "sigma_data", 0.5), _number(config, bad, "rho", 7.0)
    if least >= most:
        bad.append(f"sigma_min={least:g} (needed: below sigma_max {most:g})")
    if bad:
        return None
    karras = config.get("sigma_schedule", "karras") == "karras"
    sign = -1.0 if config.get("prediction_type") == "v_prediction" else 1.0
    betas = edm_betas(config.get("num_train_timesteps", 1000), least, most, rho if karras else None)
    return Diffusion(betas, "fixed_small", False, EDM(data, sign))


def _score(config: Mapping[str, Any], kind: str, bad: list[str]) -> Diffusion | None:
    least, most = _number(config, bad, "sigma_min", 0.01), _number(config, bad, "sigma_max", 1348.0)
    if least >= most:
        bad.append(f"sigma_min={least:g} (needed: below sigma_max {most:g})")
    if bad:
        return None
    # Its sigmas are of images in [0, 1], ours of those in [-1, 1].
    betas = edm_betas(config.get("num_train_timesteps", 2000), 2 * least, 2 * most, None)
    return Diffusion(betas, "fixed_small", False, Score())


def _flow(config: Mapping[str, Any], kind: str, bad: list[str]) -> Diffusion | None:
    _only(
        config, bad,
        use_dynamic_shifting=(False,), invert_sigmas=(False,), shift_terminal=(None,),
    )  # fmt: skip
    shift = _number(config, bad, "shift", 1.0)
    if bad:
        return None
    total = config.get("num_train_timesteps", 1000)
    s = np.arange(1, total + 1) / total
    s = shift * s / (1 + (shift - 1) * s)
    # The share of the image's variance in x_s = (1 - s) x0 + s n, once it is scaled to unit variance.
    abar = np.square(1 - s) / (np.square(1 - s) + np.square(s))
    return Diffusion(betas_of(abar), "fixed_small", False, Flow(float(total)))
