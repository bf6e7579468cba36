"""The commands: flags made from settings, help, exit codes."""

import os

# Figures go to files. What a notebook leaves here for the shells that it starts is often not installed beside the commands, and
# matplotlib, which other libraries import too, does not start under a name that it cannot find.
os.environ["MPLBACKEND"] = "agg"
