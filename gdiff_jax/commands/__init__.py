"""The commands: flags made from settings, help, exit codes."""

import os
import sys

# Figures go to files. What a notebook leaves here for the shells that it starts is often not installed beside the commands, and
# matplotlib, which other libraries import too, does not start under a name that it cannot find.
os.environ["MPLBACKEND"] = "agg"

# Before NumPy is imported. As many leaks are solved at once as there are cores, so each is one core's work: OpenBLAS's threads
# wait for each other by spinning, which on cores that are taken makes an eigendecomposition five times as long [measured].
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if any(name.startswith("JAX_") for name in os.environ):  # else --help need not wait for JAX
    try:
        import jax  # noqa: F401 - a value that it does not know, such as JAX_ENABLE_X64=maybe, is told in a line
    except ValueError as error:
        sys.exit(f"error: JAX does not start under the variables JAX_... of this shell: {error}")
