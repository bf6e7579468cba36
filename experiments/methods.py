"""The attacks of the sweep, by the names of --methods: each a function of one trial's task to (candidate, trace)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

import gdiff_jax as gd
from experiments.mechanism_specs import hides_a_mask
from gdiff_jax import attacks, samplers
from gdiff_jax.matching import Distance, l1
from gdiff_jax.samplers import StepInfo
from gdiff_jax.samplers.base import x0_error

if TYPE_CHECKING:
    from experiments.inputs import SweepConfig

DISTANCES: dict[str, Distance] = {"l2": gd.l2, "cosine": gd.cosine, "l1": l1}


class Task(NamedTuple):
    """What a method is given for one trial. `shape` is (H, W, C), or (B, H, W, C) for a leak of B images."""

    key: jax.Array
    denoise: Any
    schedule: gd.Schedule
    match: gd.GradientMatching  # with the distance of --distance
    strength: jax.Array  # the method's own number, see `Method.strength`
    sigma: jax.Array
    first_dense: tuple[Any, ...] | None  # of a victim that begins with a dense layer: kernel, bias, and see `_layer_input`
    num_classes: int
    shape: tuple[int, ...]
    clip: bool
    truth: jax.Array | None  # for the trace alone
    mean: jax.Array  # (H, W, C), of images like the private ones


@dataclasses.dataclass(frozen=True)
class Method:
    """An attack as the sweep runs it.

    Attributes:
      run: `run(task, c)`.
      strength: the number of the configuration that steers it, traced.
      colour: in plots.
      dense: needs a victim that begins with a dense layer, and a leak of one image.
      needs_noise: takes the distribution of the noise, which the attacker must know.
      calibrated: draws from the whole mechanism, and compares one gradient by l2.
    """

    run: Callable[[Task, SweepConfig], tuple[Any, StepInfo]]
    strength: Callable[[SweepConfig], float]
    colour: str
    dense: bool = False
    needs_noise: bool = False
    calibrated: bool = False


def _dsg(task: Task, c: SweepConfig, start: samplers.Start | None = None, signal: Any = None) -> tuple[Any, StepInfo]:
    options: dict[str, Any] = dict(
        guidance_rate=task.strength, interval=c.interval, clip=task.clip, truth=task.truth, start=start,
        through_prior=c.through_prior, signal=signal,
    )  # fmt: skip
    return gd.dsg_sample(task.key, task.denoise, task.match, task.schedule, task.shape, **options)


def _calibrated_dsg(task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    return _dsg(task, c, signal=gd.NoiseCalibration(task.match))


def _mean_of(chain: Callable[[Task, SweepConfig], tuple[Any, StepInfo]], task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    return samplers.mean_of_chains(task.key, lambda key: chain(task._replace(key=key), c), task.mean, c.chains)


def _dps(task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    options: dict[str, Any] = dict(zeta=task.strength, clip=task.clip, through_prior=c.through_prior, truth=task.truth)
    return gd.dps_sample(task.key, task.denoise, task.match, task.schedule, task.shape, **options)


def _red_diff(task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    options: dict[str, Any] = dict(weight=task.strength, truth=task.truth)
    return samplers.red_diff_sample(task.key, task.denoise, task.match, task.schedule, task.shape, **options)


def _dlg(task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    match = dataclasses.replace(task.match, distance=gd.squared_l2)
    options: dict[str, Any] = dict(steps=c.dlg_steps, restarts=c.restarts, truth=task.truth)
    if c.labels == "joint":
        joint = attacks.JointLabels(match)
        return attacks.dlg(task.key, joint, task.shape, label_shape=(*task.shape[:-3], task.num_classes), **options)
    return attacks.dlg(task.key, match, task.shape, **options)


def _inverting(task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    match = dataclasses.replace(task.match, distance=gd.cosine)
    options: dict[str, Any] = dict(steps=c.inverting_steps, tv=task.strength, restarts=c.restarts, truth=task.truth)
    return attacks.invert_gradients(task.key, match, task.shape, **options)


def _layer_input(task: Task) -> attacks.LayerInput:
    """What the leak says of the image; a network of the user's own may have made scale * x + shift of it, by channel."""
    assert task.first_dense is not None
    kernel, bias, *affine = task.first_dense
    found = attacks.dense_layer_input(task.match.leak[kernel], task.match.leak[bias])
    if not affine:
        return found._replace(x=found.x.reshape(task.shape))
    scale, shift = (jnp.asarray(a).reshape(1, 1, -1) for a in affine)
    return found._replace(x=(found.x.reshape(task.shape) - shift) / scale, std=found.std / jnp.abs(scale).min())


def _analytic(task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    x = _layer_input(task).x
    info = StepInfo(task.match(x), jnp.full((), jnp.nan), x0_error(jnp.clip(x, -1.0, 1.0), task.truth))
    return x, jax.tree.map(lambda a: jnp.asarray(a)[None], info)


def _analytic_dsg(task: Task, c: SweepConfig) -> tuple[Any, StepInfo]:
    found = _layer_input(task)
    k_start, k_sample = jax.random.split(task.key)
    start = samplers.start_from(k_start, task.schedule, found.x, task.sigma * found.std)
    return _dsg(task._replace(key=k_sample), c, start)


METHODS = {
    "dsg": Method(_dsg, lambda c: c.guidance_rate, "#0b6e99"),
    "calibrated-dsg": Method(_calibrated_dsg, lambda c: c.calibrated_rate, "#56b4e9", needs_noise=True, calibrated=True),
    "dsg-mean": Method(partial(_mean_of, _dsg), lambda c: c.guidance_rate, "#e69f00"),
    "calibrated-mean": Method(
        partial(_mean_of, _calibrated_dsg), lambda c: c.calibrated_rate, "#009e73", needs_noise=True, calibrated=True
    ),
    "dps": Method(_dps, lambda c: c.zeta, "#d1601f"),
    "red-diff": Method(_red_diff, lambda c: c.red_diff_weight, "#8c6d31"),
    "dlg": Method(_dlg, lambda c: 0.0, "#7b3294"),
    "inverting": Method(_inverting, lambda c: c.tv, "#2e8b57"),
    "analytic": Method(_analytic, lambda c: 0.0, "0.15", dense=True),
    "analytic-dsg": Method(_analytic_dsg, lambda c: c.guidance_rate, "#e377c2", dense=True, needs_noise=True),
}
DEFAULT = ("dsg", "dps")


def applies(method: str, victim: gd.Victim, images: int) -> bool:
    """Whether the method can be run against this victim and a leak of so many images."""
    return not METHODS[method].dense or (victim.first_dense is not None and images == 1)


def hindrances(method: str, c: SweepConfig) -> list[str]:
    """The flags of `c` under which the method cannot be run, for what it needs to know or to compare."""
    of = METHODS[method]
    unknown = f"--attacker={c.attacker}" if c.attacker == "eavesdropper" else "--noadaptive"
    masks = [f"--mechanisms={text}" for text in c.mechanisms if hides_a_mask(text)]
    flags = {
        unknown: of.needs_noise and not c.adaptive,
        f"--distance={c.distance}": of.calibrated and c.distance != "l2",
        f"--local_steps={c.local_steps}": of.calibrated and c.local_steps > 1,
        **dict.fromkeys(masks, of.calibrated),
    }
    return [flag for flag, given in flags.items() if given]
