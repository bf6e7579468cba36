"""Training of a diffusion prior (DDPM: Ho et al. 2020): one step, a run that goes on from its checkpoints, the export."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from gdiff_jax import images as image_files
from gdiff_jax import numerics
from gdiff_jax.errors import ConfigError, RunError, need
from gdiff_jax.modules import Params, digest, init_params
from gdiff_jax.priors import Denoiser, Prior, UNet2DConfig, load_prior, save_configs, save_prior
from gdiff_jax.schedule import Schedule, make_betas
from gdiff_jax.training.data import load_split
from gdiff_jax.training.prior_card import eps_loss, eps_mse_by_level, write_card
from gdiff_jax.training.settings import PriorTraining

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

State = dict[str, Any]  # params; ema, their moving average; opt, the optimiser's state; step, int32: how many were made


def warmup_stable_decay(settings: PriorTraining) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then constant, then linearly to 0."""
    tail = max(1, int(settings.steps * settings.decay))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, settings.learning_rate, settings.warmup),
            optax.constant_schedule(settings.learning_rate),
            optax.linear_schedule(settings.learning_rate, 0.0, tail),
        ],
        [settings.warmup, max(settings.warmup, settings.steps - tail)],
    )


def make_optimiser(settings: PriorTraining) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup_stable_decay(settings), b2=0.99))


def fresh_state(key: jax.Array, network: UNet2DConfig, optimiser: optax.GradientTransformation) -> State:
    """The state before the first step."""
    params = init_params(jax.random.fold_in(key, 2**31 - 1), network)
    return dict(params=params, ema=jax.tree.map(jnp.copy, params), opt=optimiser.init(params), step=jnp.int32(0))


def make_step(
    settings: PriorTraining, network: UNet2DConfig, optimiser: optax.GradientTransformation, schedule: Schedule
) -> Callable[[State, jax.Array, jax.Array], tuple[State, jax.Array]]:
    """step(state, data, key) -> (state, loss); data is the whole uint8 training set, on the device."""

    def loss_fn(params: Params, key: jax.Array, data: jax.Array) -> jax.Array:
        k_index, k_flip, k_t, k_eps = jax.random.split(key, 4)
        x0 = image_files.to_model(data[jax.random.randint(k_index, (settings.batch,), 0, data.shape[0])])
        if settings.flip:
            mirror = jax.random.bernoulli(k_flip, 0.5, (settings.batch, 1, 1, 1))
            x0 = jnp.where(mirror, x0[:, :, ::-1], x0)
        x0 = jax.lax.with_sharding_constraint(x0, P("data")) if jax.device_count() > 1 else x0
        # One uniform draw, spread evenly over the batch: the same expectation, less variance (Kingma et al. 2021, VDM).
        u = (jax.random.uniform(k_t) + jnp.arange(settings.batch) / settings.batch) % 1.0
        t = jnp.floor(u * schedule.num_steps).astype(jnp.int32)
        return eps_loss(Denoiser(params, network, settings.dtype), schedule, k_eps, x0, t).mean()

    def step(state: State, data: jax.Array, key: jax.Array) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(key, state["step"])
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], key, data)
        updates, opt = optimiser.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        count = state["step"] + 1
        decay = jnp.minimum(settings.ema, (1.0 + count) / (10.0 + count))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params)
        return dict(params=params, ema=ema, opt=opt, step=count), loss

    return jax.jit(step, donate_argnums=0)


def read_network(settings: PriorTraining) -> UNet2DConfig:
    """The network of `settings.config`.

    Raises:
      ConfigError: where the file cannot be read, or the network cannot be trained here.
    """
    try:
        network = UNet2DConfig.from_diffusers(json.loads(Path(settings.config).read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {settings.config}: {error}") from None
    need(not network.dropout, f"--config {settings.config}: dropout {network.dropout} is not implemented; use 0")
    plain = network.label_ndim is None and network.time_embedding_type == "positional"
    need(
        plain,
        f"--config {settings.config}: trained is epsilon, without classes, time_embedding_type positional",
    )
    return network


def load_data(settings: PriorTraining, network: UNet2DConfig) -> tuple[np.ndarray, np.ndarray]:
    """(training images, held-out images), both (N, H, W, C) uint8, see `load_split`.

    Raises:
      ConfigError: where they cannot be read, or are not of the network's shape.
    """
    try:
        train, heldout = load_split(settings.data, network.image_shape[0], settings.heldout, network.image_shape[-1])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data: {error}") from None
    shape = train.images.shape[1:]
    need(shape == network.image_shape, f"--data {settings.data}: images are {shape}, --config takes {network.image_shape}")
    return train.images, heldout.images


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training with what it reads and where it writes."""

    settings: PriorTraining
    network: UNet2DConfig
    images: np.ndarray  # (N, H, W, C) uint8, trained on
    heldout: np.ndarray  # (M, H, W, C) uint8, never trained on
    out: Path
    checkpoints: ocp.CheckpointManager
    mesh: jax.sharding.Mesh  # all devices, over which the batch is split

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def log(self) -> Path:
        """One row of JSON a checkpoint."""
        return self.out / "log.jsonl"


def train_prior(settings: PriorTraining, command: str = "") -> Path:
    """Trains a prior and exports it with its card; goes on from the newest checkpoint in `settings.out`, if any.

    Args:
      settings: what to train, on which images, for how long.
      command: how the card names what made it; "" leaves that line out.

    Returns:
      The folder of the exported prior, `out`/prior, which `load_prior` takes.

    Raises:
      ConfigError: where the settings cannot be used; nothing is written.
      RunError: where the loss is not finite; the checkpoints before are kept.
    """
    settings.check()
    network = read_network(settings)
    devices = jax.device_count()
    need(settings.batch % devices == 0, f"--batch {settings.batch} does not divide over {devices} devices; use a multiple")
    images, heldout = load_data(settings, network)
    out = Path(settings.out).absolute()
    checkpoints = ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    run = _Run(settings, network, images, heldout, out, checkpoints, mesh)

    optimiser = make_optimiser(settings)
    key = numerics.key(settings.seed)
    state = _start(run, functools.partial(fresh_state, key, network, optimiser))
    save_configs(out, network, SCHEDULER)  # load_prior(out) then reads the newest checkpoint
    count = sum(a.size for a in jax.tree.leaves(state["params"]))
    print(f"{len(images)} images, {len(heldout)} held out, {count:,} parameters, {_devices()}")
    state = _optimise(run, optimiser, state, key)
    return _export(run, state["ema"], command)


def _devices() -> str:
    return f"{jax.device_count()} {jax.default_backend()} device(s)"


def _start(run: _Run, create: Callable[[], State]) -> State:
    """The state of the newest checkpoint, or that of `create` where there is none, on all devices."""
    latest = run.checkpoints.latest_step()
    if latest is None:
        return jax.device_put(jax.jit(create)(), run.replicated)
    about = run.checkpoints.restore(latest, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    same = UNet2DConfig.from_diffusers(about["config"]) == run.network  # an older version wrote fewer fields
    need(same, f"--out {run.settings.out} holds a run of another --config; give another folder")
    other = numerics.differences(about.get("settings", {}), numerics.unusual())
    need(not other, f"--out {run.settings.out} was begun under other settings of JAX ({other}); set them as they were")
    described = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=run.replicated)
    target = ocp.args.StandardRestore(jax.tree.map(described, jax.eval_shape(create)))
    state = run.checkpoints.restore(latest, args=ocp.args.Composite(state=target))["state"]
    print(f"resumed from step {latest} in {run.out}")
    return state


def _optimise(run: _Run, optimiser: optax.GradientTransformation, state: State, key: jax.Array) -> State:
    """The state after `settings.steps` steps in all, with a checkpoint and a row of the log every `save_every`."""
    settings, schedule = run.settings, Schedule.create(make_betas())
    step = make_step(settings, run.network, optimiser, schedule)
    data = jax.device_put(run.images, run.replicated)
    first, losses, started = int(state["step"]), [], time.time()
    with jax.set_mesh(run.mesh), tqdm(total=settings.steps, initial=first, unit="step", mininterval=5) as bar:
        for count in range(first + 1, settings.steps + 1):
            state, loss = step(state, data, key)
            losses.append(loss)
            bar.update()
            if count % settings.save_every == 0 or count == settings.steps:
                mean = float(jnp.stack(losses).mean())
                losses.clear()
                if not np.isfinite(mean):
                    raise RunError(f"the loss is {mean} at step {count}; start again with a lower --learning_rate")
                _save(run, count, state)
                levels = eps_mse_by_level(Denoiser(state["ema"], run.network), schedule, run.heldout[:200], (0.05, 0.2, 0.5))
                bar.set_postfix(loss=f"{mean:.4f}", heldout=f"{np.mean(list(levels.values())):.4f}")
                row = dict(step=count, loss=mean, heldout=levels, seconds=round(time.time() - started, 1))
                started = time.time()
                with open(run.log, "a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
    run.checkpoints.wait_until_finished()
    return state


def _save(run: _Run, count: int, state: State) -> None:
    """A checkpoint with what `load_prior` needs to know that it is whole."""
    about = {"ema_sha256": digest(state["ema"]), "config": run.network.to_diffusers(), "settings": numerics.unusual()}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    run.checkpoints.save(count, args=args)


def _export(run: _Run, ema: Params, command: str) -> Path:
    """Writes the moving average as a prior, with its card; the folder."""
    settings, folder = run.settings, run.out / "prior"
    mean_image = image_files.to_model(run.images.mean(0))
    ema = jax.device_put(ema, jax.devices()[0])
    prior = Prior(Denoiser(ema, run.network), make_betas(), "fixed_small", run.out.name, "", mean_image)
    save_prior(folder, prior, SCHEDULER)
    prior = dataclasses.replace(load_prior(folder), name=run.out.name)  # measured is what was written, float16 and all
    rows = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()]
    hours = sum(row["seconds"] for row in rows) / 3600
    name, mirrored = settings.data_name or Path(settings.data).name, ", mirrored at random" * settings.flip
    facts = {
        "data": f"{name}, {len(run.images)} images{mirrored}",
        **({"command": f"`{command}`"} if command else {}),
        "steps": f"{settings.steps} of {settings.batch} images, {hours:.1f} hours on {_devices()}, loss {rows[-1]['loss']:.4f}",
        "weights": f"moving average, float16, sha256 {prior.sha256}",
    }
    write_card(folder, prior, run.images, run.heldout, facts)
    return folder
