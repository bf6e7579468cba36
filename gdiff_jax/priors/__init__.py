"""Diffusion priors: the networks, their configs, and the folders they are loaded from."""

from gdiff_jax.priors.prior import BUNDLED, Denoiser, Prior, load_prior, save_prior
from gdiff_jax.priors.unet2d import UNet2D, UNet2DConfig

__all__ = [
    "BUNDLED",
    "Denoiser",
    "Prior",
    "UNet2D",
    "UNet2DConfig",
    "load_prior",
    "save_prior",
]
