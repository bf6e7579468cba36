"""What a client of federated averaging releases: the outcome of several local steps (FedAvg, McMahan et al. 2017)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gdiff_jax.matching import Loss
from gdiff_jax.mechanisms.base import Gradient
from gdiff_jax.pytrees import pytree, static


@pytree
class LocalSGD:
    """K steps of gradient descent on the client's images, W_{k+1} = W_k - eta grad L(W_k): a `matching.Client`.

    Its release is in units of a gradient, (W_0 - W_K) / (eta K), the mean gradient along the path; K = 1 is the gradient.
    What a client of FedAvg sends is eta K times that, W_0 - W_K. An attacker who guesses eta' for eta divides what was sent by
    eta' K, so its leak is eta / eta' times this release, and it simulates the steps with eta':

        leak = jax.tree.map(lambda g: eta / guess * g, LocalSGD(eta, K)(loss, params, x, y))
        match = GradientMatching(params, y, leak, loss, client=LocalSGD(guess, K))

    Attributes:
      learning_rate: eta > 0, of the local steps.
      steps: K >= 1.
      batch_size: images b a local step, which divides the client's number of images B: step k takes images k b .. k b + b - 1,
        in order and cyclically, and every array of x and y must have B as leading axis. With None every step takes all, and x
        and y may be whatever the loss takes.
    """

    learning_rate: jax.Array | float
    steps: int = static()
    batch_size: int | None = static(default=None)

    def __post_init__(self) -> None:  # not the learning rate: as a leaf it may be an axis of vmap
        if self.steps < 1:
            raise ValueError(f"LocalSGD with steps={self.steps}: a client makes at least one local step")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(
                f"LocalSGD with batch_size={self.batch_size}: give at least 1, or None for all images in each step"
            )

    def __call__(self, loss: Loss, params: Any, x: Any, y: Any) -> Gradient:
        batches = self._batches(x, y)

        def step(total: Gradient, k: jax.Array) -> tuple[Gradient, None]:
            here = jax.tree.map(lambda w, g: w - jnp.asarray(self.learning_rate, w.dtype) * g, params, total)
            batch = (x, y) if batches is None else jax.tree.map(lambda a: a[k % a.shape[0]], batches)
            return jax.tree.map(jnp.add, total, jax.grad(loss)(here, *batch)), None

        # The gradients' sum is carried, not W_k: W_0 - W_K would lose the digits that eta K takes.
        total, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), jnp.arange(self.steps))
        return jax.tree.map(lambda g: g / self.steps, total)

    def _batches(self, x: Any, y: Any) -> Any:
        """(x, y) with leading axes (B / b, b); None where each step takes all."""
        if self.batch_size is None:
            return None
        shapes = [jnp.shape(a) for a in jax.tree.leaves((x, y))]
        examples = {shape[0] if shape else 0 for shape in shapes}
        if len(examples) != 1 or min(examples) < 1 or min(examples) % self.batch_size:
            raise ValueError(
                f"LocalSGD with batch_size={self.batch_size} needs x and y with one leading axis of examples that it divides, "
                f"not shapes {shapes}; batch_size=None takes all in each step"
            )
        return jax.tree.map(lambda a: jnp.reshape(a, (-1, self.batch_size, *jnp.shape(a)[1:])), (x, y))


def guess_learning_rate(sent_bias_update: jax.Array, batch_size: int, num_classes: int, steps: int) -> jax.Array:
    """An attacker's estimate of a client's local rate eta from what it sent of the last layer's bias [our choice].

    The gradient of that bias is the batch's mean of p - onehot(y). In an untrained softmax classifier p is about 1 / C for
    each of the C classes, so the W_0 - W_K that was sent is about eta K (n_c / B - 1 / C) below zero for a class with n_c of
    the B images, and above zero for a class with none. Over the D classes below zero this sums to eta K (1 - D / C).

    It assumes that, few images for the classes (D < C), and labels not yet learnt on the way: as p of the right class rises,
    the estimate falls, to eta / K where the first step learns all. So eta lies between the estimate and K times it. Untrained
    LeNets and CNNs on 1 or 4 images: within 10 % for K = 1; for K = 4 within 10 % at eta = 0.001, and 0.2 to 0.9 of eta at 0.1.

    Args:
      sent_bias_update: W_0 - W_K of the last bias, (C,), as sent: not divided by eta K.
      batch_size: B, the client's images: at most B classes are below zero, the rest is noise.
      num_classes: C.
      steps: K.

    Returns:
      A scalar; 0 where no class is below zero.
    """
    if jnp.shape(sent_bias_update) != (num_classes,):
        raise ValueError(
            f"the last bias of {num_classes} classes has an update of shape ({num_classes},), "
            f"not {jnp.shape(sent_bias_update)}; give that layer's bias alone"
        )
    below = jnp.maximum(-jnp.sort(sent_bias_update)[:batch_size], 0)
    present = jnp.sum(below > 0, dtype=below.dtype)
    return below.sum() / (steps * (1 - present / num_classes))
