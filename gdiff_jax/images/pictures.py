"""A picture file as pixels: orientation, transparency, grey, depth and size, decided in this one place."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from gdiff_jax.files import hollow

_ORIENTATION = 0x0112  # EXIF's tag
_GREY = ("1", "L", "LA", "La")


def decode(data: bytes, channels: int, size: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pixels (H, W, channels) uint8 of a picture file, and what was done to it, in the passive voice.

    It is turned upright where EXIF says how the camera was held, laid on white where it is transparent, made grey for one
    channel or colours for three, cropped at its centre to a square and resized to `size`. Of several frames or pages the
    first is taken, of 16 bits a colour the upper 8.

    Raises:
      Exception: of many types, for what is broken, encrypted or too large; ValueError for what holds no picture at all, and
        for grey of more than 8 bits, whose scale no file tells.
    """
    if why := hollow(data[:64]):
        raise ValueError(why)
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode in ("F", "I") or picture.mode.startswith("I;16"):
            raise ValueError(f"its pixels are of mode {picture.mode}, 8 bits a channel are needed, in a scale that you choose")
        done = []
        if any(";16" in str(tile[3]) for tile in picture.tile):  # the layout of the file's pixels, such as RGB;16B
            done.append("reduced from 16 bits a channel to the upper 8")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a telephone's, with a preview behind it
            done.append("of several frames or pages, the first taken")
        if picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
            done.append("turned upright as its EXIF orientation says")
        image = _opaque(ImageOps.exif_transpose(picture), done)
        image = _in_channels(image, channels, done)
    if size is not None and image.size != (size, size):
        side = min(image.size)
        if image.width != image.height:
            done.append("cropped at their centre to a square")
        if side != size:
            done.append(f"{'shrunk' if side > size else 'enlarged'} to {size} pixels")
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, channels), tuple(done)


def _opaque(image: Image.Image, done: list[str]) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layered = image.convert("RGBA")
    if layered.getchannel("A").getextrema()[0] == 255:
        return image
    done.append("laid on white where transparent")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
    return flat.convert("L") if image.mode in _GREY else flat


def _in_channels(image: Image.Image, channels: int, done: list[str]) -> Image.Image:
    if channels == 3:
        return image.convert("RGB")
    if image.mode in _GREY:
        return image.convert("L")
    colours = np.asarray(image.convert("RGB"))
    if (colours != colours[..., :1]).any():
        done.append("made grey")
    return image.convert("RGB").convert("L")
