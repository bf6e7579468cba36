"""How much of a private image can be reconstructed from a leaked gradient, by gradient-guided diffusion, in JAX.

    leak  = GaussianNoise(sigma)(key, victim_gradient(victim.loss, params, x, y))
    match = GradientMatching(params, y, leak, victim.loss)
    image, trace = dsg_sample(key, prior.denoise, match, prior.schedule(100), prior.image_shape)

`audit(loss, params, images, labels)` does this over images and noise levels and says what it means. Every attack is also an
object of `gdiff_jax.methods`, with one call.

Images are (H, W, C) float32 in [-1, 1]; a batch of trials is a `jax.vmap` over keys and objectives.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdiff_jax.auditing import Audit, Comparison, audit, compare
    from gdiff_jax.federated import LocalSGD, guess_learning_rate
    from gdiff_jax.matching import GradientMatching, cosine, l1, l2, squared_l2, victim_gradient
    from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise
    from gdiff_jax.metrics import image_metrics
    from gdiff_jax.priors import Denoiser, Prior, load_prior
    from gdiff_jax.samplers import StepInfo, dps_sample, dsg_sample, unguided_sample
    from gdiff_jax.schedule import Schedule
    from gdiff_jax.signal import NoiseCalibration
    from gdiff_jax.victims import TorchModel, Victim

__version__ = "0.2.0"

# By the submodule that defines them. They are imported when they are asked for: a command, or who needs a metric alone, need
# not wait two seconds for every library that some part of the package uses.
_EXPORTS = {
    "auditing": ("Audit", "Comparison", "audit", "compare"),
    "federated": ("LocalSGD", "guess_learning_rate"),
    "matching": ("GradientMatching", "cosine", "l1", "l2", "squared_l2", "victim_gradient"),
    "mechanisms": ("Chain", "Clip", "GaussianNoise"),
    "metrics": ("image_metrics",),
    "priors": ("Denoiser", "Prior", "load_prior"),
    "samplers": ("StepInfo", "dps_sample", "dsg_sample", "unguided_sample"),
    "schedule": ("Schedule",),
    "signal": ("NoiseCalibration",),
    "victims": ("TorchModel", "Victim"),
}
_SUBMODULES = ("algebra", "attacks", "images", "methods", "parallel", "sweeping", "theory", *_EXPORTS)
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "Audit",
    "Chain",
    "Clip",
    "Comparison",
    "Denoiser",
    "GaussianNoise",
    "GradientMatching",
    "LocalSGD",
    "NoiseCalibration",
    "Prior",
    "Schedule",
    "StepInfo",
    "TorchModel",
    "Victim",
    "audit",
    "compare",
    "cosine",
    "dps_sample",
    "dsg_sample",
    "guess_learning_rate",
    "image_metrics",
    "l1",
    "l2",
    "load_prior",
    "squared_l2",
    "unguided_sample",
    "victim_gradient",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # asked for once
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
