"""What a conditional prior is told in a trial: the label that the attacker goes by, where its classes are the victim's.

That they are is taken from their number, for neither file says more: class 3 of the prior should be class 3 of the victim. Of
a loss whose number of classes nobody says they are assumed to be, as long as the prior has each label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gdiff_jax.errors import need
from gdiff_jax.priors import Denoiser, Prior
from gdiff_jax.samplers import batched, unguided_sample
from gdiff_jax.samplers.base import Denoise
from gdiff_jax.schedule import Schedule
from gdiff_jax.victims.own import OwnVictim


def _is_conditional(denoise: Any) -> bool:
    return isinstance(denoise, Denoiser) and denoise.config.label_ndim is not None


def _is_guessed(victim: Any) -> bool:
    return isinstance(victim, OwnVictim) and victim.classes_guessed


def _are_its_classes(denoise: Any, victim: Any, labels: Any, ndim: int) -> bool:
    """Whether labels of `ndim` axes, a whole number an image, are told; of a guess, their number is that of the labels seen."""
    if not isinstance(denoise, Denoiser) or denoise.num_labels is None or not _are_whole(labels, ndim):
        return False
    classes = victim.num_classes
    return bool(0 < classes <= denoise.num_labels if _is_guessed(victim) else classes == denoise.num_labels)


def _are_whole(labels: Any, ndim: int) -> bool:
    return hasattr(labels, "dtype") and labels.ndim == ndim and jnp.issubdtype(labels.dtype, jnp.integer)


def check_classes(prior: Prior, victims: Mapping[str, Any], labels: Any) -> None:
    """That a conditional prior can be told something of each victim's images, whose labels are these, of all of them.

    Raises:
      ConfigError: where it cannot.
    """
    if not _is_conditional(prior.denoise) or prior.denoise.null_label is not None:
        return
    network = prior.denoise.config
    need(network.num_classes is not None, f"--prior {prior.name} is told vectors or times for classes, which labels are not")
    need(
        _are_whole(labels, 1),
        f"--prior {prior.name} is told a whole number an image, and the labels are no single array (N,) of such; give class "
        "numbers, or a prior that is not conditional",
    )
    for name, victim in victims.items():
        has = f"has {victim.num_classes}"
        if _is_guessed(victim):
            has = f"is given label {victim.num_classes - 1}" if victim.num_classes else "is given labels below 0"
        need(
            _are_its_classes(prior.denoise, victim, labels, 1),
            f"--prior {prior.name} is conditional on {network.num_classes} classes, of which none stands for no class, and "
            f"victim {name} {has}; give a prior of the same classes, or one that is not conditional",
        )


def told(denoise: Denoise, labels: Any, victim: Any, several: bool) -> Denoise:
    """A trial's denoiser, told the labels that its attacker goes by if they are of its classes.

    Args:
      denoise: of one image.
      labels: of one image a scalar, of several (B,); None where the attacker has none.
      victim: whose number of classes decides; labels that are no whole numbers count as none.
      several: whether it is for a leak of several images, (B, H, W, C) together.
    """
    if not _are_its_classes(denoise, victim, labels, int(several)):
        return batched(denoise) if several else denoise
    assert isinstance(denoise, Denoiser)
    return jax.tree_util.Partial(_each, denoise, labels) if several else denoise.given(labels)


def _each(denoise: Denoiser, labels: jax.Array, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return jax.vmap(lambda label, x: denoise.given(label)(x, t))(labels, x_t)


def described(prior: Prior, victims: Mapping[str, Any], labels: Any) -> list[str]:
    """What of its classes a conditional prior is told, for a report, where these are the labels of all images."""
    if not _is_conditional(prior.denoise):
        return []
    known = {_are_its_classes(prior.denoise, victim, labels, 1) for victim in victims.values()}
    assumed = ", taken to count the prior's classes" if any(map(_is_guessed, victims.values())) else ""
    others = "the victim has others" if _are_whole(labels, 1) else "the labels are none"
    says = {True: f"told the label that the attacker goes by{assumed}", False: f"told no class, for {others}"}
    guided = f", class guidance {prior.denoise.class_guidance:g}" if prior.denoise.class_guidance != 1 else ""
    return ["the prior is " + " or ".join(says[k] for k in sorted(known, reverse=True)) + guided]


def sample_unguided(key: jax.Array, denoise: Denoise, schedule: Schedule, shape: tuple[int, ...], **options: Any) -> Any:
    """`unguided_sample` by one who ignores the leak, and with it the label: of no class, or of one that is drawn."""
    if isinstance(denoise, Denoiser):
        denoise = denoise.of_any_class(jax.random.fold_in(key, 1))
    return unguided_sample(key, denoise, schedule, shape, **options)
