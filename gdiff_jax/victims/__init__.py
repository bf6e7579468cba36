"""Attacked classifiers. `mlp(image_shape, num_classes, **options)` and its siblings make a `Victim`."""

from gdiff_jax.victims.victim import Victim, cnn, lenet, lenet_sigmoid, mlp, resnet, vit_tiny

__all__ = ["Victim", "cnn", "lenet", "lenet_sigmoid", "mlp", "resnet", "vit_tiny"]
