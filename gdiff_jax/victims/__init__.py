"""Attacked classifiers. `mlp(image_shape, num_classes)` and its siblings make a `Victim`."""

from gdiff_jax.victims.victim import Victim, cnn, lenet, lenet_sigmoid, mlp, resnet

__all__ = ["Victim", "cnn", "lenet", "lenet_sigmoid", "mlp", "resnet"]
