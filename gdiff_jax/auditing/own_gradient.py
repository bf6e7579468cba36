"""Whether a saved gradient is one of this model: it is held against the model's own at the image, where that is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import algebra
from gdiff_jax.auditing.last_layer import check_last_layer, check_noise, check_zeros
from gdiff_jax.auditing.leak_fit import ROUNDING, SURE, Arrays, Fit, fit, norm_of
from gdiff_jax.auditing.run import audited
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import say
from gdiff_jax.matching import released
from gdiff_jax.mechanisms.text import NOISES, Spec
from gdiff_jax.sweeping.plan import Plan


def check_leak(path: str, plan: Plan, update: bool = False) -> str:
    """What the report must say of `plan.leak`, the gradient of a file, beside the model's own; "" if nothing.

    Args:
      path: of the file.
      plan: of the audit, with the leak.
      update: whether the file holds weights after a client's steps, of which the leak was made.

    Raises:
      ConfigError: where it is certain that another gradient would be attacked than the one that is meant, with what it is.
    """
    state, mechanism = audited(plan)
    spec, sigma, params = plan.mechanisms[mechanism], plan.sigmas[mechanism][0], plan.params[state]
    leak = {name: np.asarray(value, np.float64) for name, value in plan.leak.items()}
    like_weights = fit(leak, params, 0.0).cosine if norm_of(params) else 0.0
    need(
        like_weights < 0.99 or plan.size(state.name) < 10,
        f"--gradient {path} has a cosine of {like_weights:.4f} with the weights: it holds weights, not a gradient; "
        "of weights after a client's steps say --update, and of those before them --weights",
    )
    _check_norm(path, leak, spec, sigma)
    if not plan.images_known:
        check_zeros(path, plan, leak)
        check_noise(path, plan, leak)
        check_last_layer(path, plan, leak)
    if not plan.images_known or not isinstance(spec, Spec) or not _is_exact(spec):
        return ""
    return _held_against_own(path, plan, spec, sigma, leak, update)


def _check_norm(path: str, leak: Arrays, spec: Any, sigma: float) -> None:
    """That a clipped gradient is no longer than it can be."""
    if not isinstance(spec, Spec) or not {name for name, _ in spec.stages} <= {"clip", "topk", *NOISES}:
        return
    clip = min((number for name, number in spec.stages if name == "clip"), default=math.inf)
    count, norm = sum(value.size for value in leak.values()), norm_of(leak)
    most = math.hypot(clip, sigma * math.sqrt(count) * (1 + SURE / math.sqrt(2 * count)))
    need(
        norm <= most * (1 + ROUNDING),
        f"--gradient {path} has the norm {norm:.4g}, --mechanism {spec.text} with sigma {sigma:g} lets at most {most:.4g} "
        "through: name the mechanism that was applied, such as --mechanism=none",
    )


def _is_exact(spec: Spec) -> bool:
    """Whether what the mechanism makes of a gradient is known but for noise that comes last."""
    names = [name for name, _ in spec.stages]
    return not {"qsgd", "soteria"} & set(names) and not {*NOISES} & set(names[:-1]) and not ("random" in names and spec.noisy)


def _held_against_own(path: str, plan: Plan, spec: Spec, sigma: float, leak: Arrays, update: bool) -> str:
    state, _ = audited(plan)
    victim, params, image = plan.victims[state.name], plan.params[state], jnp.asarray(plan.images[0])
    build = lambda: spec.build(sigma, lambda _: None)
    shown = {name: jnp.asarray(value, jnp.float32) for name, value in leak.items()}

    @jax.jit
    def expected(params: Any, shown: Any, x: jax.Array, y: Any) -> tuple[Any, Any, jax.Array]:
        bare = released(plan.local_sgd, victim.loss, params, x, y)
        return build().simulate(bare, shown), bare, victim.loss(params, x, y)

    label = jax.tree.map(lambda a: jnp.asarray(a[0]), plan.labels)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        own, bare, small = jax.device_get(expected(params, shown, image, label))
    need(norm_of(own), f"--gradient {path} is not zero, the model's own gradient at the image is: another image or label")
    if not spec.noisy:
        sigma = 0.0
    found = fit(leak, own, sigma)
    beside = _beside(leak, own, params) if found.off > ROUNDING else ""
    if found.is_own:
        _check_sigma(path, found, sigma, norm_of(own), spec)
        need(
            not beside,
            f"--gradient {path} holds the model's own gradient at the image, and beside it no noise: {beside}; subtract that",
        )
        say(f"--gradient: it is the model's own gradient at the image, up to {found.off:.2g} of its norm")
        return ""
    if 0 <= small <= 1e-5 and found.cosine > 0.9:
        text = (
            f"The leak is {found.factor:.3g} times the model's own gradient; the image's loss, {small:.2g}, is one of rounding."
        )
        say(f"--gradient {path}: {text}")
        return text
    before = f"--gradient {path}"
    if found.is_scaled:
        why = _why(found, spec)
        if update:
            rate, steps = plan.client.local_learning_rate, plan.client.local_steps
            # Of several steps the rate also decides where the later gradients are taken.
            remedy = f"; say --local_learning_rate={rate * found.factor:.4g}" if steps == 1 else ""
            why = f" (cosine {found.cosine:.4f}): the client had another learning rate than {rate:g}{remedy}"
        raise ConfigError(f"{before} is {found.factor:.4g} times the model's own gradient at the image{why}")
    if len(spec.stages) and fit(leak, bare, sigma).is_own:
        raise ConfigError(
            f"{before} is the model's own gradient at the image before --mechanism {spec.text}: name what was applied to it, "
            "such as --mechanism=none"
        )

    def of_label(label: int) -> Fit:
        other, *_ = jax.device_get(expected(params, shown, image, jnp.asarray(label, plan.labels.dtype)))
        return fit(leak, other, sigma) if norm_of(other) else found

    other = _other_label(plan, of_label)
    if other is not None:
        raise ConfigError(
            f"{before} is the model's own gradient at the image with label {other}, not {int(label)}: say --label={other}"
        )
    sigma_found = found.sigma_over_norm * norm_of(own)
    if sigma_found > sigma and not beside and _is_noise(found, leak, own):
        raise ConfigError(
            f"{before} is the model's own gradient at the image and noise of sigma about {sigma_found:.2g}, of which "
            f"{sigma:g} is said: say --sigma_grid={sigma_found:.2g} with the mechanism that added it"
        )
    by_array = {name: fit({name: leak[name]}, {name: own[name]}, sigma) for name in own if np.any(own[name])}
    said = _of_arrays(by_array, leak, own)
    if said:
        raise ConfigError(f"{before} {said}")
    text = (
        f"{before} is not the model's own gradient at the image (cosine {found.cosine:.3f}, norm {norm_of(leak):.4g} against "
        f"{norm_of(own):.4g}): other weights, such as a later checkpoint (--weights), another image, scaling of its pixels, "
        "loss or mechanism" + (f", or the file holds beside it {beside}" if beside else "")
    )
    if found.cosine < 0.9:
        raise ConfigError(f"{text}; mend that, or leave --images away to attack it without scores")
    say(text)
    return f"The gradient {text.removeprefix('--gradient ')}: scores may say more of that than of the leak."


def _is_noise(found: Fit, leak: Arrays, own: Arrays) -> bool:
    """Whether what is left beside the own gradient is alike in all arrays and orthogonal to it, as noise is."""
    error = found.sigma_over_norm
    if abs(found.factor - 1) > SURE * error or found.factor < SURE * error:
        return False
    squares = {name: float(np.square(leak[name] - np.asarray(own[name], np.float64)).sum()) for name in own}
    mean = sum(squares.values()) / found.count
    sizes = {name: np.size(own[name]) for name in own}
    return all(abs(squares[n] / (sizes[n] * mean) - 1) < SURE * math.sqrt(2 / sizes[n]) + 0.1 for n in own if sizes[n] > 50)


def _beside(leak: Arrays, own: Arrays, params: Arrays) -> str:
    """What is added to the own gradient, where that is surely neither noise nor rounding.

    It goes with the weights, or one direction has most of a matrix.
    """
    rest = {name: leak[name] - np.asarray(own[name], np.float64) for name in own}
    count = sum(np.size(value) for value in rest.values())
    weights = {name: np.asarray(params[name], np.float64) for name in own}
    along = fit(rest, weights, 0.0).cosine if norm_of(weights) and norm_of(rest) else 0.0
    if abs(along) > max(2 * SURE / math.sqrt(count), ROUNDING * norm_of(own) / norm_of(rest)):
        return "something that goes with the weights, such as a decay of them"
    for name, value in rest.items():
        matrix = value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value[None]
        n, m = matrix.shape
        largest = _largest(matrix) if min(n, m) >= 5 else 0.0
        # Of noise it has about sqrt(n) + sqrt(m), of the sqrt(n m) that are the norm (Marchenko and Pastur).
        of_noise = 1.5 * (math.sqrt(n) + math.sqrt(m)) / math.sqrt(n * m) * float(np.linalg.norm(matrix))
        if largest > max(of_noise, ROUNDING * float(np.linalg.norm(own[name]))):
            return f"another gradient, of which {name} is nearly of rank one, as of another image"
    return ""


def _largest(matrix: np.ndarray) -> float:
    """About the largest singular value, and no more: by power iterations, since those of a wide layer take minutes."""
    v: np.ndarray = np.random.default_rng(0).normal(size=(matrix.shape[1],))
    for _ in range(10):
        v = matrix.T @ (matrix @ (v / (np.linalg.norm(v) or 1.0)))
    return float(np.sqrt(np.linalg.norm(v)))


def _check_sigma(path: str, found: Fit, sigma: float, norm: float, spec: Spec) -> None:
    """That the noise is not much less than is said."""
    least = found.noise * (1 - SURE / math.sqrt(2 * found.count)) * 0.8
    need(
        found.off >= least or found.noise < ROUNDING,
        f"--gradient {path} holds noise of sigma {found.sigma_over_norm * norm:.2g} at most, beside the model's own gradient "
        f"at the image; --sigma_grid says {sigma:g}. Say what it holds; to see what noise would help leave --gradient away",
    )


def _why(found: Fit, spec: Spec) -> str:
    """What a factor may be, and what to do."""
    a, exponent = abs(found.factor), math.log2(abs(found.factor))
    causes = ["a sum in place of a mean", "a loss scale"] if a > 1 else ["a mean", "a learning rate", "of smoothed labels"]
    if abs(exponent - round(exponent)) < 1e-3 and exponent > 2:
        causes = ["the loss scale of mixed precision", *causes[:1]]
    sign = "an update, minus the gradient, " if found.factor < 0 else ""
    mechanism = f" through --mechanism {spec.text}" if spec.stages and not spec.only_noise else ""
    text = f"{mechanism} (cosine {found.cosine:.4f}): {sign}{' or '.join(causes) if abs(a - 1) > 0.01 else 'of another sign'}"
    return f"{text}; divide the file's arrays by {found.factor:.4g}, or let the victim's loss have this factor"


def _other_label(plan: Plan, of_label: Callable[[int], Fit]) -> int | None:
    """The label, a number of a class, at which the leak is the model's own gradient."""
    state, _ = audited(plan)
    labels = plan.labels
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return None
    victim, params = plan.victims[state.name], plan.params[state]
    try:  # as many as the last layer tells apart, where nobody said it
        classes = params[algebra.last_bias(victim.loss, params, plan.prior.image_shape)].size
    except ValueError:
        classes = 0
    others = (label for label in range(max(classes, victim.num_classes)) if label != labels[0])
    return next((label for label in others if (found := of_label(label)).is_own and found.tells), None)


def _of_arrays(by_array: dict[str, Fit], leak: Arrays, own: Arrays) -> str:
    """What is said where some arrays are the own gradient's and others are not, or hold its numbers in another order."""
    others = [name for name, found in by_array.items() if not found.is_own]
    if not others:
        return ""
    close = lambda a, b: np.allclose(np.sort(a, None), np.sort(b, None), rtol=1e-2, atol=1e-3 * np.abs(b).max())
    moved = [name for name in others if leak[name].size > 1 and close(leak[name], own[name])]
    if moved:
        return (
            f"has the numbers of the model's own gradient at the image, those of {', '.join(moved[:5])} in another order: "
            "transposed, flattened in another order (--flattened), or permuted; save them in the victim's order"
        )
    swapped = [(a, b) for a in others for b in others if a < b and leak[a].shape == leak[b].shape and close(leak[a], own[b])]
    if swapped:
        return f"has the arrays {' and '.join(swapped[0])} exchanged: what is called {swapped[0][0]} is that of {swapped[0][1]}"
    right = [name for name, found in by_array.items() if found.is_own and found.cosine > 0.9]
    if len(right) > len(others):
        cosines = ", ".join(f"{name} (cosine {by_array[name].cosine:.3f})" for name in others[:5])
        return f"is the model's own gradient at the image, but for {cosines}: another layout or order, or another array"
    return ""
