"""Measures a prior and writes its card, so that anyone can judge it: held-out eps-MSE by noise level, a sheet of samples, and
how far the samples are from the training images.

    python experiments/prior_card.py --prior=cifar10-32 --data=PATH --out=runs/card

`experiments/train_prior.py` ends with the same card beside the weights it exports.
"""

from __future__ import annotations

from gdiff_jax.commands import flags
from gdiff_jax.training.settings import PriorCard


def main() -> None:
    flags.command(_measure, PriorCard(), text=__doc__)


def _measure() -> None:
    from gdiff_jax.training.prior_card import make_card  # not with the module: --help need not wait for it

    flags.need_devices()
    print(make_card(flags.read_flags(PriorCard())))
