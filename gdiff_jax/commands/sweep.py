"""How well private images come back from their gradients, over a grid of noise levels, victims and methods.

    gdiff-sweep --sigma_grid                  the default grid with the bundled prior and images
    gdiff-sweep --sigma_grid=0,1e-3,1e-2 --victims=lenet --methods=dsg --images=FOLDER --label=0
    gdiff-sweep --epsilon_grid=1,10,100 --mechanisms=clip:1+gaussian
    gdiff-sweep --methods=all --attacker=server        every attack, by one who must infer the labels
    gdiff-sweep --group=4                              four images in one gradient

The output folder receives every trial's record, image and trace, a table, a plot of quality over sigma and a contact
sheet. A sweep that was killed goes on where it stopped when the same command is given again.
What the attacker knows is said by --attacker and printed with the results.
"""

from __future__ import annotations

from gdiff_jax.commands import flags
from gdiff_jax.commands.processes import Processes, join
from gdiff_jax.sweeping.config import SweepConfig

USUAL = ("sigma_grid", "victims", "methods", "images", "out")  # flags, which --help begins with


def main() -> None:
    flags.command(_sweep, SweepConfig(), Processes(), text=__doc__, usual=USUAL)


def _sweep() -> None:
    from gdiff_jax import parallel  # not with the module, nor what follows: --help need not wait for it
    from gdiff_jax.sweeping.sweep import sweep

    parallel.use_every_core()
    join(flags.read_flags(Processes()))
    flags.need_devices()
    sweep(flags.read_flags(SweepConfig()))
