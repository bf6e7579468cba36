"""Where a gradient holds a first layer that is dense and sees the whole image, which it then gives away."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class FirstDense:
    """Names of the layer's arrays among the parameters, and what lies between the image and its input.

    The input is scale * image + shift, flattened in the image's order (H, W, C).

    Attributes:
      kernel: name of its kernel (pixels, neurons).
      bias: name of its bias (neurons,).
      scale, shift: one number a channel; None where the input is the image itself.
    """

    kernel: str
    bias: str
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
