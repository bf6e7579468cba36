"""Weights and gradients of a torch module in files: its own names, layouts and order, buffers included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gdiff_jax import files
from gdiff_jax.victims import saved_trees
from gdiff_jax.victims.torch_loss import private, unwrapped
from gdiff_jax.victims.torch_model import TorchModel


def state_of(module: Any) -> dict[str, np.ndarray]:
    """The tensors of a state dict, in its order; floats of few bits in float32."""
    tensors = {name: value for name, value in unwrapped(module).state_dict().items() if isinstance(value, torch.Tensor)}
    narrow = (torch.bfloat16, torch.float16)
    return {name: (v.float() if v.dtype in narrow else v).detach().cpu().numpy() for name, v in tensors.items()}


def with_weights(model: TorchModel, path: str, say: Callable[[str], None] = files.say) -> TorchModel:
    """The model with the state dict of a file; the module that it holds stays as it is.

    Raises:
      ValueError: where the file does not hold all of it, as `saved_trees.fit`.
    """
    state: Any = state_of(model.module)
    found = saved_trees.fit(path, state, {}, weights=True, in_order=(state,), say=say)
    module = private(unwrapped(model.module))
    module.load_state_dict({name: torch.tensor(value) for name, value in found.items()}, strict=False)
    return dataclasses.replace(model, module=module)
