"""Trains a victim and keeps its weights at chosen numbers of steps: the training state is a variable of every study.

    gdiff-train-victim --victim=lenet --data=PATH --steps=100,1000 --out=runs/victims
    gdiff-sweep --victims=lenet --training_steps=0,100,1000 --checkpoints=runs/victims

The second line attacks what the first has kept, beside the untrained network.
"""

from __future__ import annotations

from gdiff_jax.commands import flags
from gdiff_jax.training.settings import VictimTraining

USUAL = ("victim", "data", "out", "steps", "num_classes")  # flags, which --help begins with


def main() -> None:
    flags.command(_train, VictimTraining(), text=__doc__, usual=USUAL)


def _train() -> None:
    from gdiff_jax.training.victim import train_victim  # not with the module: --help need not wait for it

    flags.need_devices()
    settings = flags.read_flags(VictimTraining())
    train_victim(settings)
    print(f"weights in {settings.out}; a sweep attacks them with --checkpoints={settings.out}")
