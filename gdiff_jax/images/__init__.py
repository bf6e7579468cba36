"""Images from files, and the one place where pixels change their range: files hold uint8, attacks work in [-1, 1]."""

from gdiff_jax.images.folders import Split
from gdiff_jax.images.ranges import from_floats, layout_remedy, to_bytes, to_model, to_unit, too_dark
from gdiff_jax.images.sets import BUNDLED, CIFAR10_CLASSES, ImageSet, load_images

__all__ = [
    "BUNDLED",
    "CIFAR10_CLASSES",
    "ImageSet",
    "Split",
    "from_floats",
    "layout_remedy",
    "load_images",
    "to_bytes",
    "to_model",
    "to_unit",
    "too_dark",
]
