"""Trains a diffusion prior on your pictures and exports it as a folder that `--prior=FOLDER` takes.

    gdiff-train-prior FOLDER                           32 px, to runs/prior/prior
    gdiff-train-prior FOLDER --size=64 --out=runs/mine
    gdiff-train-prior FOLDER --prior=cifar10-32 --steps=2000       go on from a prior that is there

Pictures are cropped to squares and resized; a tenth of them is held out and measures how well it learns. The output folder
has log.jsonl, samples.png, drawn anew at a checkpoint every few minutes with the same noise, and at the end prior, with a card.
Killed, it goes on from its last checkpoint when started again with the same flags. The learning rate is held constant
and falls to zero over the last part of the run, so a run may also be prolonged: start it again with more --steps.
The batch is split over all devices.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from gdiff_jax.commands import flags
from gdiff_jax.training.settings import PriorTraining

USUAL = ("data", "prior", "size", "steps", "out")  # flags, which --help begins with


def main() -> None:
    flags.command(_train, PriorTraining(), text=__doc__, usual=USUAL, word="data")


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
