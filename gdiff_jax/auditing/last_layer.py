"""What a saved gradient's last layer says of it: the label of an image that is not known, and whether it is of one example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import algebra
from gdiff_jax.auditing.leak_fit import Arrays
from gdiff_jax.auditing.run import audited
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.matching import released
from gdiff_jax.mechanisms.text import NOISES, Spec
from gdiff_jax.sweeping.plan import Plan

REST = 0.02  # of the last layer's matrix that bfloat16 may leave, five times as much as it does
# By how much of its length a bias's gradient may differ from what the last layer makes of the features that its matrix holds:
# as a factor; else by LOOSE for each unit of the logits' range and one, as of a forward pass in bfloat16, and LOOSEST at most
# [our choice].
FACTOR, LOOSE, LOOSEST = 0.1, 0.05, 0.5
TOLD = 20  # labels that a loss is asked with, at most, whether they can be read off it


def read_label(plan: Plan) -> int:
    """The label of `plan.leak`, of an image that is not known.

    Raises:
      ConfigError: where it cannot be read: there is no last layer with a bias, or the loss's labels are no index of it, as of
        classes that count from 1, of a mean squared error, of one output.
    """
    state, _ = audited(plan)
    loss, params, shape = plan.victims[state.name].loss, plan.params[state], plan.prior.image_shape
    start, remedy = "--gradient without --images", "say the image's label with --label"
    try:
        name = algebra.last_bias(loss, params, shape)
        of_label = jax.jit(lambda p, x, y: released(None, loss, p, x, y)[name].ravel())
        contrasts = np.array([1, 1, 0.5, 0.5], np.float32).reshape(4, 1, 1, 1)
        images = contrasts * np.random.default_rng(0).uniform(-1, 1, (4, *shape)).astype(np.float32)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            at = lambda x, y: np.asarray(of_label(params, x, jnp.asarray(y, jnp.int32)))
            classes = len(at(images[0], 0))
            need(classes > 1, f"{start}: its loss has one output, {name}, from which no label can be read; {remedy}")
            of = [(y, at(x, y)) for y in range(min(classes, TOLD)) for x in images]
        label = algebra.infer_label(loss, params, plan.leak, shape)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{start}: {error}; {remedy}") from None
    of = [(y, bias) for y, bias in of if np.isfinite(bias).all()]
    told = max((float(np.abs(bias).max()) for _, bias in of), default=0.0)
    for y, bias in of:
        sure = np.abs(bias).max() < 1e-4 * told  # of the label, up to rounding: no entry says which
        need(
            sure or int(np.argmin(bias)) == y,
            f"{start}: its loss is no cross-entropy of a class's number (told {y}, the gradient of {name} is least at "
            f"{int(np.argmin(bias))}), so that its label cannot be read; {remedy}",
        )
    return label


def _is_bare(plan: Plan) -> bool:
    """Whether the leak is a gradient as it was computed, without noise or what else a mechanism does."""
    _, mechanism = audited(plan)
    spec = plan.mechanisms[mechanism]
    return (spec.text == "none" or spec.only_noise) and not plan.sigmas[mechanism][0]


def check_zeros(path: str, plan: Plan, leak: Arrays) -> None:
    """That no array is left out of a gradient as zeros, which would be attacked as such.

    Raises:
      ConfigError: naming arrays of zeros that the model's own gradient, at some image, is none of.
    """
    empty = [name for name, value in leak.items() if not np.any(value)]
    if not empty or not _is_bare(plan):
        return
    state, _ = audited(plan)
    loss, params = plan.victims[state.name].loss, plan.params[state]
    x = np.random.default_rng(0).uniform(-1, 1, plan.prior.image_shape).astype(np.float32)
    own = released(plan.local_sgd, loss, params, jnp.asarray(x), jnp.asarray(plan.labels[0]))
    lost = [name for name in empty if np.any(own[name])]
    need(
        not lost,
        f"--gradient {path} is zero in {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}, where the model's own gradient "
        "is not: what is not known must not be zeros; save the whole gradient, or leave frozen weights out of params",
    )


def check_last_layer(path: str, plan: Plan, leak: Arrays) -> None:
    """That its bias's gradient is p - onehot(label), and its matrix's that times one example's features.

    Where the loss is a softmax with cross-entropy and no noise hides it. Of two classes the sign cannot be checked.

    Raises:
      ConfigError: saying what it is instead.
    """
    if not _is_bare(plan) or plan.client.local_steps > 1:
        return
    state, _ = audited(plan)
    loss, params, shape = plan.victims[state.name].loss, plan.params[state], plan.prior.image_shape
    try:
        name = algebra.last_bias(loss, params, shape)
    except ValueError:
        return
    (kernel, bias), label = algebra.last_layer_of(loss, params, leak, shape), int(plan.labels[0])
    of_label = jax.jit(lambda p, y: released(None, loss, p, jnp.full(shape, 0.5), y)[name].ravel())
    sure = jax.tree.map(lambda a: 50 * a, params)  # weights of a network that is sure of some class
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        at = lambda p, y: np.asarray(of_label(p, jnp.asarray(y, plan.labels.dtype)), np.float64)
        first, second, confident = at(params, 0), at(params, 1), at(sure, 0)
    unit = (second - first)[0]
    if (
        len(bias) < 2
        or unit <= 0
        or not np.allclose(second - first, unit * np.eye(len(bias))[:2].T @ [1, -1], atol=1e-4 * unit)
    ):
        return  # another loss
    if abs(first.sum()) > 1e-3 * unit or (first < -1e-3 * unit).sum() != 1:
        return  # something is added, such as a decay of the weights
    if (confident < -1e-3 * unit).sum() > 1:
        return  # the labels are smoothed
    start = f"--gradient {path}: the gradient of {name}, which for one example is p - onehot(label),"
    if np.abs(bias).max() < 1e-4 * unit:  # p is the label up to rounding, or so it seems
        return _check_features(start, plan, kernel, bias, unit, label, least=1e-3)
    below, above = ((sign * bias > 1e-3 * np.abs(bias).max()).sum() for sign in (-1, 1))
    need(above != 1 or below < 2, f"{start} has one entry above zero, and others below: it has another sign, as an update has")
    need(
        below == 1 and abs(bias.sum()) < 0.02 * np.abs(bias).max() + 0.01 * unit,  # 1 - p is rounded where p is almost 1
        f"{start} has {below} entries below zero and the sum {bias.sum():.3g}: it is of several examples, holds noise "
        "(say --sigma_grid), or is of another loss",
    )
    need(
        bias.min() > -1.02 * unit,
        f"{start} has the entry {bias.min():.4g}, below -{unit:.4g}: a sum, or a loss scale; divide by that factor",
    )
    whole = float(np.linalg.norm(kernel))
    rest = float(np.linalg.norm(kernel - np.outer(kernel @ bias, bias) / (bias @ bias))) / (whole or 1.0)
    need(
        rest <= REST,
        f"--gradient {path}: its last layer's matrix is not of one example, whose features it is times the bias's gradient "
        f"(a rest of {rest:.2g} of it): it is a mean over several, or something is added, such as a decay of the weights",
    )
    found = int(np.argmin(bias))
    need(found == label, f"{start} says label {found}, not {label}: say --label={found}, or leave it away")
    _check_features(start, plan, kernel, bias, unit, label)


def _check_features(
    start: str, plan: Plan, kernel: np.ndarray, bias: np.ndarray, unit: float, label: int, least: float = 0.0
) -> None:
    """That p is what these weights make of the features, which the last layer's matrix holds at any scale of the leak.

    Where that differs from the label by `least` at least.
    """
    if not bias.any():
        return
    state, _ = audited(plan)
    loss, params, shape = plan.victims[state.name].loss, plan.params[state], plan.prior.image_shape
    weights, constants = algebra.last_layer_of(loss, params, params, shape)

    def logits_of(kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return kernel @ bias / (bias @ bias) @ weights + constants

    def expected(logits: np.ndarray, label: int) -> np.ndarray:
        p = np.exp(logits - logits.max())
        return unit * (p / p.sum() - np.eye(len(logits))[label])

    away = lambda a, b: float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))
    of_image = jax.jit(lambda p, x, y: released(None, loss, p, x, y))
    for image in (np.full(shape, 0.5), np.random.default_rng(0).uniform(-1, 1, shape)):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            own = of_image(params, jnp.asarray(image, jnp.float32), jnp.asarray(label, plan.labels.dtype))
        of_own = algebra.last_layer_of(loss, params, jax.tree.map(lambda g: g.astype(jnp.bfloat16), own), shape)
        if not of_own[1].any() or not away(of_own[1], expected(logits_of(*of_own), label)) < REST:
            return  # something lies between, such as a temperature
    logits = logits_of(kernel, bias)
    told = expected(logits, label)
    if np.abs(told).max() < least * unit:
        return
    factor = float(told @ bias / (told @ told)) if told.any() else 1.0
    need(
        abs(factor - 1) < FACTOR or len(bias) < 3 or away(bias, factor * told) > REST,
        f"{start} is {factor:.3g} times what the last layer makes of the features that its matrix holds: a mean, a learning "
        f"rate, or of smoothed labels; divide the file's arrays by {factor:.4g}, let the loss smooth them, or say how it was "
        "clipped, such as --mechanism=clip:NORM",
    )
    need(
        away(bias, told) < min(LOOSE * (1 + np.ptp(logits)), LOOSEST),
        f"{start} is not what the last layer makes of the features that its matrix holds (it differs by {away(bias, told):.2g} "
        "of that): other weights, such as of another checkpoint or seed (--weights), rows in another order (--flattened), or "
        "another loss",
    )


def check_noise(path: str, plan: Plan, leak: Arrays) -> None:
    """That the last layer's matrix, which is of rank one without noise, holds about as much of it as is said.

    Raises:
      ConfigError: where it holds much less, or more.
    """
    state, mechanism = audited(plan)
    spec, sigma = plan.mechanisms[mechanism], plan.sigmas[mechanism][0]
    if not sigma or plan.client.local_steps > 1 or not isinstance(spec, Spec) or spec.stages[-1][0] not in NOISES:
        return
    try:
        kernel, bias = algebra.last_layer_of(plan.victims[state.name].loss, plan.params[state], leak, plan.prior.image_shape)
    except ValueError:
        return
    free = len(kernel) * (len(bias) - 1)  # entries, less those that a matrix of rank one fits
    if free < 50:
        return
    rows = np.concatenate([kernel, bias[None]])
    squares = np.linalg.eigvalsh(rows.T @ rows if len(rows) >= len(bias) else rows @ rows.T)
    found = float(np.sqrt(max(squares[:-1].sum(), 0.0) / free))
    clipped = all(name == "clip" for name, _ in spec.stages[:-1])
    size = float(np.sqrt(np.mean(np.square(rows))))
    need(
        found < 1.5 * sigma or found < 4e-3 * size or not clipped,  # the rounding of bfloat16
        f"--gradient {path}: its last layer's matrix is of rank one but for {found:.2g} in each entry, of which noise of sigma "
        f"{sigma:g} is said: say --sigma_grid={found:.2g} if that is noise; else it is of several examples",
    )
    need(
        found > sigma / 2,
        f"--gradient {path} holds noise of sigma {found:.2g} at most: its last layer's matrix is so nearly of rank one; "
        f"--sigma_grid says {sigma:g}. Say what it holds; to see what noise would help leave --gradient away",
    )
