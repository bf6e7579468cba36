"""How much of a private image can be reconstructed from a leaked gradient, by gradient-guided diffusion, in JAX.

    leak  = GaussianNoise(sigma)(key, victim_gradient(victim.loss, params, x, y))
    match = GradientMatching(params, y, leak, victim.loss)
    image, trace = dsg_sample(key, prior.denoise, match, prior.schedule(100), prior.image_shape)

`audit(loss, params, images, labels)` does this over images and noise levels and says what it means.

Images are (H, W, C) float32 in [-1, 1]; a batch of trials is a `jax.vmap` over keys and objectives.
"""

from gdiff_jax.auditing import Audit, audit
from gdiff_jax.federated import LocalSGD, guess_learning_rate
from gdiff_jax.matching import GradientMatching, cosine, l2, squared_l2, victim_gradient
from gdiff_jax.mechanisms import GaussianNoise
from gdiff_jax.metrics import image_metrics
from gdiff_jax.priors import Denoiser, Prior, load_prior
from gdiff_jax.samplers import StepInfo, dps_sample, dsg_sample, unguided_sample
from gdiff_jax.schedule import Schedule
from gdiff_jax.signal import NoiseCalibration
from gdiff_jax.victims import Victim

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "Denoiser",
    "GaussianNoise",
    "GradientMatching",
    "LocalSGD",
    "NoiseCalibration",
    "Prior",
    "Schedule",
    "StepInfo",
    "Victim",
    "audit",
    "cosine",
    "dps_sample",
    "dsg_sample",
    "guess_learning_rate",
    "image_metrics",
    "l2",
    "load_prior",
    "squared_l2",
    "unguided_sample",
    "victim_gradient",
]
