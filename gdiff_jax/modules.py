"""Layers shared by priors and victims, and the bridge from an NNX definition to a pure function of a flat dict of arrays.

NNX only *defines* networks here; everything that is transformed is a plain function of `Params`, so jit sees weights as
arguments and checkpoints are flat files of dotted names.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gdiff_jax.conv import Padding

Params = dict[str, jax.Array]


class Conv(nnx.Module):
    """Square convolution with bias, in the dtype of its input; `conv` is one of the functions of `gdiff_jax.conv`."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        conv: Callable[..., jax.Array],
        rngs: nnx.Rngs,
        stride: int = 1,
        padding: Padding | None = None,
        init: Callable[..., jax.Array] | None = None,
    ):
        init = init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, c_in, c_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))
        self.conv = conv
        self.stride = stride
        self.padding = padding or ((size // 2, size // 2), (size // 2, size // 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(x, self.kernel[...].astype(x.dtype), self.stride, self.padding)
        return y + self.bias[...].astype(x.dtype)[None, None, None]


class Linear(nnx.Module):
    """Dense layer on the last axis, with bias unless told otherwise, in the dtype of its input."""

    def __init__(
        self, c_in: int, c_out: int, *, rngs: nnx.Rngs, init: Callable[..., jax.Array] | None = None, bias: bool = True
    ):
        init = init or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (c_in, c_out), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if not hasattr(self, "bias"):
            return y
        return y + self.bias[...].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class GroupNorm(nnx.Module):
    """Group normalisation of (N, H, W, C) with statistics in at least float32, in two passes: E[x^2] - E[x]^2 loses digits."""

    def __init__(self, channels: int, groups: int, eps: float):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        n, _, _, c = x.shape

        def over_groups(per_channel: jax.Array) -> jax.Array:
            """(N, C) -> (N, 1, 1, C), each channel's value the mean over its group."""
            groups = per_channel.reshape(n, self.groups, c // self.groups)
            return jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(n, 1, 1, c)

        # Pixels first, then the few channels of a group: XLA:CPU takes one reduction over both several times slower.
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        centred = wide - over_groups(wide.mean((1, 2)))
        var = over_groups(jnp.square(centred).mean((1, 2)))
        scale = jax.lax.rsqrt(var + self.eps) * self.scale[...].reshape(1, 1, 1, c)
        return (centred * scale + self.bias[...].reshape(1, 1, 1, c)).astype(x.dtype)


Statistics = tuple[jax.Array, jax.Array]  # mean and biased variance, one number a channel each


class BatchNorm(nnx.Module):
    """Batch normalisation of (N, H, W, C) with the batch's own statistics over (N, H, W), in at least float32, in two passes.

    It stores no running statistics. `policy`, a plain function of (mean, var) that a caller may set on a network just made by
    `call`, says what is used in their place; it returns them in the dtype that it got them in.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.eps = eps
        self.policy: Callable[[jax.Array, jax.Array], Statistics] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        per_channel = lambda a: a.reshape(1, 1, 1, -1)
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        mean = wide.mean((0, 1, 2))
        var = jnp.square(wide - per_channel(mean)).mean((0, 1, 2))
        if self.policy is not None:
            mean, var = self.policy(mean, var)
        scale = jax.lax.rsqrt(var + self.eps) * self.scale[...]
        return ((wide - per_channel(mean)) * per_channel(scale) + per_channel(self.bias[...])).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation of the last axis, statistics in at least float32."""

    def __init__(self, channels: int, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        ones = (1,) * (x.ndim - 1)
        return (normed * self.scale[...].reshape(*ones, -1) + self.bias[...].reshape(*ones, -1)).astype(x.dtype)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def batch_norms(network: nnx.Module) -> dict[str, BatchNorm]:
    """The network's BatchNorms by dotted name (`blocks.0.norm1`)."""
    return {_name(path): module for path, module in nnx.iter_modules(network) if isinstance(module, BatchNorm)}


class Spec(Protocol):
    """What builds a network. It is a cache key, so it must compare by value: a frozen dataclass, as the configs here are."""

    def __hash__(self) -> int: ...

    def build(self, rngs: nnx.Rngs) -> nnx.Module: ...


class _AnyKey(nnx.Rngs):
    """For layers of which the shapes are asked: to count the draws in a traced function takes longer than all the rest."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


@functools.lru_cache(maxsize=64)
def _abstract(spec: Spec) -> tuple[Any, dict[tuple[Any, ...], Any]]:
    graphs = []

    def build() -> dict[tuple[Any, ...], jax.Array]:
        graph, state = nnx.split(spec.build(_AnyKey(0)))
        graphs.append(graph)
        return {path: leaf[...] for path, leaf in nnx.to_flat_state(state)}

    shapes = jax.eval_shape(build)
    return graphs[0], shapes


def param_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by dotted name; nothing is computed."""
    return {_name(path): leaf.shape for path, leaf in _abstract(spec)[1].items()}


def restore_target(spec: Spec) -> dict[str, jax.ShapeDtypeStruct]:
    """What orbax restores a network's parameters into: float32, on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding) for name, shape in param_shapes(spec).items()}


def init_params(key: jax.Array, spec: Spec) -> Params:
    """Fresh float32 parameters: a flat dict of dotted names (`down_blocks.0.resnets.1.conv1.kernel`)."""
    state = nnx.split(spec.build(nnx.Rngs(key)))[1]
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def digest(params: Mapping[str, Any]) -> str:
    """SHA-256 over names and values, whatever the order of the dict."""
    sha = hashlib.sha256()
    for name in sorted(params):
        sha.update(name.encode())
        sha.update(np.asarray(params[name]).tobytes())
    return sha.hexdigest()


def call(spec: Spec, use: Callable[[Any], Any], params: dict[str, Any]) -> Any:
    """use(network with these parameters), pure where `use` is."""
    graph, flat = _abstract(spec)
    return use(nnx.merge(graph, nnx.from_flat_state({path: params[_name(path)] for path in flat})))


def apply(spec: Spec, params: Params, *args: Any) -> Any:
    """The network's `__call__` with these parameters, as a pure function."""
    return call(spec, lambda network: network(*args), params)
