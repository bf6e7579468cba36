"""The command gdiff-audit from a checkout, installed or not: `python experiments/audit.py --help`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gdiff_jax.commands.audit import main

if __name__ == "__main__":
    main()
