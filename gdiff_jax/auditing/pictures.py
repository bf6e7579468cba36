"""Images as PNG and GIF files in base64, which a page can hold within itself."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from gdiff_jax.images import to_unit

LARGEST = 128  # pixels; larger images are kept at this size, they are to be looked at and not to be measured
GIF_SIZE, GIF_MS = 160, 90
SHOWN_ERROR = 0.5  # the largest deviation that a map tells apart; the pixels of images vary by about that


def png(image: np.ndarray, largest: int = LARGEST) -> str:
    """A PNG file, base64, of an image (H, W, 1 or 3) in [-1, 1], of so many pixels at most; what is not finite is black."""
    unit = np.nan_to_num(np.asarray(to_unit(np.asarray(image)), np.float64), nan=0.0)
    pixels = np.round(255 * unit).astype(np.uint8)
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((largest, largest))
    return _encoded(picture, "PNG", optimize=True)


def deviation_png(deviation: np.ndarray) -> str:
    """A PNG file, base64, of what each pixel is expected to err by, (H, W, C) on [-1, 1]: white from `SHOWN_ERROR` on."""
    rms = np.sqrt(np.square(deviation).mean(-1, keepdims=True))
    return png(2 * np.minimum(rms / SHOWN_ERROR, 1) - 1)


def decode(text: str) -> np.ndarray:
    """Pixels 0..255 of a picture that `png` made."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        return np.asarray(picture)


def gif(frames: list[str]) -> str:
    """A GIF file, base64, of pictures that `png` made, the last one held for two seconds."""
    size, resample = (GIF_SIZE, GIF_SIZE), Image.Resampling.NEAREST
    first, *others = [Image.fromarray(decode(frame)).convert("RGB").resize(size, resample) for frame in frames]
    durations = [GIF_MS] * len(others) + [2000]
    return _encoded(first, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _encoded(picture: Image.Image, kind: str, **options: object) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()
