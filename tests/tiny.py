"""Sweeps and audits at the smallest size: their settings over the tiny prior of conftest, and how they are run."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl.flags import FLAGS
from objectives import float32

from gdiff_jax import parallel
from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands import flags
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise
from gdiff_jax.methods import Info, Method
from gdiff_jax.metrics import image_metrics
from gdiff_jax.options import flat, replace
from gdiff_jax.priors import Denoiser, UNet2DConfig
from gdiff_jax.pytrees import pytree
from gdiff_jax.sweeping import inputs
from gdiff_jax.sweeping.config import SweepConfig
from gdiff_jax.sweeping.plan import PRIOR_ONLY
from gdiff_jax.sweeping.records import MemoryStore
from gdiff_jax.sweeping.run import compile_program, compute, run_trials
from gdiff_jax.sweeping.sweep import sweep
from gdiff_jax.sweeping.trials import make_grid
from gdiff_jax.trace import StepInfo, x0_error

ROOT = Path(__file__).parents[1]
MODELS = Path(__file__).with_name("own_models.py")
scores = jax.jit(image_metrics)  # of an image and the truth
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


@pytree
class Plain(Denoiser):
    """The exact eps for pixels drawn from N(0, 0.5^2), which compiles in no time."""

    def __call__(self, x_t, t):
        abar = self.params["abar"][t]
        return jnp.sqrt(1 - abar) / (0.25 * abar + 1 - abar) * x_t, None


def plain(prior):
    """For what does not depend on the prior."""
    abar = float32(np.cumprod(1 - prior.betas))
    return dataclasses.replace(prior, denoise=Plain({"abar": abar}, prior.denoise.config))


def with_plain_prior(plan):
    return dataclasses.replace(plan, prior=plain(plan.prior))


def plain_plan(tiny_prior, **changes):
    return with_plain_prior(plan_of(tiny_prior, **changes))


def run_in_memory(plan, batch=4, mesh=ONE_DEVICE):
    """The rows of a plan's trials, and the store that holds their arrays."""
    store = MemoryStore()
    return run_trials(plan, store, batch, mesh=mesh, progress=False), store


def attack_once(plan, trials_at_a_time=1):
    """The rows of a plan's first attack on its first images, and their arrays; no samples of the prior beside it."""
    trials = [trial for trial in make_grid(plan) if trial.group.method != PRIOR_ONLY][:trials_at_a_time]
    program = compile_program(plan, ONE_DEVICE, trials[0], trials_at_a_time)
    ((_, rows, arrays),) = compute(plan, program, {0: trials})
    return rows, arrays


def attacks_of(rows):
    """Without the samples of the prior."""
    return [row for row in rows if row["method"] != PRIOR_ONLY]


def row_of(method, sigma, image, psnr, *, seed=0, trial=None, accuracy=1.0, labels="inferred", failed=False, group=1):
    """A record made by hand."""
    return {
        "method": method, "victim": "cnn", "training_steps": 0, "mechanism": "gaussian", "sigma": sigma, "image": image,
        "seed": seed, "psnr": psnr, "failed": failed, "label_accuracy": accuracy, "labels": labels, "seconds": 2.0 * image + 1,
        "memory_mib": 10.0, "chunk": 0, "trial": image // group if trial is None else trial, "row": image,
    }  # fmt: skip


def command_of(script):
    return [sys.executable, str(ROOT / "experiments" / script)]


def flags_of(settings):
    """The flags that give these settings."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"--{name}={text(value)}" for name, value in flat(settings).items() if value not in (None, (), "")]


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


@pytree
class Still(Method):
    """The mean image, whatever leaked: an attack of the user's own, which compiles at once."""

    name: ClassVar[str] = "still"
    shade: jax.Array | float = 0.0

    def describe(self):
        return "the mean image"

    def __call__(self, key, problem):
        x = jnp.broadcast_to(problem.expected_image + self.shade, problem.shape)
        step = StepInfo(problem.match(x), jnp.full((), jnp.nan), x0_error(x, problem.truth))
        return x, Info(jax.tree.map(lambda a: jnp.asarray(a)[None], step), problem.outcome(x))


QUICK_AUDIT = dict(steps=3, batch=4, seeds=1, progress=False)  # for a call, as `audit_config` has them


def clipped(sigma):
    """The mechanism of `audit_config`."""
    return Chain((Clip(1.0), GaussianNoise(sigma)))


def audit_config(tiny_prior, out, **changes):
    tiny = dict(
        victim=f"{MODELS}:make",
        mechanism="clip:1+gaussian",
        sigma_grid=(0.0,),
        images=str(tiny_prior / "images.npz"),
        num_images=2,
        methods=("dsg",),
        spectra=0,
        worst=0,
        prior=str(tiny_prior / "prior"),
        steps=3,
        seeds=1,
        batch=4,
        out=str(out),
    )
    return replace(AuditConfig(), **{**tiny, **changes})


def small_audit(tiny_prior, out):
    """With something to show in every figure of a report."""
    attacks = dict(methods=("inverting", "calibrated-mean"), inverting_steps=3)  # one of each kind, not both with the prior
    return audit_config(tiny_prior, out, sigma_grid=(0.0, 0.1, 1.0), num_images=3, spectra=1, worst=2, **attacks)


def parsed(defaults, *arguments):
    """The settings that these flags give."""
    flags.define_flags(defaults)
    try:
        FLAGS(["command", *arguments])
        return flags.read_flags(defaults)
    finally:  # the flags of another command have the same names
        for name in flat(defaults):
            delattr(FLAGS, name)


def ended(command, monkeypatch, *arguments):
    """The exit code of a command that does not come to its end, run in this process; what it says is on stderr."""
    monkeypatch.setattr(flags, "end_at_once_on_signals", lambda: None)
    monkeypatch.setattr(flags, "keep_compiled", lambda: None)
    monkeypatch.setattr(flags.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    monkeypatch.setattr(sys, "argv", [command.__name__, *arguments])
    before = set(FLAGS)
    try:
        command.main()
    except SystemExit as end:
        return end.code
    finally:
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)


def script(defaults, main):
    """A command of these settings, for `ended`."""

    def whole():
        flags.define_flags(defaults)
        flags.run(main)

    return types.SimpleNamespace(__name__="script", main=whole)


def once(tmp_path_factory, name, make):
    """The folder that make(folder) fills, once for all workers of this run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    done = root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(root / name)
            done.touch()
    return root / name


TRAINED = UNet2DConfig(  # of 8 px, in colour: the network that tests of training train
    sample_size=8,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
)
