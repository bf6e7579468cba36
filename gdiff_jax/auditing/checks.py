"""What an audit asks of its arguments, before anything is computed; each error names the value and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import images as image_files
from gdiff_jax.matching import Loss, mixed_partial, victim_gradient


def images_of(images: Any, shape: tuple[int, int, int]) -> np.ndarray:
    found = np.asarray(images)
    if found.ndim != 4 or found.shape[1:] != shape or len(found) == 0:
        raise ValueError(f"images are {found.shape}, (N, {', '.join(map(str, shape))}) is needed by this prior; resize them")
    if found.dtype == np.uint8:
        return image_files.to_model(found)
    if found.dtype.kind != "f" or not np.all(np.abs(found) <= 1):
        raise ValueError(
            f"images are {found.dtype} in {found.min():.4g}..{found.max():.4g}; give uint8, or floats in [-1, 1], "
            "which is 2 * x - 1 of [0, 1]"
        )
    return found.astype(np.float32)


def labels_of(labels: Any, count: int) -> Any:
    found = jax.tree.map(np.asarray, labels)
    shapes = [a.shape for a in jax.tree.leaves(found)]
    if not shapes or any(s[:1] != (count,) for s in shapes):
        raise ValueError(f"labels are of shape {shapes}, one for each of {count} images is needed: (N, ...)")
    return found


def check_numbers(
    sigmas: Sequence[float],
    methods: Sequence[str],
    known: Collection[str],
    threshold: float,
    share: float,
    delta: float,
    **counts: int,
) -> None:
    if len(sigmas) == 0 or len(set(sigmas)) != len(sigmas) or not all(np.isfinite(s) and s >= 0 for s in sigmas):
        raise ValueError(f"sigmas {list(sigmas)} must be standard deviations, finite and >= 0, without repeats")
    if len(methods) == 0 or any(m not in known for m in methods):
        raise ValueError(f"methods {list(methods)} must be of {', '.join(known)}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if not np.isfinite(threshold):
        raise ValueError(f"threshold {threshold} must be a finite PSNR in dB")
    for name, part in (("share", share), ("delta", delta)):
        if not 0 < part < 1:
            raise ValueError(f"{name} {part} must lie in (0, 1)")


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
    try:
        out = jax.eval_shape(loss, params, x, y)
    except Exception as error:  # whatever the user's function raises
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"loss(params, x, y) failed for an image x {x.shape} and y {jax.tree.map(jnp.shape, y)}: "
            f"{type(error).__name__}: {text}"
        ) from error
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"loss returns {out}; a floating scalar is needed: take the mean over the batch and the classes")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        gradient, answer = jax.jit(functools.partial(_probe, loss))(params, x, y)
    if not bool(jnp.isfinite(gradient)):
        raise ValueError("the loss has no finite gradient at the first image; check the image's range and the weights")
    if float(gradient) == 0:
        raise ValueError("the loss's gradient is zero at the first image: nothing leaks, or the loss ignores params")
    if float(answer) == 0:
        raise ValueError("the gradient does not depend on the image; does the loss round, or stop gradients of x?")


def check_gradients(loss: Loss, params: Any, x: Any, y: Any) -> None:
    """Whether each image of (N, H, W, C) has a finite gradient, without which there is no leak to attack.

    Raises:
      ValueError: naming those that have none.
    """
    finite = lambda a: jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(victim_gradient(loss, params, *a))]).all()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fine = jax.jit(lambda x, y: jax.lax.map(finite, (x, y)))(jnp.asarray(x), jax.tree.map(jnp.asarray, y))
    lost = np.flatnonzero(~np.asarray(fine)).tolist()
    if lost:
        raise ValueError(
            f"the loss has no finite gradient at {len(lost)} of {len(fine)} images ({', '.join(map(str, lost[:10]))}, counted "
            "from 0); leave them out, or mend the loss"
        )


def _probe(loss: Loss, params: Any, x: jax.Array, y: Any) -> tuple[jax.Array, jax.Array]:
    gradient = victim_gradient(loss, params, x, y)
    answer = mixed_partial(loss, params, x, y, gradient)
    norm = lambda tree: jnp.sqrt(sum(jnp.vdot(a, a) for a in jax.tree.leaves(tree)))
    return norm(gradient), norm(answer)
