"""What made a result: versions, device, command, commit, time."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from gdiff_jax import numerics


def this_run() -> dict[str, Any]:
    """Who computes: versions, device, command, commit and time."""
    packages = ("gdiff-jax", "jax", "jaxlib", "flax", "numpy", "optax", "dm-pix", "diffusers")
    device = jax.local_devices()[0]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        **({"settings": unusual} if (unusual := numerics.unusual()) else {}),
    }


def _commit() -> str | None:
    """Of the checkout that this package is part of; None where it was installed away from it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", check=False)
    except OSError:  # no git on this machine
        return None
    return git.stdout.strip() or None
