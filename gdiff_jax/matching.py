"""How far a candidate's gradient is from the leaked one, and what that says about the candidate's pixels.

The derivative of any distance m(grad_W L(W, x)) with respect to x is one mixed partial,

    v = grad m at g = grad_W L(W, x),      d m / dx = d/ds grad_x L(W + s v, x) at s = 0,

a forward-mode derivative of an ordinary image gradient. It equals differentiating twice in reverse, costs less, and serves
every distance and every differentiable mechanism. What a client computes may be more than one gradient (`LocalSGD`): that is
differentiated in reverse.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gdiff_jax.forward import jvp
from gdiff_jax.jaxprs import equations
from gdiff_jax.mechanisms import Gradient, Mechanism
from gdiff_jax.pytrees import at_least_float32, pytree, static

Loss = Callable[[Any, Any, Any], jax.Array]
Distance = Callable[[Gradient, Gradient], jax.Array]


class Client(Protocol):
    """A pytree that computes what a client would release of (x, y), shaped as params, before any mechanism."""

    def __call__(self, loss: Loss, params: Any, x: Any, y: Any) -> Gradient: ...


def _dot(a: Gradient, b: Gradient) -> jax.Array:
    return functools.reduce(
        jnp.add, jax.tree.leaves(jax.tree.map(lambda a, b: jnp.vdot(at_least_float32(a), at_least_float32(b)), a, b))
    )


def _safe_sqrt(s: jax.Array) -> jax.Array:
    """sqrt with derivative 0 at 0: a gradient that matches exactly asks for no change, not for nan; of nan it is nan."""
    positive = ~(s <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, s, 1.0)), 0.0)


def squared_l2(gradient: Gradient, leak: Gradient) -> jax.Array:
    """|| g - g~ ||^2 over the whole gradient (DLG, Zhu et al. 2019)."""
    residual = jax.tree.map(jnp.subtract, gradient, leak)
    return _dot(residual, residual)


def l2(gradient: Gradient, leak: Gradient) -> jax.Array:
    """|| g - g~ ||, un-squared, over the whole gradient: the objective of DPS and DSG."""
    return _safe_sqrt(squared_l2(gradient, leak))


def cosine(gradient: Gradient, leak: Gradient) -> jax.Array:
    """1 - <g, g~> / (||g|| ||g~||), in [0, 2] (Inverting Gradients, Geiping et al. 2020); 1 where either is zero."""
    norms = _safe_sqrt(_dot(gradient, gradient)) * _safe_sqrt(_dot(leak, leak))
    return 1 - _dot(gradient, leak) / jnp.where(norms > 0, norms, 1.0)


def l1(gradient: Gradient, leak: Gradient) -> jax.Array:
    """Sum of |g_i - g~_i| over all coordinates: minus the log-likelihood of Laplace noise, but for scale and constant."""
    return functools.reduce(jnp.add, [jnp.abs(r).sum() for r in jax.tree.leaves(jax.tree.map(jnp.subtract, gradient, leak))])


def equal_layers(leak: Gradient) -> Gradient:
    """Weights 1 / ||g~_leaf||, one a leaf: every array of the leak then has norm 1, and counts as much as the largest.

    An array of zeros gets weight 0. Under noise small layers are mostly noise, and this weighs them up [our choice].
    """

    def weight(g: jax.Array) -> jax.Array:
        norm = _safe_sqrt(jnp.vdot(at_least_float32(g), at_least_float32(g)))
        return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)

    return jax.tree.map(weight, leak)


def at_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Matmuls inside at float32: TPU's and GPU's faster default (bfloat16, tf32) drowns a small gradient difference."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return wrapped


@at_full_precision
def victim_gradient(loss: Loss, params: Any, x: Any, y: Any) -> Gradient:
    """grad_W L(W, x, y): what a client computes on its private example, at full precision."""
    return jax.grad(loss)(params, x, y)


@at_full_precision
def mixed_partial(loss: Loss, params: Any, x: Any, y: Any, v: Gradient) -> Any:
    """grad_x <v, grad_W L(W, x, y)> for a fixed v shaped as the parameters; shape of x, which may be a pytree."""
    return jvp(lambda p: jax.grad(loss, argnums=1)(p, x, y), params, v)


def released(client: Client | None, loss: Loss, params: Any, x: Any, y: Any) -> Gradient:
    """What the client computes: its gradient, or with a `client` what that makes of the loss, at full precision."""
    return victim_gradient(loss, params, x, y) if client is None else at_full_precision(client)(loss, params, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@at_full_precision
def _match(loss: Loss, distance: Distance, known: _Known, x: Any) -> jax.Array:
    return _compare(distance, known, released(known.client, loss, known.params, x, known.label))


def _compare(distance: Distance, known: _Known, gradient: Gradient) -> jax.Array:
    leak = known.leak if known.weights is None else jax.tree.map(jnp.multiply, known.leak, known.weights)
    return distance(as_compared(known, gradient), leak)


def as_compared(known: _Known | GradientMatching, gradient: Gradient) -> Gradient:
    """A gradient as it is held against the leak: through the mechanism that the attacker knows, and weighted."""
    if known.mechanism is not None:
        gradient = known.mechanism.simulate(gradient, known.leak)
    return gradient if known.weights is None else jax.tree.map(jnp.multiply, gradient, known.weights)


@at_full_precision
def _match_fwd(loss: Loss, distance: Distance, known: Any, x: Any) -> tuple[jax.Array, Any]:
    if any(leaf.perturbed for leaf in jax.tree.leaves(known)):
        raise TypeError("GradientMatching is differentiable in the image only, not in params, label, leak or mechanism")
    known, x = jax.tree.map(lambda leaf: leaf.value, (known, x))
    if known.client is None:
        gradient = victim_gradient(loss, known.params, x, known.label)
        pull = lambda v: mixed_partial(loss, known.params, x, known.label, v)
        if _computes_in_float16(loss, known.params, x, known.label):
            pull = functools.partial(_at_the_size_of, known.params, pull)
    else:
        gradient, vjp = jax.vjp(lambda x: released(known.client, loss, known.params, x, known.label), x)
        pull = lambda v: vjp(v)[0]
    # The slope of the root is one number: it multiplies the image's gradient, which is small, not v, which is not.
    inner, root = (squared_l2, _safe_sqrt) if distance is l2 else (distance, lambda value: value)
    value, v = jax.value_and_grad(functools.partial(_compare, inner, known))(gradient)
    value, slope = jax.value_and_grad(root)(value)
    return value, jax.tree.map(lambda leaf: slope * leaf, pull(v))


def _computes_in_float16(loss: Loss, params: Any, x: Any, y: Any) -> bool:
    """Whether the loss rounds to float16 somewhere, as mixed precision does: bfloat16 has float32's range, float16 has not."""
    outputs = (out.aval for equation in equations(jax.make_jaxpr(loss)(params, x, y)) for out in equation.outvars)
    return any(getattr(aval, "dtype", None) == jnp.float16 for aval in outputs)


def _at_the_size_of(params: Any, pull: Callable[[Any], Any], v: Gradient) -> Any:
    """pull(v) of v as large as the parameters, which float16 holds, and back: pull is linear, a small v would vanish in it."""
    largest = lambda tree: functools.reduce(jnp.maximum, [jnp.abs(a).max(initial=0.0) for a in jax.tree.leaves(tree)])
    size, ours = largest(v), largest(params)
    scale = jnp.where((size > 0) & (ours > 0), size / jnp.where(ours > 0, ours, 1.0), 1.0)
    return jax.tree.map(lambda a: scale * a, pull(jax.tree.map(lambda a: a / scale, v)))


def _check_leak(params: Any, leak: Gradient, weights: Any) -> None:
    """Whether a leak and weights are shaped as the parameters: what NumPy would broadcast is no gradient of theirs.

    Raises:
      ValueError: naming the array, its shape or dtype, and what is needed.
    """
    for name, tree in (("leak", leak), ("weights", weights)):
        if tree is None:
            continue
        ours, theirs = jax.tree.structure(params), jax.tree.structure(tree)
        if str(ours) != str(theirs):
            raise ValueError(
                f"{name} is a {str(theirs)[:300]}, params a {str(ours)[:300]}; give it as victim_gradient returns it"
            )
        for (path, value), parameter in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(params), strict=True):
            shape, wanted, where = jnp.shape(value), jnp.shape(parameter), f"{name}{jax.tree_util.keystr(path)}"
            if shape != wanted and not (name == "weights" and shape == ()):
                raise ValueError(
                    f"{where} is {shape}, its parameter {wanted}; give the gradient of one leak, without an axis more or less"
                )
            if name == "leak" and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                raise ValueError(f"{where} is {jnp.result_type(value)}; give floats, a quantised gradient times its scale")


def _match_bwd(loss: Loss, distance: Distance, grad_x: Any, g: Any) -> tuple[None, Any]:
    return None, jax.tree.map(lambda leaf: g * leaf, grad_x)


_match.defvjp(_match_fwd, _match_bwd, symbolic_zeros=True)


class _Known(NamedTuple):
    """What the attacker knows, as arrays."""

    params: Any
    label: Any
    leak: Gradient
    mechanism: Mechanism | None
    weights: Gradient | None
    client: Client | None


@pytree
class GradientMatching:
    """objective(x0) = distance(M(grad_W L(W, x0, y)), leak): what guides a sampler towards the private image.

    A pytree (weights, label, leak and the mechanism's numbers are its leaves), so `jax.vmap` over it is a batch of trials and
    jit sees no constants. `jax.grad` of it with respect to x0 costs one mixed partial, always at full matmul precision.

    Attributes:
      params: the victim's parameters W, any pytree. Of float16 and bfloat16 they are held in float32, in which `loss` is then
        asked for its gradient: squares of small gradients vanish in fewer bits.
      label: y, whatever `loss` takes.
      leak: the released gradient g~, shaped as params; in float32 too.
      loss: scalar `loss(params, x, y)`, pure, twice differentiable almost everywhere; a victim network of the user's own fits.
        x is what the objective is called with: an image, a batch of images, or any pytree.
      distance: `l2`, `squared_l2`, `cosine`, `l1`, or any differentiable `distance(gradient, leak)`.
      mechanism: M, what the attacker knows to have happened to the gradient (`mechanisms.Mechanism.simulate`); None is the
        attacker who takes the leak for the bare gradient. Through it sparsified coordinates are masked out.
      weights: one number an array of the gradient, or an array of its shape, that multiplies it and the leak before they are
        compared, such as `equal_layers(leak)`; 0 masks out.
      client: what the client computes in place of one gradient, such as `LocalSGD`; None is the gradient.
    """

    params: Any
    label: Any
    leak: Gradient
    loss: Loss = static()
    distance: Distance = static(default=l2)
    mechanism: Mechanism | None = None
    weights: Gradient | None = None
    client: Client | None = None

    def __post_init__(self) -> None:
        for name in ("params", "leak", "weights"):
            object.__setattr__(self, name, at_least_float32(getattr(self, name)))

    def __call__(self, x0: Any) -> jax.Array:
        """The distance of a candidate.

        Raises:
          ValueError: where the leak's tree, shapes or dtypes are not those of a gradient in params.
        """
        _check_leak(self.params, self.leak, self.weights)
        known = _Known(self.params, self.label, self.leak, self.mechanism, self.weights, self.client)
        return _match(self.loss, self.distance, known, x0)

    def in_l2(self) -> GradientMatching:
        """The same by the plain l2 distance, every coordinate counting alike: by it candidates of all methods are compared."""
        return dataclasses.replace(self, distance=l2, weights=None)
