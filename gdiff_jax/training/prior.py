"""Training of a diffusion prior (DDPM: Ho et al. 2020): one step, a run that goes on from its checkpoints, the export."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
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
from gdiff_jax.errors import RunError, need
from gdiff_jax.files import lock
from gdiff_jax.modules import Params, digest, init_params
from gdiff_jax.priors import Denoiser, Prior, UNet2DConfig, load_prior, save_configs, save_prior
from gdiff_jax.schedule import Schedule
from gdiff_jax.sweeping import memory
from gdiff_jax.training import log
from gdiff_jax.training.prior_card import draw_samples, eps_loss, eps_mse_by_level, write_card, write_sheet
from gdiff_jax.training.settings import PriorTraining
from gdiff_jax.training.start import Start, read_start

SHOWN_LEVELS = (0.05, 0.2, 0.5)  # of the timesteps: at a checkpoint the held-out error is measured at these
SAMPLES_EVERY = 180.0  # seconds, at least, between two pictures of samples
SAMPLES, SAMPLES_STEPS = 16, 50  # in the time of two to three steps of 64 images [measured, 32 px, a CPU]

State = dict[str, Any]  # params; ema, their moving average; opt, the optimiser's state; step, int32: how many were made


def warmup_stable_decay(settings: PriorTraining) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then constant, then linearly to 0."""
    tail, warmup = max(1, int(settings.steps * settings.decay)), min(settings.warmup, settings.steps // 10)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, settings.learning_rate, warmup),
            optax.constant_schedule(settings.learning_rate),
            optax.linear_schedule(settings.learning_rate, 0.0, tail),
        ],
        [warmup, max(warmup, settings.steps - tail)],
    )


def make_optimiser(settings: PriorTraining) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup_stable_decay(settings), b2=0.99))


def fresh_state(key: jax.Array, start: Start, optimiser: optax.GradientTransformation) -> State:
    """The state before the first step: random weights, or those of the prior that is tuned."""
    if start.tuned is None:
        params = jax.jit(init_params, static_argnums=1)(jax.random.fold_in(key, 2**31 - 1), start.network)
    else:
        params = jax.tree.map(jnp.copy, start.tuned.denoise.params)  # steps are made in place
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


@dataclasses.dataclass(frozen=True)
class _Run:
    """A training with what it reads and where it writes."""

    settings: PriorTraining
    start: Start
    images: np.ndarray  # (N, H, W, C) uint8, trained on
    heldout: np.ndarray  # (M, H, W, C) uint8, never trained on
    out: Path
    mesh: jax.sharding.Mesh  # all devices, over which the batch is split

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    @functools.cached_property
    def checkpoints(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must not change where it goes on: network, weights at the start, images, settings of JAX."""
        return {
            "config": self.start.network.to_diffusers(),
            "prior": self.start.sha256,
            "images": hashlib.sha256(self.images.data).hexdigest(),
            "settings": numerics.unusual(),
        }

    def prior(self, ema: Params, dtype: str = "float32") -> Prior:
        """The prior of these weights."""
        levels, denoise = self.start.diffusion, Denoiser(ema, self.start.network, dtype)
        return Prior(denoise, levels.betas, levels.variance, self.out.name, "", clip=levels.clip)


def train_prior(settings: PriorTraining, command: str = "") -> Path:
    """Trains a prior and exports it with its card; goes on from the newest checkpoint in `settings.out`, if any.

    Args:
      settings: what to train, on which images, for how long.
      command: how the card names what made it; "" leaves that line out.

    Returns:
      The folder of the exported prior, `out`/prior, which `load_prior` takes.

    Raises:
      ConfigError: where the settings cannot be used, or another training writes to `settings.out`; nothing is written.
      RunError: where the loss is not finite; the checkpoints before are kept.
    """
    settings.check()
    devices = jax.device_count()
    need(settings.batch % devices == 0, f"--batch {settings.batch} does not divide over {devices} devices; use a multiple")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    start, images, heldout = read_start(settings, memory.budget(0, mesh))
    run = _Run(settings, start, images, heldout, Path(settings.out).absolute(), mesh)
    with lock(run.out, "training"):
        return _train(run, command)


def _train(run: _Run, command: str) -> Path:
    settings, start = run.settings, run.start
    optimiser = make_optimiser(settings)
    key = numerics.key(settings.seed)
    state = _begin(run, functools.partial(fresh_state, key, start, optimiser))
    save_configs(run.out, start.network, start.scheduler)  # load_prior(out) then reads the newest checkpoint
    size, channels = run.images.shape[1], run.images.shape[-1]
    counted = f"{len(run.images)} images of {size} px, {channels} channel(s), {len(run.heldout)} held out"
    print(f"{counted}, {start.parameters:,} parameters")
    print(f"{settings.steps} steps of {settings.batch} images on {_devices()}; {run.out} has log and samples.png", flush=True)
    state = _optimise(run, optimiser, state, key)
    return _export(run, state["ema"], command)


def _devices() -> str:
    return f"{jax.device_count()} {jax.default_backend()} device(s)"


def _begin(run: _Run, create: Callable[[], State]) -> State:
    """The state of the newest checkpoint, or that of `create` where there is none, on all devices."""
    latest = run.checkpoints.latest_step()
    if latest is None:
        log.cut(run.log, -1)
        state = create()
        if run.start.tuned is not None:
            log.add(run.log, dict(step=0, loss=None, heldout=_shown_levels(run, state), seconds=0.0))
        return jax.device_put(state, run.replicated)
    about = run.checkpoints.restore(latest, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    _check_same(run, about)
    described = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=run.replicated)
    target = ocp.args.StandardRestore(jax.tree.map(described, jax.eval_shape(create)))
    state = run.checkpoints.restore(latest, args=ocp.args.Composite(state=target))["state"]
    log.cut(run.log, latest)
    print(f"resumed from step {latest} in {run.out}")
    return state


def _check_same(run: _Run, about: dict[str, Any]) -> None:
    """That a checkpoint is of this training; an older version wrote fewer fields.

    Raises:
      ConfigError: naming what differs.
    """
    out, own = f"--out {run.settings.out}", run.identity
    same = UNet2DConfig.from_diffusers(about["config"]) == run.start.network
    need(same, f"{out} holds a run of another --config, --prior or --size; give another folder")
    weights = f"{out} holds a run that began with other weights; give another folder, or --prior as it was"
    need(about.get("prior", "") == own["prior"], weights)
    images = f"{out} holds a run on other images; give another folder, and --prior={run.settings.out} to go on from its weights"
    need(about.get("images", own["images"]) == own["images"], images)
    other = numerics.differences(about.get("settings", {}), own["settings"])
    need(not other, f"{out} was begun under other settings of JAX ({other}); set them as they were")


def _shown_levels(run: _Run, state: State) -> dict[int, float]:
    prior = run.prior(state["ema"])
    return eps_mse_by_level(prior.denoise, prior.schedule(), run.heldout[:200], SHOWN_LEVELS)


def _optimise(run: _Run, optimiser: optax.GradientTransformation, state: State, key: jax.Array) -> State:
    """The state after `settings.steps` steps in all, with a row of the log and a checkpoint every `save_every`."""
    settings = run.settings
    step = make_step(settings, run.start.network, optimiser, run.prior(state["ema"]).schedule())
    data = jax.device_put(run.images, run.replicated)
    first, started, pictured = int(state["step"]), time.monotonic(), -math.inf
    losses: list[jax.Array] = []
    with jax.set_mesh(run.mesh), tqdm(total=settings.steps, initial=first, unit="step", mininterval=5) as bar:
        for count in range(first + 1, settings.steps + 1):
            state, loss = step(state, data, key)
            if losses:
                losses[-1].block_until_ready()  # steps are asked for ahead: the bar would count those, not what is done
            losses.append(loss)
            bar.update()
            last = count == settings.steps
            if count % settings.save_every == 0 or last:
                mean = float(jnp.stack(losses).mean())
                losses.clear()
                if not np.isfinite(mean):
                    raise RunError(f"the loss is {mean} at step {count}; start again with a lower --learning_rate")
                levels = _shown_levels(run, state)
                bar.set_postfix(loss=f"{mean:.4f}", heldout=f"{np.mean(list(levels.values())):.4f}")
                log.add(run.log, dict(step=count, loss=mean, heldout=levels, seconds=round(time.monotonic() - started, 1)))
                started = time.monotonic()
                _save(run, count, state)
                if last or time.monotonic() - pictured >= SAMPLES_EVERY:
                    prior = run.prior(state["ema"], settings.dtype)
                    write_sheet(run.out / "samples.png", draw_samples(prior, SAMPLES, SAMPLES_STEPS))
                    pictured = time.monotonic()
    run.checkpoints.wait_until_finished()
    return state


def _save(run: _Run, count: int, state: State) -> None:
    """A checkpoint with what `load_prior` needs to know that it is whole, and `_check_same` that it is of this training."""
    about = {"ema_sha256": digest(state["ema"]), **run.identity}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    run.checkpoints.save(count, args=args)


def _export(run: _Run, ema: Params, command: str) -> Path:
    """Writes the moving average as a prior, with its card; the folder."""
    settings, folder, tuned = run.settings, run.out / "prior", run.start.tuned
    exported = dataclasses.replace(
        run.prior(jax.device_put(ema, jax.devices()[0])), mean_image=image_files.to_model(run.images.mean(0))
    )
    save_prior(folder, exported, run.start.scheduler)
    prior = dataclasses.replace(load_prior(folder), name=run.out.name)  # measured is what was written, float16 and all
    rows = log.read(run.log)
    hours = sum(row["seconds"] for row in rows) / 3600
    name, mirrored = settings.data_name or Path(settings.data).name, ", mirrored at random" * settings.flip
    facts = {
        "data": f"{name}, {len(run.images)} images{mirrored}",
        **({"command": f"`{command}`"} if command else {}),
        **({"tuned from": f"`{tuned.name}`, sha256 {tuned.sha256}"} if tuned else {}),
        "steps": f"{settings.steps} of {settings.batch} images, {hours:.1f} hours on {_devices()}, loss {rows[-1]['loss']:.4f}",
        "weights": f"moving average, float16, sha256 {prior.sha256}",
    }
    write_card(folder, prior, run.images, run.heldout, facts, tuned)
    return folder
