"""Whether a loss can be attacked, asked before anything is computed; each error names the value and the remedy."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.matching import Loss, mixed_partial, victim_gradient
from gdiff_jax.pytrees import at_least_float32


def check_loss(loss: Loss, params: Any, x: Any, y: Any) -> None:
    """Whether a loss can be attacked: scalar, differentiable, with a gradient that answers to the image.

    Raises:
      ValueError: saying what is wrong with it.
    """
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError("params hold no array; give the weights that the gradient is of")
    for path, leaf in leaves:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            where = jax.tree_util.keystr(path)
            raise ValueError(f"params{where} is {kind}; leave in params what is trained, floating arrays, and the rest in loss")
    x, y = jnp.asarray(x), jax.tree.map(jnp.asarray, y)
    params = at_least_float32(params)
    try:
        out = jax.eval_shape(loss, params, x, y)
    except Exception as error:  # whatever the user's function raises
        text = " ".join(str(error).split())[:300]
        if "float16" in text:
            text += "; weights of float16 and bfloat16 are taken in float32: let the loss cast x to its params' dtype"
        tried = ", and as that of a batch of it" if x.ndim == 3 else ""
        raise ValueError(
            f"loss(params, x, y) failed for an image x {x.shape} and y {jax.tree.map(jnp.shape, y)}{tried}: "
            f"{type(error).__name__}: {text}{_label_remedy(x, y)}"
        ) from error
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        several = ": of several values give the loss alone, such as lambda p, x, y: loss(p, x, y)[0]"
        mean = ": take the mean over the batch and the classes"
        remedy = several if isinstance(out, tuple | list | dict) else _label_remedy(x, y) or mean
        raise ValueError(f"loss returns {out}; a floating scalar is needed{remedy}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        gradient, answer = jax.jit(functools.partial(_probe, loss))(params, x, y)
    if not bool(jnp.isfinite(gradient)):
        raise ValueError("the loss has no finite gradient at the first image; check the image's range and the weights")
    if float(gradient) == 0:
        raise ValueError("the loss's gradient is zero at the first image: nothing leaks, or the loss ignores params")
    if float(answer) == 0:
        raise ValueError("the gradient does not depend on the image; does the loss round, or stop gradients of x?")


def _label_remedy(x: Any, y: Any) -> str:
    """What to do with the label of one image that is no number of a class, as it stands in a file; "" where it is one."""
    leaves = jax.tree.leaves(y)
    if x.ndim != 3 or len(leaves) != 1:
        return ""
    if leaves[0].shape == (1,):
        return "; the label of an image has the shape (1,): give labels.ravel()"
    if leaves[0].shape == () and not jnp.issubdtype(leaves[0].dtype, jnp.integer):
        return f"; labels are {leaves[0].dtype}: if they number classes, give labels.astype(int)"
    return ""


def of_one_image(loss: Loss, params: Any, x: Any, y: Any) -> Loss:
    """The loss itself, or, of one that takes a batch alone, (1, H, W, C) and (1, ...), that of a batch of the one image.

    Which it is is found by its shapes at an image x (H, W, C) and its label y. A loss that takes both may be two functions: a
    mean over axes 1 and 2, or a group norm, of an image alone is over others than of a batch. Where they differ it is one of
    batches if that of two images is the mean, or the sum, of those of each.
    """

    def of_batch(params: Any, x: Any, y: Any) -> Any:
        return loss(params, x[None], jax.tree.map(lambda a: a[None], y))

    x, y = jnp.asarray(x), jax.tree.map(jnp.asarray, y)
    if not _is_scalar(of_batch, params, x, y):
        return loss
    if not _is_scalar(loss, params, x, y):
        return of_batch
    other = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, x.shape), x.dtype)

    def values(params: Any, x: Any, other: Any, y: Any) -> jax.Array:
        two = loss(params, jnp.stack([x, other]), jax.tree.map(lambda a: jnp.stack([a, a]), y))
        ones = [f(params, image, y) for image in (x, other) for f in (loss, of_batch)]
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in (*ones, two)])

    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            first, in_batch, second, second_in_batch, two = np.asarray(jax.jit(values)(params, x, other, y)).tolist()
    except Exception:  # of two images it fails: it is none of batches
        return loss
    close = functools.partial(math.isclose, rel_tol=1e-3, abs_tol=1e-6)
    same = close(first, in_batch) and close(second, second_in_batch)
    total = in_batch + second_in_batch
    return of_batch if not same and (close(two, total) or close(two, total / 2)) else loss


def _is_scalar(loss: Loss, params: Any, x: Any, y: Any) -> bool:
    try:
        return getattr(jax.eval_shape(loss, params, x, y), "shape", None) == ()
    except Exception:  # whatever the user's function raises: `check_loss` tells of it
        return False


def check_gradients(loss: Loss, params: Any, x: Any, y: Any) -> None:
    """Whether each image of (N, H, W, C) has a finite gradient, without which there is no leak to attack.

    Raises:
      ValueError: naming those that have none.
    """
    x, y = np.asarray(x), jax.tree.map(np.asarray, y)
    fine = [gradient_at(loss, params, image, jax.tree.map(lambda a, i=i: a[i], y))[1] for i, image in enumerate(x)]
    lost = np.flatnonzero(~np.array(jax.device_get(fine))).tolist()
    if lost:
        raise ValueError(
            f"the loss has no finite gradient at {len(lost)} of {len(fine)} images ({', '.join(map(str, lost[:10]))}, counted "
            "from 0); leave them out, or mend the loss"
        )


def gradient_at(loss: Loss, params: Any, x: Any, y: Any) -> tuple[Any, jax.Array]:
    """The gradient of a user's loss, and whether all of it is finite; compiled once for all who ask."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return _gradient_at(loss, params, x, jax.tree.map(np.asarray, y))


@functools.partial(jax.jit, static_argnums=0)
def _gradient_at(loss: Loss, params: Any, x: jax.Array, y: Any) -> tuple[Any, jax.Array]:
    gradient = victim_gradient(loss, params, x, y)
    return gradient, jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradient)]).all()


def _probe(loss: Loss, params: Any, x: jax.Array, y: Any) -> tuple[jax.Array, jax.Array]:
    gradient = victim_gradient(loss, params, x, y)
    answer = mixed_partial(loss, params, x, y, gradient)
    norm = lambda tree: jnp.sqrt(sum(jnp.vdot(a, a) for a in jax.tree.leaves(tree)))
    return norm(gradient), norm(answer)
