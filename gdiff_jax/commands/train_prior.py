"""Trains a diffusion prior on a set of images and exports it as a folder that `--prior FOLDER` takes.

    python experiments/train_prior.py --data=PATH --config=gdiff_jax/priors/bundled/cifar10_32/config.json --out=runs/prior

Killed, it goes on from its last checkpoint when started again with the same flags. The learning rate is held constant
and falls to zero over the last part of the run, so a run may also be prolonged: start it again with more --steps.
The batch is split over all devices. Where the package is installed the command is also called gdiff-train-prior.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from gdiff_jax.commands import flags
from gdiff_jax.training.settings import PriorTraining


def main() -> None:
    flags.command(_train, PriorTraining(), text=__doc__)


def _train() -> None:
    from gdiff_jax.training.prior import train_prior  # not with the module: --help need not wait for it

    flags.need_devices()
    folder = train_prior(flags.read_flags(PriorTraining()), command_line(sys.argv))
    print(f"exported to {folder}; use it with --prior={folder}")


def command_line(argv: list[str]) -> str:
    """What to type for this run again: `python FILE.py ...` where a file was started, or the installed command's name."""
    program = Path(argv[0])
    start = ["python", argv[0]] if program.suffix == ".py" else [program.stem]
    return shlex.join([*start, *argv[1:]])
