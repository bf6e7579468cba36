"""Sweeps and audits at the smallest size: their settings over the tiny prior of conftest, and how they are run."""

import json
import subprocess
import sys
from pathlib import Path

import jax
from absl.flags import FLAGS

from gdiff_jax import parallel
from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands.flags import define_flags, read_flags
from gdiff_jax.options import flat, replace
from gdiff_jax.sweeping import inputs
from gdiff_jax.sweeping.config import SweepConfig
from gdiff_jax.sweeping.sweep import sweep

ROOT = Path(__file__).parents[1]
MODELS = Path(__file__).with_name("own_models.py")
ONE_DEVICE = parallel.trial_mesh(jax.local_devices()[:1])


def config(tiny_prior, out, **changes):
    tiny = dict(
        sigma_grid=(0.0, 0.1),
        victims=("mlp-narrow",),
        images=str(tiny_prior / "images.npz"),
        num_images=3,
        prior=str(tiny_prior / "prior"),
        steps=3,
        batch=4,
        out=str(out),
    )
    return replace(SweepConfig(), **{**tiny, **changes})


def plan_of(tiny_prior, **changes):
    return inputs.load(config(tiny_prior, "unused", **changes))


def command_of(script):
    return [sys.executable, str(ROOT / "experiments" / script)]


def flags_of(settings):
    """The flags that give these settings."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"--{name}={text(value)}" for name, value in flat(settings).items() if value is not None and value != ()]


def command(c):
    return [*command_of("sweep.py"), *flags_of(c)]


def run_in_process(c, plan=None):
    """The records of a sweep."""
    sweep(c, plan, mesh=ONE_DEVICE)
    return read_records(c.run.out)


def read_records(folder):
    return [json.loads(line) for line in (Path(folder) / "records.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def records_of(c):
    """The rows that a sweep left, without the time they took."""
    return without_time(read_records(c.run.out))


def run_command(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, check=False, **options)


def to_folder(c, out):
    return replace(c, out=str(out))


def audit_config(tiny_prior, out, **changes):
    tiny = dict(
        victim=f"{MODELS}:make",
        sigma_grid=(0.0,),
        images=str(tiny_prior / "images.npz"),
        num_images=2,
        methods=("dsg",),
        spectra=0,
        prior=str(tiny_prior / "prior"),
        steps=2,
        seeds=1,
        batch=4,
        out=str(out),
    )
    return replace(AuditConfig(), **{**tiny, **changes})


def parsed(defaults, *arguments):
    """The settings that these flags give."""
    define_flags(defaults)
    try:
        FLAGS(["command", *arguments])
        return read_flags(defaults)
    finally:  # the flags of another command have the same names
        for name in flat(defaults):
            delattr(FLAGS, name)
