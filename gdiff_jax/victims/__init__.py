"""Attacked classifiers: `mlp(image_shape, num_classes, **options)` and its siblings make a `Victim`, `make_victim` one by name.

`own_victim` takes part with any `loss(params, x, y)`, `TorchModel` with a `torch.nn.Module`. Trained weights are kept by
`victims.checkpoints`, weights and gradients of other training loops are read by `victims.saved_trees`.
"""

from gdiff_jax.first_dense import FirstDense
from gdiff_jax.victims.own import OwnVictim, own_victim
from gdiff_jax.victims.torch_model import TorchModel
from gdiff_jax.victims.victim import Victim, cnn, lenet, lenet_sigmoid, mlp, resnet, vit_tiny
from gdiff_jax.victims.zoo import VICTIMS, make_victim

__all__ = [
    "VICTIMS",
    "FirstDense",
    "OwnVictim",
    "TorchModel",
    "Victim",
    "cnn",
    "lenet",
    "lenet_sigmoid",
    "make_victim",
    "mlp",
    "own_victim",
    "resnet",
    "vit_tiny",
]
