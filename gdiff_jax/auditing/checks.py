"""What an audit asks of its arguments, before anything is computed; each error names the value and the remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gdiff_jax import images as image_files
from gdiff_jax import numerics
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.matching import Loss
from gdiff_jax.mechanisms import Clip, Mechanism, stages_of
from gdiff_jax.methods import DLG, DSG, METHODS, Auto, Method, strongest
from gdiff_jax.priors import Prior, load_prior
from gdiff_jax.sweeping.attackers import Attacker, Knowledge
from gdiff_jax.sweeping.checks import hindrances
from gdiff_jax.sweeping.config import Client
from gdiff_jax.victims import Victim
from gdiff_jax.victims.label_range import check_label_range
from gdiff_jax.victims.own import OwnVictim


@contextlib.contextmanager
def in_other_words(pattern: str, replacement: str) -> Iterator[None]:
    """What the engine says of a sweep's flags, said of what was asked in another way: the pattern is replaced."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(pattern, replacement, str(error))) from None


def prior_of(prior: str | os.PathLike[str] | Prior) -> Prior:
    if isinstance(prior, Prior):
        return prior
    need(isinstance(prior, str | os.PathLike), f"prior {prior!r} is no name, folder or gdiff_jax.Prior")
    try:
        return load_prior(prior)
    except OSError as error:
        raise ConfigError(str(error)) from None


def images_of(name: str, images: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """The images of an argument as (N, H, W, C) float32 in [-1, 1]; of one channel (N, H, W) too."""
    array = _array(name, images)
    if array.ndim == 3 and shape[-1] == 1 and array.shape[1:] == shape[:2]:
        array = array[..., None]
    whole = f"(N, {', '.join(map(str, shape))})"
    remedy = image_files.layout_remedy(array.shape) or _channels_remedy(array.shape, shape) or "resize them"
    need(array.shape[1:] == shape and len(array) > 0, f"{name} are {array.shape}, {whole} is needed by this prior; {remedy}")
    number = array.dtype.kind in "iub" or jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
    need(number, f"{name} are {array.dtype}; give uint8, or floats in [-1, 1]")
    try:
        if array.dtype.kind in "iub":
            pixels = image_files.to_bytes(array)
            if dark := image_files.too_dark(pixels):
                warnings.warn(f"{name}: {dark}", stacklevel=4)
            return image_files.to_model(pixels)
        floats = image_files.from_floats(array)
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from None
    if np.abs(floats).max() <= 0.5:
        warnings.warn(
            f"{name} reach from {floats.min():.3g} to {floats.max():.3g} in the range [-1, 1], which is half the contrast at "
            "most; if they are [0, 1] minus 0.5, give 2 * x",
            stacklevel=4,
        )
    return floats


def _channels_remedy(given: tuple[int, ...], wanted: tuple[int, int, int]) -> str:
    if given[1:-1] != wanted[:2] or len(given) != 4:
        return ""
    grey = given[-1] == 1
    return "np.repeat(images, 3, -1) makes three channels of one" if grey else "make them grey: images.mean(-1)[..., None]"


def _array(name: str, values: Any) -> np.ndarray:
    """What NumPy makes of an argument."""
    need(
        not isinstance(values, str | os.PathLike),
        f"{name} are {values!r}, which is a name; give an array, such as gdiff_jax.images.load_images({values!r}).images",
    )
    try:
        array = np.asarray(values)
    except Exception as error:  # lists of several shapes; tensors of torch on a GPU, or that need a gradient
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} cannot be made an array ({type(error).__name__}: {text}); give a NumPy array") from None
    need(array.dtype != object, f"{name} are {type(values).__name__} of no numbers, or of several shapes; give a NumPy array")
    return array


def candidate_labels_of(labels: Any, candidates: Any, like: Any) -> Any:
    """Those of the candidates that were given, each as the private images' labels `like`."""
    need(candidates is not None, "candidate_labels are of candidates; give candidates=, or leave them out")
    arrays = labels_of(labels, len(candidates), "candidate_labels")
    shapes, needed = ([jax.tree.structure(tree), [a.shape[1:] for a in jax.tree.leaves(tree)]] for tree in (arrays, like))
    need(
        shapes == needed, f"candidate_labels are of {shapes[1]} an image, labels of {needed[1]}; give them as labels are given"
    )
    return arrays


def check_class_range(name: str, loss: Loss, params: Any, x: Any, labels: Any) -> None:
    """That each is a class of the loss, as far as that can be told."""
    try:
        check_label_range(loss, params, x, labels)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def labels_of(labels: Any, count: int, name: str = "labels") -> Any:
    """Labels as arrays (N, ...), or a pytree of such; a list of numbers is one array."""
    arrays = jax.tree.map(lambda values: _array(name, values), labels, is_leaf=_holds_numbers)
    arrays = _stacked(arrays, count)
    for array in jax.tree.leaves(arrays):
        need(
            array.dtype.kind not in "USMm",
            f"labels are text or dates, such as {array.ravel()[:1].tolist()}; a loss takes numbers, integers 0 .. classes - 1 "
            "in the order of the model's classes: np.searchsorted(names, labels), of sorted names",
        )
        wide = array.dtype.kind in "iu" and array.size and max(abs(int(array.min())), abs(int(array.max()))) >= 2**31
        need(not wide, f"labels are {array.dtype} that do not fit into 32 bits; number the classes from 0")
    shapes = [a.shape for a in jax.tree.leaves(arrays)]
    fit = bool(shapes) and all(s[:1] == (count,) for s in shapes)
    need(fit, f"{name} are of shape {shapes}, one for each of {count} images is needed: (N, ...)")
    return arrays


def _holds_numbers(values: Any) -> bool:
    """Whether this is a list, or lists in lists, of numbers or words: an array, and no pytree of arrays."""
    if not isinstance(values, list | tuple) or not values:
        return False
    scalar = lambda value: isinstance(value, str | bytes) or np.ndim(value) == 0
    return all(_holds_numbers(value) if isinstance(value, list | tuple) else scalar(value) for value in values)


def _stacked(arrays: Any, count: int) -> Any:
    """A list of one array for each image as one array."""
    if not isinstance(arrays, list) or len(arrays) != count or not all(isinstance(a, np.ndarray) for a in arrays):
        return arrays
    if len({a.shape for a in arrays}) != 1:
        return arrays
    shape = np.shape(arrays[0])
    need(
        shape[:1] != (count,),
        f"labels are a list of {count} arrays {shape} for {count} images; give np.stack(labels) if each is of an image, or a "
        "tuple if each is of all images",
    )
    return np.stack(arrays)


def check_numbers(
    sigmas: Sequence[float], seed: int, threshold: float, share: float, delta: float, more_levels: int, **counts: int
) -> None:
    levels = [_finite("sigma_grid", sigma) for sigma in sigmas]
    need(
        levels and len(set(levels)) == len(levels) and min(levels) >= 0,
        f"sigma_grid {levels} must be standard deviations, finite and >= 0, without repeats",
    )
    for name, value in (("seed", seed), ("more_levels", more_levels), *counts.items()):
        need(isinstance(value, int | np.integer), f"{name} {value!r} must be a whole number")
    numerics.check_seed(int(seed))
    need(more_levels >= 0, f"more_levels {more_levels} must not be negative; 0 tries the grid alone")
    for name, value in counts.items():
        need(value >= 1, f"{name} {value} must be at least 1")
    _finite("threshold", threshold)
    for name, part in (("share", share), ("delta", delta)):
        need(0 < _finite(name, part) < 1, f"{name} {part} must lie in (0, 1)")


def _finite(name: str, value: Any) -> float:
    need(not isinstance(value, str | bytes), f"{name} {value!r} is not a number but a text")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} {value!r} is not a number") from None
    need(np.isfinite(number), f"{name} {value} must be finite")
    return number


def attacker_of(attacker: str | Attacker) -> Attacker:
    attacker = attacker if isinstance(attacker, Attacker) else Attacker(attacker)
    attacker.check()
    return attacker


def check_client(client: Client, images: int) -> None:
    need(isinstance(client, Client), f"client {client!r} is no gdiff_jax.sweeping.config.Client, such as Client(group=2)")
    whole = client.group < 1 or images % client.group == 0
    need(whole, f"{images} images do not divide into groups of {client.group}; give a multiple")
    client.check(images)


def methods_of(asked: str | Sequence[str | Method], attacker: Attacker, client: Client) -> dict[str, Method]:
    """The attacks by name; each can be run by this attacker."""
    joint = attacker.knowledge.labels == "joint"
    chosen = []
    for method in (asked,) if isinstance(asked, str) else asked:
        if not isinstance(method, Method):
            known = isinstance(method, str) and method in METHODS
            need(known, f"method {method!r} is not known; known: {', '.join(METHODS)}, or objects of gdiff_jax.methods")
            method = METHODS[method]
            method = dataclasses.replace(method, joint_labels=joint) if isinstance(method, DLG) else method
            if isinstance(method, Auto) and hindrances(method.search, attacker, client):
                method = strongest(DSG())
        ok = not hindrances(method.search if isinstance(method, Auto) else method, attacker, client)
        need(ok, f"method {method.name} draws from the mechanism's noise, of one gradient: not with this attacker or client")
        alone = not getattr(method, "joint_labels", False)
        need(alone or joint, f'method {method.name} looks for the labels too; give attacker=Attacker("server", labels="joint")')
        chosen.append(method)
    names = [method.name for method in chosen]
    twice = {name for name in names if names.count(name) > 1}
    need(not twice, f"methods name {', '.join(sorted(twice))} more than once; audit one of its options at a time")
    return dict(zip(names, chosen, strict=True))


def check_mechanism(make: Callable[[Any], Mechanism], params: Any) -> None:
    """That it makes of a traced sigma something that takes a gradient to one of the same shape."""
    try:
        leak = jax.eval_shape(lambda key, sigma, g: make(sigma)(key, g), numerics.key(0), np.float32(1), params)
        str(make(1.0))
    except Exception as error:  # whatever the user's function raises
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"mechanism fails ({type(error).__name__}: {text}); give a function of a noise level, such as GaussianNoise"
        ) from error
    shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
    need(shapes(leak) == shapes(params), "mechanism changes the shape of the gradient; give one that keeps it")
    numbers = jax.Array | np.ndarray | np.generic | float | int
    other = next((type(leaf).__name__ for leaf in jax.tree.leaves(make(1.0)) if not isinstance(leaf, numbers)), "")
    need(
        not other,
        f"mechanism gives a {other}, which JAX knows as no pytree of numbers: register its class by "
        "jax.tree_util.register_dataclass",
    )


def check_knowledge(loss: Any, attacker: Attacker, client: Client, methods: dict[str, Method]) -> None:
    """That what is attacked, a loss or a `Victim`, gives what this attacker is to know or to infer."""
    knows = attacker.knowledge
    need(
        isinstance(loss, Victim) or not (knows.labels != "known" or knows.guesses_rate(client.local_steps)),
        f"attacker {attacker.attacker!r} infers labels or rates from the last layer, which is known of a "
        'gdiff_jax.Victim only; give one in place of the loss, or Attacker("...", labels="known", local_rate="known")',
    )
    if not (isinstance(loss, Victim) and loss.has_batch_norm):
        return
    need(
        knows.statistics != "known" or client.local_steps == 1,
        f"the victim's BatchNorms have other statistics in each of {client.local_steps} local steps; "
        'give Attacker("...", statistics="batch") or "replaced"',
    )
    need(
        knows.statistics == "batch" or not client.splits_images,
        f"the victim's BatchNorms have other statistics in each local batch of {client.local_batch}; "
        'give Attacker("...", statistics="batch"), or leave local_batch at 0',
    )
    need(
        knows.statistics == "batch" or not any(getattr(method, "joint_labels", False) for method in methods.values()),
        f"statistics {knows.statistics!r}: dlg can optimise labels only with the candidate's own; "
        'give Attacker("...", statistics="batch")',
    )


def check_fits(victim: Victim | OwnVictim, client: Client, methods: dict[str, Method]) -> None:
    for method in methods.values():
        fits = method.fits(victim.first_dense, client.group)
        need(fits, f"method {method.name} needs a first layer that is dense, and leaks of one image")


def check_rate(mechanism: Mechanism, knows: Knowledge, client: Client) -> None:
    """That a clipped update is not to be divided by a guessed rate."""
    clips = any(isinstance(stage, Clip) for stage in stages_of(mechanism))
    need(
        not (knows.guesses_rate(client.local_steps) and knows.adaptive) or not clips,
        "the mechanism clips, to a norm in units of the local rate, which this attacker guesses; "
        'give Attacker("...", local_rate="known") or adaptive=False',
    )


def check_classes(labels: Any, num_classes: int, inferred: bool) -> None:
    """The labels of a `Victim`: integers (N,), or probabilities (N, classes) where nobody infers them."""
    array, *others = jax.tree.leaves(labels)
    whole = not others and array.ndim == 1 and array.dtype.kind in "iu"
    odd = f"labels are {array.dtype} {array.shape}; this victim takes integers (N,), or probabilities (N, {num_classes})"
    shares = array.dtype.kind == "f" and array.shape[1:] == (num_classes,)
    need(whole or (not others and shares), odd + (f"; labels.reshape({len(array)})" if array.shape[1:] == (1,) else ""))
    need(whole or not inferred, f"labels are {array.dtype} {array.shape}; this attacker infers integers (N,): give those")
    if whole:
        low, high = int(array.min()), int(array.max())
        need(low >= 0 and high < num_classes, f"labels {low}..{high} go beyond the victim's classes, 0..{num_classes - 1}")
