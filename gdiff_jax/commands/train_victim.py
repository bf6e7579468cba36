"""Trains a victim and keeps its weights at chosen numbers of steps: the training state is a variable of every study.

    python experiments/train_victim.py --victim=lenet --data=PATH --steps=100,1000 --out=runs/victims
    python experiments/sweep.py --victims=lenet --training_steps=0,100,1000 --checkpoints=runs/victims

Where the package is installed the command is also called gdiff-train-victim.
"""

from __future__ import annotations

from gdiff_jax.commands import flags
from gdiff_jax.training.settings import VictimTraining


def main() -> None:
    flags.command(_train, VictimTraining(), text=__doc__)


def _train() -> None:
    from gdiff_jax.training.victim import train_victim  # not with the module: --help need not wait for it

    flags.need_devices()
    settings = flags.read_flags(VictimTraining())
    train_victim(settings)
    print(f"weights in {settings.out}; a sweep attacks them with --checkpoints={settings.out}")
