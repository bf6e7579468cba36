"""Measures a prior and writes its card: `python experiments/prior_card.py --help`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gdiff_jax.commands.prior_card import main

if __name__ == "__main__":
    main()
