"""The one place where pixels change their range: files hold uint8, `to_model` gives [-1, 1], `to_unit` gives [0, 1].

What an array of another type or layout may mean is not guessed: what to do is said.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np


def to_model(images: Any) -> Any:
    """0..255 -> float32 [-1, 1], of any type: a mean of bytes too. NumPy in, NumPy out; jax in, jax out."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_unit(images: Any) -> Any:
    """float [-1, 1] -> float32 [0, 1], clipped: what metrics and files take. NumPy in, NumPy out; jax in, jax out.

    Raises:
      ValueError: of integers, which are in another range.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; floats in [-1, 1] are needed, x / 127.5 - 1 of 0..255")
    xp = jnp if not isinstance(images, np.ndarray) else np
    return xp.clip((images.astype(np.float32) + 1) / 2, 0, 1)


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Whole numbers in 0..255 of any integer type as uint8.

    Raises:
      ValueError: "are ..., what to do", where the numbers are in other units, or may be: 0 and 1 are black and white, or
        almost the same black.
    """
    if images.dtype == bool:
        raise ValueError("are bool; give 255 * x.astype(np.uint8)")
    low, high = int(images.min()), int(images.max())
    if low < 0 or high > 255:
        deep = "; of 16 bits x // 257 is 8" if images.dtype == np.uint16 else ""
        raise ValueError(f"are {images.dtype} in {low}..{high}; 0..255 is needed{deep}")
    if high == 1:
        raise ValueError(f"are {images.dtype} in {low}..1, which of 0..255 is black; if 1 is white, give 255 * x")
    return images.astype(np.uint8)


def too_dark(images: np.ndarray) -> str:
    """What is to be said of images in 0..255 that are all nearly black, as pixels in 0..15 are; "" of others."""
    high = int(images.max(initial=0))
    return f"images reach from 0 to {high} of 255, nearly black; if {high} is white, multiply them" if 1 < high < 64 else ""


def from_floats(images: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] of any type as float32.

    Raises:
      ValueError: "are ..., what to do", where they are in another range. Without a number below 0 they are taken for [0, 1],
        unless all are 1, which is white in both.
    """
    low, high = float(images.min()), float(images.max())
    said = f"are {images.dtype} in {low:.4g}..{high:.4g}"
    wanted = "give uint8, or floats in [-1, 1]"
    if low >= 0 and high <= 1 and low < 1:
        raise ValueError(f"{said}, which is the range [0, 1] of most loaders; {wanted}, which is 2 * x - 1 of [0, 1]")
    if low >= 0 and high <= 255 and high > 1:
        raise ValueError(f"{said}; {wanted}, which is x / 127.5 - 1 of 0..255 and 2 * x - 1 of [0, 1]")
    if not (low >= -1 and high <= 1):
        undo = "; if they are standardised, x * std + mean is [0, 1]" if np.isfinite([low, high]).all() else ""
        raise ValueError(f"{said}; {wanted}, which is 2 * x - 1 of [0, 1]{undo}")
    return images.astype(np.float32)


def layout_remedy(shape: tuple[int, ...]) -> str:
    """What to do with an array of this shape where (N, H, W, 1 or 3) is needed; "" where the shape does not tell."""
    if len(shape) == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3):
        return "channels come last: images.transpose(0, 2, 3, 1)"
    if len(shape) == 4 and shape[-1] == 4:
        return "leave the alpha channel away: images[..., :3]"
    if len(shape) == 3 and shape[-1] in (1, 3):
        return "one image is images[None]"
    if len(shape) == 3 and shape[0] not in (1, 3):
        return "grey images have a channel too: images[..., None]"
    if len(shape) == 3:
        return "one image with its channels first is images.transpose(1, 2, 0)[None], grey images are images[..., None]"
    if len(shape) == 2 and shape[1] > 3:
        sides = {c: math.isqrt(shape[1] // c) for c in (1, 3)}
        square = [c for c, side in sides.items() if c * side**2 == shape[1]]
        if square:
            c, side = square[0], sides[square[0]]
            first = f", or .reshape(-1, {c}, {side}, {side}).transpose(0, 2, 3, 1) if the channels come first" if c > 1 else ""
            return f"rows of pixels are images.reshape(-1, {side}, {side}, {c}){first}"
    return ""
