"""Weights and gradients of a torch module in files: its own names, layouts and order, buffers included."""

from __future__ import annotations

import dataclasses
import itertools
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
    return {name: _array(value) for name, value in unwrapped(module).state_dict().items() if isinstance(value, torch.Tensor)}


def files_of(module: Any) -> saved_trees.OfModule:
    """In which orders, and under which names, files hold a module's arrays."""
    module = unwrapped(module)
    every = dict(module.named_parameters())
    trained = {name: p for name, p in every.items() if p.requires_grad}
    named: dict[int, list[str]] = {}
    each = dict(remove_duplicate=False)
    for name, tensor in itertools.chain(module.named_parameters(**each), module.named_buffers(**each)):
        named.setdefault(id(tensor), []).append(name)
    tied = {first: tuple(others) for first, *others in named.values() if others}
    arrays = lambda tensors: {name: _array(value) for name, value in tensors.items()}
    return saved_trees.OfModule((arrays(trained), arrays(every), state_of(module)), tied)


def _array(tensor: Any) -> np.ndarray:
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if narrow else tensor).detach().cpu().numpy()


def with_weights(model: TorchModel, path: str, say: Callable[[str], None] = files.say) -> TorchModel:
    """The model with the state dict of a file; the module that it holds stays as it is.

    Raises:
      ValueError: where the file does not hold all of it, as `saved_trees.fit`.
    """
    of_module = files_of(model.module)
    again = {other for others in of_module.tied.values() for other in others}  # the same tensor, which is written to once
    state: Any = {name: value for name, value in state_of(model.module).items() if name not in again}
    found = saved_trees.fit(path, state, {}, weights=True, module=of_module, say=say)
    module = private(unwrapped(model.module))
    module.load_state_dict({name: torch.tensor(value) for name, value in found.items()}, strict=False)
    return dataclasses.replace(model, module=module)
