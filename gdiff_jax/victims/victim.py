"""A victim: a classifier's network, its loss and its initial weights, as pure functions. Nothing here knows of diffusion.

The attack needs `loss(params, x, y)` and nothing else, so a network of the user's own takes part with any such function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gdiff_jax import modules
from gdiff_jax.first_dense import FirstDense
from gdiff_jax.modules import Params, Statistics
from gdiff_jax.victims import networks, vit

Policy = Callable[[str, jax.Array, jax.Array], Statistics]  # of a BatchNorm's name and the batch's own statistics


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over the images; y holds integer labels, or probabilities of every class."""
    if not jnp.issubdtype(jnp.result_type(y), jnp.floating):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    if jnp.shape(y) != logits.shape:
        raise ValueError(
            f"labels of a floating dtype are probabilities of the classes, of the logits' shape {logits.shape}, "
            f"not {jnp.shape(y)}; make labels integers"
        )
    return optax.softmax_cross_entropy(logits, y).mean()


def _constants(statistics: dict[str, Statistics], name: str, mean: jax.Array, var: jax.Array) -> Statistics:
    """The given statistics, in the dtype of those they replace."""
    known_mean, known_var = statistics[name]
    return jnp.asarray(known_mean, mean.dtype), jnp.asarray(known_var, var.dtype)


@dataclasses.dataclass(frozen=True)
class Victim:
    """Softmax cross-entropy of a classifier.

    Where the network has BatchNorms its gradient depends on their statistics, and which are used is the choice of a loss:

    * `loss`: those of the batch it is called with, as a client in training computes its gradient; an attacker who knows no
      statistics takes them from the candidate.
    * `loss_known_statistics`: the attacker knows the private batch's statistics (`batch_statistics`, released with the
      gradient): normalisation is by their values, the gradient passes through the candidate's own. At the private batch it is
      the client's gradient.
    * `loss_replaced_statistics`: constants, as in evaluation: running statistics, or those of public images or of a prior's
      samples in place of the private ones. The client's gradient passed through its statistics, this one does not.

    The last two take (y, statistics) for y. In a network without BatchNorm all three are one, with statistics {}.

    Attributes:
      network: an NNX class made as `network(image_shape, num_classes, rngs, **options)`.
      image_shape: (H, W, C) of its input.
      num_classes: labels are 0 .. num_classes - 1.
      options: keyword arguments of the network, hashable, in order: victims compare by value.
    """

    network: type[networks.Classifier]
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    options: tuple[tuple[str, Any], ...] = ()

    def build(self, rngs: nnx.Rngs) -> networks.Classifier:
        return self.network(self.image_shape, self.num_classes, rngs, **dict(self.options))

    def init(self, key: jax.Array) -> Params:
        """Untrained weights: LeCun-normal kernels and zero biases, Flax's defaults, unless the network says otherwise."""
        return modules.init_params(key, self)

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """(..., classes) for images (..., H, W, C) in [-1, 1]; BatchNorms take their statistics over all of them."""
        return self._logits(params, x, None)

    def _logits(
        self, params: Params, x: jax.Array, policy: Policy | None, statistics: dict[str, Statistics] | None = None
    ) -> jax.Array:
        def use(network: networks.Classifier) -> jax.Array:
            norms = modules.batch_norms(network)
            if statistics is not None and statistics.keys() != norms.keys():
                raise ValueError(
                    f"statistics are of {sorted(statistics)}, the network's BatchNorms are {sorted(norms)}; "
                    "make them with batch_statistics(params, x)"
                )
            if policy is not None:  # set on the network that `call` makes for this one use
                for name, norm in norms.items():
                    norm.policy = functools.partial(policy, name)
            return network(x.reshape((-1, *self.image_shape)))

        return modules.call(self, use, params).reshape((*x.shape[:-3], self.num_classes))

    def loss(self, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        """Mean cross-entropy: x (H, W, C) with a scalar label y, or (B, H, W, C) with y (B,), the gradient of a batch.

        A y of a floating dtype holds probabilities, (classes,) or (B, classes): with them an attack can look for the label
        together with the image (DLG).
        """
        return _cross_entropy(self.logits(params, x), y)

    def batch_statistics(self, params: Params, x: jax.Array) -> dict[str, Statistics]:
        """(mean, var) of each BatchNorm's input, by its dotted name, for images (H, W, C) or (B, H, W, C); {} without any.

        Each layer is fed by layers that normalise with these very statistics, as in training.
        """
        found: dict[str, Statistics] = {}

        def note(name: str, mean: jax.Array, var: jax.Array) -> Statistics:
            found[name] = mean, var
            return mean, var

        self._logits(params, x, note)
        return found

    def loss_known_statistics(self, params: Params, x: jax.Array, y: tuple[jax.Array, dict[str, Statistics]]) -> jax.Array:
        """`loss` with BatchNorms that normalise by known + own(params, x) - own(stop_gradient(params), x).

        In value those are the known statistics, for every x; their derivative in params is that of the candidate's own. So the
        gradient in params is the client's where the candidate is the private batch, and is differentiable in x without bias,
        which own + stop_gradient(known - own) would not be: it counts known - own as constant in x. Costs two forward passes.
        """
        labels, statistics = y
        frozen: dict[str, Statistics] = {}

        def note(name: str, mean: jax.Array, var: jax.Array) -> Statistics:
            frozen[name] = mean, var
            return _constants(statistics, name, mean, var)

        def pinned(name: str, mean: jax.Array, var: jax.Array) -> Statistics:
            known_mean, known_var = _constants(statistics, name, mean, var)
            return known_mean + (mean - frozen[name][0]), known_var + (var - frozen[name][1])

        self._logits(jax.lax.stop_gradient(params), x, note, statistics)
        return _cross_entropy(self._logits(params, x, pinned), labels)

    def loss_replaced_statistics(self, params: Params, x: jax.Array, y: tuple[jax.Array, dict[str, Statistics]]) -> jax.Array:
        """`loss` with BatchNorms that normalise by the given statistics, constants: no image looks at another."""
        labels, statistics = y
        return _cross_entropy(self._logits(params, x, functools.partial(_constants, statistics), statistics), labels)

    def features(self, params: Params, x: jax.Array) -> jax.Array:
        """(features,) of one image (H, W, C): the input of the last dense layer."""
        return modules.call(self, lambda network: network.features(x[None]), params)[0]

    @property
    def last_kernel(self) -> str:
        """Name of the last dense layer's kernel (features, classes) among the parameters."""
        return [name for name in modules.param_shapes(self) if name.startswith("fc") and name.endswith("kernel")][-1]

    @property
    def last_bias(self) -> str:
        """Name of the last dense layer's bias (classes,)."""
        return self.last_kernel.replace("kernel", "bias")

    @property
    def first_dense(self) -> FirstDense | None:
        """Of a first layer that is dense and sees the whole image; else None."""
        layer = self.network.first_dense
        return None if layer is None else FirstDense(f"{layer}.kernel", f"{layer}.bias")

    @property
    def has_batch_norm(self) -> bool:
        return bool(modules.call(self, modules.batch_norms, modules.restore_target(self)))


def mlp(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.MLP`; options: widths, activation, norm."""
    return Victim(networks.MLP, image_shape, num_classes, tuple(options.items()))


def lenet(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.LeNet`; options: width, activation."""
    return Victim(networks.LeNet, image_shape, num_classes, tuple(options.items()))


def lenet_sigmoid(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10) -> Victim:
    """DLG's own: `lenet` with sigmoids."""
    return lenet(image_shape, num_classes, activation=jax.nn.sigmoid)


def cnn(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.CNN`; options: channels, activation, norm ("group" or "batch"), pooling."""
    return Victim(networks.CNN, image_shape, num_classes, tuple(options.items()))


def resnet(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`networks.ResNet`; options: channels, residual, norm ("group" or "batch")."""
    return Victim(networks.ResNet, image_shape, num_classes, tuple(options.items()))


def vit_tiny(image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **options: Any) -> Victim:
    """`vit.ViT`; options: patch, dim, depth, heads."""
    return Victim(vit.ViT, image_shape, num_classes, tuple(options.items()))
