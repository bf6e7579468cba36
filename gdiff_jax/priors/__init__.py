"""Diffusion priors: the networks, their configs, and the places they are loaded from."""

from gdiff_jax.priors.adm import ADM, ADMConfig
from gdiff_jax.priors.denoiser import Denoiser
from gdiff_jax.priors.edm import EDMConfig
from gdiff_jax.priors.prior import Prior, load_prior, save_configs, save_prior
from gdiff_jax.priors.sources import BUNDLED
from gdiff_jax.priors.unet2d import UNet2D
from gdiff_jax.priors.unet2d_config import UNet2DConfig

__all__ = [
    "ADM",
    "BUNDLED",
    "ADMConfig",
    "Denoiser",
    "EDMConfig",
    "Prior",
    "UNet2D",
    "UNet2DConfig",
    "load_prior",
    "save_configs",
    "save_prior",
]
