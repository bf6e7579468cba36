"""The command gdiff-sweep from a checkout, installed or not: `python experiments/sweep.py --help`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gdiff_jax.commands.sweep import main

if __name__ == "__main__":
    main()
