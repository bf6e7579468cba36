"""The network of a prior with its weights, and the label that it is told where it is conditional, as one callable pytree."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdiff_jax import modules
from gdiff_jax.modules import Params
from gdiff_jax.pytrees import static


class Network(Protocol):
    """What a config says of the network that it builds. Of a conditional one `label` is an argument more of its call."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that it denoises."""
        ...

    @property
    def learns_variance(self) -> bool:
        """Whether half of its output is v."""
        ...

    @property
    def label_ndim(self) -> int | None:
        """Of what a conditional network is told of one image: 0, a label; 1, a vector. None where it is not conditional."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Labels are integers below it; None where it is told none, any number, or a vector."""
        ...

    @property
    def null_label(self) -> int | None:
        """The label that stands for none, where its file says so."""
        ...

    def __hash__(self) -> int: ...

    def build(self, rngs: nnx.Rngs) -> nnx.Module: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """`out, v = denoise(x_t, t)` for one image; a pytree whose leaves are the weights, so jit takes them as arguments.

    `out` is eps, or what else the prior's `parametrisation` says.

    Attributes:
      params: flat dict of float32 arrays.
      config: the network.
      dtype: of the network's arithmetic. The time embedding, statistics, softmax, the last convolution and what is
        returned are float32 always.
      remat: keep only the inputs of each block for the backward pass and compute the rest again. Of use on a GPU or TPU;
        on a CPU XLA computes it again early and keeps it all the same (measured: more time, no less memory).
      label: of a conditional network, see `given`; an array, so trials with different labels are one program.
      null_label: the label that stands for none, where the network was trained with one.
      class_guidance: w of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, there 1 + w): the output is
        null + w (of the label - null), and v the label's. 1 is the network as it is, at half the cost of any other.
    """

    params: Params
    config: Network = static()
    dtype: str = static(default="float32")
    remat: bool = static(default=False)
    label: jax.Array | None = None
    null_label: int | None = static(default=None)
    class_guidance: float = static(default=1.0)

    def __post_init__(self) -> None:
        if self.null_label is None and self.class_guidance != 1:
            raise ValueError(f"class_guidance {self.class_guidance} needs a null_label, a label that stands for none")

    @property
    def num_labels(self) -> int | None:
        """Of its classes those that are some: without the last, where that stands for none."""
        classes = self.config.num_classes
        return classes - 1 if classes is not None and self.null_label == classes - 1 else classes

    def __call__(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The prediction for one image x_t (H, W, C) at t (scalar), and v of its shape, or None if v is not learned."""
        out, v = self.batch(x_t[None], jnp.asarray(t)[None])
        return out[0], None if v is None else v[0]

    def batch(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Prediction and v of a batch (N, H, W, C) at timesteps (N,), all of one label, or each of its own (N,)."""
        out = self._output(x_t.astype(self.dtype), t)
        if not self.config.learns_variance:
            return out, None
        out, v = jnp.split(out, 2, axis=-1)
        return out, v

    def given(self, label: jax.Array | int | None) -> Denoiser:
        """The same network told a label, an integer below `config.num_classes` (of class_embed_type `identity` its vector);
        without one it is told `null_label`, if there is one.

        Raises:
          ValueError: where the network is not conditional, or a label that is not traced is out of its range.
        """
        if label is None:
            return dataclasses.replace(self, label=None)
        if self.config.label_ndim is None:
            raise ValueError(f"label {label!r}: this prior is not conditional; give it none")
        label, classes = jnp.asarray(label), self.config.num_classes
        if classes is None:
            return dataclasses.replace(self, label=label)
        if not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(f"labels are {label.dtype}, this prior is told integers below {classes}")
        # A traced one cannot be looked at; a row that there is not would be read as the last one.
        if not isinstance(label, jax.core.Tracer) and not all(0 <= n < classes for n in np.asarray(label).flat):
            raise ValueError(f"label {label} is outside 0..{classes - 1}, the classes of this prior")
        return dataclasses.replace(self, label=label)

    def of_any_class(self, key: jax.Array, shape: tuple[int, ...] = ()) -> Denoiser:
        """Told what it takes to sample without a label: nothing, `null_label`, or a class that is drawn, all alike likely.

        A `shape` of (N,) draws one for each image of a `batch`.
        """
        if self.config.label_ndim is None or self.null_label is not None or self.config.num_classes is None:
            return self.given(None)
        return self.given(jax.random.randint(key, shape, 0, self.config.num_classes))

    def _output(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """float32, (N, H, W, C or 2 C)."""
        network = lambda *label: modules.apply(self.config, self.params, x, t, self.remat, *label).astype(jnp.float32)
        if self.config.label_ndim is None:
            return network()
        if self.null_label is None and self.label is None:
            raise ValueError("this prior is conditional and was told no label: give it one, denoise.given(label)")
        null = None if self.null_label is None else jnp.full(len(x), self.null_label)
        if self.label is None:
            return network(null)
        own = self.label.shape[self.label.ndim - self.config.label_ndim :]  # of one image
        of_label = network(jnp.broadcast_to(self.label, (len(x), *own)))
        if self.class_guidance == 1:
            return of_label
        of_none = network(null)
        guided = of_none + self.class_guidance * (of_label - of_none)
        if not self.config.learns_variance:
            return guided
        # A variance is no direction to go further in: it is the label's.
        half = guided.shape[-1] // 2
        return jnp.concatenate([guided[..., :half], of_label[..., half:]], axis=-1)
