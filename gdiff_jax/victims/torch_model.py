"""A `torch.nn.Module` as a victim: what must be told of it, in a file that imports no torch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class TorchModel:
    """A `torch.nn.Module` to be audited, with what the module itself does not tell.

    It is run on JAX by torchax, in float32 and in eval mode, and held against torch's own gradient before anything is attacked.
    Its parameters keep torch's names, layouts and order. Those with `requires_grad=False`, and buffers, are constants. The
    module that is given stays as it is.

    Attributes:
      module: takes a batch (N, C, H, W), and returns what `loss` takes, or an object that has it as `.logits`.
      loss: torch's `loss(output, target)`, a scalar, a mean over the batch where there are several images; the cross-entropy of
        logits (N, classes) if None.
      mean, std: what pixels are normalised by, one number a channel, in units of `value_range`. If None, what timm keeps beside
        a model (`pretrained_cfg`), else nothing is done; 0 and 1 say that nothing is to be done.
      value_range: of pixels before that: (0, 1), as torchvision's ToTensor has them, (-1, 1) or (0, 255).
      batch_norm: "running", statistics as in eval mode; or "batch", those of the images that a gradient is of, as in train
        mode: in the BatchNorms that are in it, or, where none is, in all. If None they are the running ones, and a module with
        BatchNorms in train mode is refused, for the two have different gradients. So it is of InstanceNorms that track
        statistics.
    """

    module: Any
    loss: Callable[[Any, Any], Any] | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    value_range: tuple[float, float] = (0.0, 1.0)
    batch_norm: str | None = None


def as_model(value: Any) -> TorchModel | None:
    """A `TorchModel` of a module or of itself; None of anything else. Of torch nothing is imported that is not already."""
    if isinstance(value, TorchModel):
        return value
    torch = sys.modules.get("torch")
    return TorchModel(value) if torch is not None and isinstance(value, torch.nn.Module) else None
