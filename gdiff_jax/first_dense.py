"""Where a gradient holds a first layer that is dense and sees the whole image, which it then gives away."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class FirstDense:
    """Names of the layer's arrays among the parameters, and what lies between the image and its input.

    The input is scale * image + shift, flattened.

    Attributes:
      kernel: name of its kernel.
      bias: name of its bias (neurons,).
      scale, shift: one number a channel; None where the input is the image itself.
      transposed: whether the kernel is (neurons, pixels), as torch and Equinox have it, and not (pixels, neurons).
      chw: the image's (C, H, W) where it is flattened in that order, as by torch; None where in the order (H, W, C).
    """

    kernel: str
    bias: str
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    transposed: bool = False
    chw: tuple[int, int, int] | None = None

    def kernel_of(self, arrays: Mapping[str, Any]) -> Any:
        """The kernel, or its gradient, of arrays by name: (pixels, neurons), pixels in the image's order (H, W, C)."""
        kernel = arrays[self.kernel]
        kernel = kernel.T if self.transposed else kernel
        if self.chw is None:
            return kernel
        return kernel.reshape(*self.chw, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
