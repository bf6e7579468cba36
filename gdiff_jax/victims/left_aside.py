"""What a file of weights holds for the loss, and not for its params: statistics of BatchNorms, which `make` alone loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gdiff_jax.matching import Loss
from gdiff_jax.modules import Params
from gdiff_jax.tensor_files import listed
from gdiff_jax.victims.own import constants


def not_loaded(path: str, beside: Mapping[str, np.ndarray], loss: Loss, params: Params, x: Any, y: Any) -> str:
    """What must be said of a file's arrays beside the params, of which the loss has other values; "" where it has these.

    What an optimiser keeps is no state of a network.
    """
    of_optimiser = lambda name: any(part.startswith("opt") for part in name.split("."))
    state = {name: np.asarray(value, np.float32) for name, value in beside.items() if value.ndim and value.dtype.kind in "fV"}
    state = {name: value for name, value in state.items() if not of_optimiser(name)}
    if not state:
        return ""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = jax.make_jaxpr(loss)(params, x, y)
    held = {(value.shape, value.astype(np.float32).tobytes()) for value in constants(program) if value.dtype.kind in "fV"}
    other = [name for name, value in state.items() if (value.shape, value.tobytes()) not in held]
    if not other:
        return ""
    return (
        f"{path} holds arrays beside the params, of which the loss has other values ({listed({'left aside': other})}): trained "
        "statistics of BatchNorms are no params, and the figures are of a network with those that the victim's function makes. "
        "Load them there, as the documentation's page on models of Flax, Equinox and Haiku shows."
    )
