"""What a torch module tells of itself, and what must be assumed: normalisation, input size, modes, all of it said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from gdiff_jax.victims.torch_model import TorchModel


def normalisation(model: TorchModel, module: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """scale and shift by channel, from [-1, 1] to what the module takes, and the sentence that tells of it.

    Raises:
      ValueError: naming a range, mean or std that is none.
    """
    low, high = (float(v) for v in model.value_range)
    given = model.mean is not None or model.std is not None
    if given and (model.mean is None or model.std is None):
        raise ValueError(f"mean {model.mean} and std {model.std} go together: give both")
    config = {} if given else _config_of_timm(module)
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"value_range {model.value_range} must be (low, high), such as (0, 1)")
    numbers = lambda value, name, otherwise: np.atleast_1d(
        np.asarray(config.get(name, otherwise) if value is None else value, np.float64)
    )
    mean, std = numbers(model.mean, "mean", 0.0), numbers(model.std, "std", 1.0)
    if mean.ndim != 1 or std.ndim != 1 or not np.isfinite(mean).all() or not (np.isfinite(std) & (std > 0)).all():
        raise ValueError(f"mean {model.mean} and std {model.std} must be one number a channel, std above 0")
    if len({len(mean), len(std)} - {1}) > 1:
        raise ValueError(f"mean has {len(mean)} numbers, std {len(std)}: give one for each channel")
    mean, std = np.broadcast_arrays(mean, std)
    if config:  # timm's are of pixels in [0, 1]
        mean, std = low + mean * (high - low), std * (high - low)
    assumed = "" if tuple(model.value_range) != TorchModel.value_range else ", torchvision's ToTensor"
    start = f"it takes (N, C, H, W) with pixels in [{low:g}, {high:g}]{assumed},"
    listed = lambda values: ", ".join(f"{v:g}" for v in values)
    if given or config:
        how = "given" if given else "found in its pretrained_cfg"
        text = f"{start} normalised by mean ({listed(mean)}) and std ({listed(std)}), which were {how}"
    else:
        text = f"{start} not normalised, for no mean and std were given"
    scale, shift = (high - low) / 2 / std, ((high + low) / 2 - mean) / std
    return scale.astype(np.float32), shift.astype(np.float32), text


def described(model: TorchModel, module: Any) -> list[str]:
    """What else is assumed or found, a sentence each.

    Raises:
      ValueError: where a BatchNorm's statistics must be told.
    """
    said = ["its loss is the cross-entropy of its logits" if model.loss is None else "its loss is the one that was given"]
    size = _input_size(module)
    said += [f"it says that it was made for {size} pixels"] if size else []
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.dtype != torch.float32})
    said += [f"its weights of {', '.join(dtypes)} are taken in float32"] if dtypes else []
    parameters = list(module.parameters())
    frozen = sum(not p.requires_grad for p in parameters)
    said += [f"{frozen} of its {len(parameters)} arrays have requires_grad=False and no gradient"] if frozen else []
    return said + _modes(model, module)


def batch_normed(model: TorchModel, module: Any) -> set[str]:
    """The names of the norms that take the statistics of the images; under "batch" those in train mode, or, where none is, all
    of them."""
    norms = _batch_norms(module)
    always = {name for name, norm in norms.items() if norm.running_mean is None}
    in_train = {name for name, norm in norms.items() if norm.training} - always
    return always | ((in_train or set(norms)) if model.batch_norm == "batch" else set())


def _batch_norms(module: Any) -> dict[str, Any]:
    """Those that have two modes: an InstanceNorm that tracks statistics is one in all but its name."""
    of_batch, of_image = torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.instancenorm._InstanceNorm
    tracks = lambda m: isinstance(m, of_image) and m.running_mean is not None
    return {name: m for name, m in module.named_modules() if isinstance(m, of_batch) or tracks(m)}


def _kinds(norms: Iterable[Any]) -> str:
    are_instance = {isinstance(norm, torch.nn.modules.instancenorm._InstanceNorm) for norm in norms}
    return " and ".join(("BatchNorms", "InstanceNorms")[is_instance] for is_instance in sorted(are_instance))


def _modes(model: TorchModel, module: Any) -> list[str]:
    said = []
    norms = _batch_norms(module)
    in_train = [m for m in norms.values() if m.training and m.running_mean is not None]
    if in_train and model.batch_norm is None:
        raise ValueError(
            f"{_kinds(in_train)} in train mode ({len(in_train)} of {len(norms)}) would take the batch's statistics; call "
            'module.eval() for the running ones in all, or give gdiff_jax.TorchModel(module, batch_norm="batch") for the '
            "batch's in these"
        )
    names = batch_normed(model, module)
    of_batch, others = ([norm for name, norm in norms.items() if (name in names) is taken] for taken in (True, False))
    if of_batch:
        said.append(f"its {_kinds(of_batch)} ({len(of_batch)}) take the statistics of the images that a gradient is of")
    if others:
        said.append(f"its {_kinds(others)} ({len(others)}) take their running statistics, as in eval mode")
    drops = [m for m in module.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 and m.training]
    if drops:
        said.append(f"its Dropouts ({len(drops)}), in train mode when it was given, are off: nobody knows a client's own masks")
    elif module.training and not in_train:
        said.append("it was given in train mode, and is run in eval mode")
    return said


def _config_of_timm(module: Any) -> Mapping[str, Any]:
    """What timm keeps beside a model; {} where there is none with a mean."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, name, None)
        config = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        if config.get("mean") is not None and config.get("std") is not None:
            return config
    return {}


def _input_size(module: Any) -> str:
    """As text; of timm, Hugging Face and torchvision."""
    size = _config_of_timm(module).get("input_size") or getattr(getattr(module, "config", None), "image_size", None)
    size = size or getattr(module, "image_size", None)
    if isinstance(size, int):
        return f"{size} x {size}"
    return " x ".join(map(str, size[-2:])) if isinstance(size, list | tuple) and len(size) >= 2 else ""
