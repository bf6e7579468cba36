"""What a conditional prior is told in a trial: the label that the attacker goes by, where its classes are the victim's.

That they are is taken from their number, for neither file says more: class 3 of the prior should be class 3 of the victim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from gdiff_jax.errors import need
from gdiff_jax.priors import Denoiser, Prior
from gdiff_jax.samplers import batched
from gdiff_jax.samplers.base import Denoise


def _is_conditional(denoise: Any) -> bool:
    return isinstance(denoise, Denoiser) and denoise.config.label_ndim is not None


def _are_its_classes(denoise: Any, num_classes: int) -> bool:
    return isinstance(denoise, Denoiser) and denoise.num_labels == num_classes


def check_classes(prior: Prior, victims: Mapping[str, Any]) -> None:
    """That a conditional prior can be told something of each victim's images.

    Raises:
      ConfigError: where it cannot.
    """
    if not _is_conditional(prior.denoise) or prior.denoise.null_label is not None:
        return
    network = prior.denoise.config
    need(network.num_classes is not None, f"--prior {prior.name} is told vectors or times for classes, which labels are not")
    for name, victim in victims.items():
        need(
            victim.num_classes == network.num_classes,
            f"--prior {prior.name} is conditional on {network.num_classes} classes, of which none stands for no class, and "
            f"victim {name} has {victim.num_classes}; give a prior of the same classes, or one that is not conditional",
        )


def told(denoise: Denoise, labels: Any, num_classes: int, several: bool) -> Denoise:
    """A trial's denoiser, told the labels that its attacker goes by if they are of its classes.

    Args:
      denoise: of one image.
      labels: of one image a scalar, of several (B,); None where the attacker has none.
      num_classes: of the victim.
      several: whether it is for a leak of several images, (B, H, W, C) together.
    """
    if labels is None or not _are_its_classes(denoise, num_classes):
        return batched(denoise) if several else denoise
    assert isinstance(denoise, Denoiser)
    return jax.tree_util.Partial(_each, denoise, labels) if several else denoise.given(labels)


def _each(denoise: Denoiser, labels: jax.Array, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return jax.vmap(lambda label, x: denoise.given(label)(x, t))(labels, x_t)


def described(prior: Prior, victims: Mapping[str, Any]) -> list[str]:
    """What of its classes a conditional prior is told, for a report."""
    if not _is_conditional(prior.denoise):
        return []
    known = {_are_its_classes(prior.denoise, victim.num_classes) for victim in victims.values()}
    says = {True: "told the label that the attacker goes by", False: "told no class, for the victim has others"}
    guided = f", class guidance {prior.denoise.class_guidance:g}" if prior.denoise.class_guidance != 1 else ""
    return ["the prior is " + " or ".join(says[k] for k in sorted(known, reverse=True)) + guided]


def of_any_class(denoise: Denoise, key: jax.Array) -> Denoise:
    """For a sample by one who ignores the leak, and with it the label: of no class, or of one that is drawn."""
    return denoise.of_any_class(key) if isinstance(denoise, Denoiser) else denoise
