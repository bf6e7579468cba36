"""An audit in one call, of objects: a loss, its weights, images. The command does the same of names and files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gdiff_jax import images as image_files
from gdiff_jax import modules, numerics
from gdiff_jax.auditing import checks
from gdiff_jax.auditing.own_mechanism import code_of, digest, with_mechanism
from gdiff_jax.auditing.pick import Picked, pick
from gdiff_jax.auditing.result import Audit
from gdiff_jax.auditing.run import DEFAULT_METHODS, Question, run, with_analytic
from gdiff_jax.errors import need
from gdiff_jax.files import say
from gdiff_jax.matching import Loss
from gdiff_jax.mechanisms import GaussianNoise, Mechanism
from gdiff_jax.methods import DSG, Method
from gdiff_jax.metrics import candidate_count
from gdiff_jax.priors import Prior
from gdiff_jax.pytrees import at_least_float32
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.conditioning import check_classes
from gdiff_jax.sweeping.config import DEFAULT_SIGMAS, Client
from gdiff_jax.sweeping.inputs import prior_samples
from gdiff_jax.sweeping.plan import Plan, VictimState, first_leak
from gdiff_jax.sweeping.records import MemoryStore, Store
from gdiff_jax.sweeping.run import run_trials
from gdiff_jax.victims import Victim
from gdiff_jax.victims.checks import check_gradients, check_loss, of_one_image
from gdiff_jax.victims.label_range import check_label_range
from gdiff_jax.victims.own import (
    OwnVictim,
    check_call,
    check_repeats,
    checked_module,
    find_first_dense,
    fingerprint,
    module_victim,
    own_victim,
)
from gdiff_jax.victims.torch_model import TorchModel, as_model


def audit(
    loss: Loss | Victim | TorchModel,
    params: Any = None,
    images: Any = None,
    labels: Any = None,
    *,
    prior: str | os.PathLike[str] | Prior = "cifar10-32",
    sigma_grid: Sequence[float] = DEFAULT_SIGMAS,
    mechanism: Callable[[Any], Mechanism] = GaussianNoise,
    methods: Sequence[str | Method] = (),
    attacker: str | Attacker = "informed",
    client: Client = Client(),  # noqa: B008 - frozen
    seeds: int = 2,
    seed: int = 0,
    steps: int = 100,
    threshold: float = 20.0,
    share: float = 0.1,
    delta: float = 1e-5,
    more_levels: int = 0,
    candidates: Any = None,
    candidate_labels: Any = None,
    name: str = "the model",
    batch: int = 8,
    folder: str | Path | None = None,
    progress: bool = True,
    sigmas: Sequence[float] | None = None,
    more: tuple[Any, Any] | None = None,
    worst: int = 2,
) -> Audit:
    """How much of private images comes back from their gradients in a model, over noise levels.

    Trials run on every device that JAX has (`parallel.use_every_core` before JAX is used makes each core one).

    Args:
      loss: scalar `loss(params, x, y)` of one image x (H, W, C) in [-1, 1], pure, twice differentiable almost everywhere; of
        images (B, H, W, C) and labels (B, ...) where the client has several. One that takes such batches alone is called with
        a batch of one. Or a `Victim`, of which an attacker can also infer labels; or a `torch.nn.Module`, or a `TorchModel`
        of one, which has its params itself.
      params: the model's parameters, any pytree of floating arrays.
      images: private images (N, H, W, C) of the prior's shape, channels last; uint8, other integers in 0..255, or floating in
        [-1, 1]. Floats without one below 0 are refused, for they are nearly always [0, 1]. Ten or more for useful intervals.
      labels: (N, ...), whatever the loss takes for y: an array, a list of numbers, or a pytree of arrays. Classes count from 0;
        where the loss takes them as an index, those that it does not have are refused.
      prior: a name, folder or hub id for `load_prior`, or a `Prior`.
      sigma_grid: noise levels, the standard deviations that `mechanism` is made with, in units of the gradient.
      mechanism: what happens to the gradient at a level, such as `lambda s: Chain((Clip(1.0), GaussianNoise(s)))`.
      methods: attacks, by name or as objects of `gdiff_jax.methods`. Without, `auto`, and `analytic` and `analytic-dsg`
        where a first layer is dense.
      attacker: a threat model of `sweeping.attackers`, by name or with changes; "informed" is the worst case.
      client: how many images a leak is of, and how many local steps the client makes.
      seeds: leaks an image, each with noise of its own.
      seed: of all random numbers.
      steps: reverse steps.
      threshold: PSNR in dB from which on an image counts as recovered.
      share: the audit looks for the noise from which on fewer than this share of the images is recovered.
      delta: of every (epsilon, delta) that is told.
      more_levels: noise levels, so many at most, that are tried beside the grid, where what is recovered or recognised crosses
        the share. Each takes as long as one of the grid.
      candidates: images (K, H, W, C) among which the truth is looked for; the bundled CIFAR-10 test images where they fit,
        together with `images`, if None.
      candidate_labels: (K, ...) of `candidates`, as `labels` are: by them the candidates, and not the private images alone, are
        among those of which the best attacker names one.
      name: of the model, for the report.
      batch: trials at a time on all devices; each of "calibrated-mean", and of a search of "auto", takes the memory of four.
      folder: where the trials' records are kept; called again with the same arguments, an audit goes on from there. Of several
        processes each calls alike, with a folder that all see. None keeps nothing.
      progress: say what is done and show a bar.
      sigmas: another name of `sigma_grid`.
      more: images and labels beside those, which are not audited. Of all those `worst` that seem to leak most, told without an
        attack, are attacked besides, outside of all averages.
      worst: how many.

    Returns:
      An `Audit`: its repr is the verdict; `plot()`, `report(folder)`, `to_json()`.

    Raises:
      ValueError: for arguments that do not fit, before anything is computed.
    """
    # Arguments have the names of the flags.
    with checks.in_other_words(r"--(?=\w)", ""), numerics.without_debugging(partial(warnings.warn, stacklevel=4)):
        need(images is not None and labels is not None, "images and labels are needed: audit(model, images=..., labels=...)")
        prior = checks.prior_of(prior)
        x = checks.images_of("images", images, prior.image_shape)
        y = checks.labels_of(labels, len(x))
        others = _candidates(candidates, x)
        their_labels = None if candidate_labels is None else checks.candidate_labels_of(candidate_labels, candidates, y)
        sigmas = _one_grid(sigma_grid, sigmas)
        checks.check_numbers(sigmas, seed, threshold, share, delta, more_levels, seeds=seeds, steps=steps, batch=batch)
        need(steps <= len(prior.betas), f"steps {steps}: the prior was trained with {len(prior.betas)}; ask for fewer")
        attacker = checks.attacker_of(attacker)
        checks.check_client(client, len(x))
        chosen = checks.methods_of(methods or DEFAULT_METHODS, attacker, client)
        checks.check_knowledge(loss, attacker, client, chosen)
        beside = _beside(more, x, y)
        seen = _classes([y] if beside is None else [y, beside[1]])
        victim, weights = _victim(loss, params, x, y, seen, attacker, client)
        if their_labels is not None and client.group == 1:
            checks.check_class_range("candidate_labels", victim.loss, weights, x[0], their_labels)
        check_classes(prior, {name: victim}, y)
        for line in victim.said if progress and isinstance(victim, OwnVictim) else ():
            say(f"{name}: {line}")
        plan = Plan(
            prior=prior, schedule=prior.schedule(steps), images=x, labels=y, names=tuple(map(str, range(len(x)))),
            victims={name: victim}, params={VictimState(name, 0): weights}, mechanisms={}, sigmas={}, methods=chosen,
            attacker=attacker, client=client, proxy=prior.expected_image[None], delta=delta, seeds=seeds, seed=seed,
        )  # fmt: skip
        checks.check_fits(victim, client, chosen)
        plan = with_mechanism(plan, mechanism, sigmas)
        plan = plan if methods else with_analytic(plan)
        if victim.has_batch_norm and attacker.knowledge.statistics == "replaced":
            plan = dataclasses.replace(plan, proxy=prior_samples(plan))
        picked = _picked(plan, beside, worst, progress)
        store = (
            MemoryStore()
            if folder is None
            else Store(Path(folder).expanduser(), _identity(plan, mechanism, name, batch, picked))
        )
        about = {"command": "gdiff_jax.audit(...)", "images": f"{len(x)} images given"}
        attack = partial(run_trials, batch=batch, progress=progress)
        question = Question(
            others, threshold, share, candidate_labels=their_labels, more_levels=more_levels, picked=picked,
            film=dsg if isinstance(dsg := chosen.get("dsg"), DSG) else DSG(),
        )  # fmt: skip
        with contextlib.closing(store):  # a notebook that keeps a traceback keeps the store in it, and its lock
            return run(plan, question, store, attack, about)


def _one_grid(sigma_grid: Sequence[float] | float, sigmas: Sequence[float] | float | None) -> Sequence[float]:
    need(sigmas is None or sigma_grid is DEFAULT_SIGMAS, "sigma_grid and sigmas are two names of one argument; give one")
    grid: Any = sigma_grid if sigmas is None else sigmas
    need(not isinstance(grid, str), f"sigma_grid {grid!r} is a text; give numbers, such as (0.0, 0.1)")
    if not isinstance(grid, Iterable) or getattr(grid, "ndim", 1) == 0:
        return (grid,)
    return tuple(grid)  # of a generator too, which can be read once


def _victim(loss: Any, params: Any, x: np.ndarray, y: Any, seen: int, attacker: Attacker, client: Client) -> tuple[Any, Any]:
    """The victim, a `Victim` or an `OwnVictim`, and its weights as a flat dict, checked at the images."""
    victim: Any = loss
    params, first = at_least_float32(params), first_leak((x, y), client.group)
    if isinstance(loss, Victim):
        checks.check_classes(y, loss.num_classes, attacker.knowledge.labels != "known")
        check_loss(loss.loss, params, *first)
    else:
        victim, params = _own_victim(loss, params, first, y, seen, client)
    if client.group == 1 and not victim.has_batch_norm:
        check_gradients(victim.loss, params, x, y)
    if not isinstance(victim, Victim):
        victim = find_first_dense(victim, params, first[0].shape, first[1])
    return victim, params


def _own_victim(loss: Any, params: Any, first: tuple[Any, Any], y: Any, seen: int, client: Client) -> tuple[OwnVictim, Any]:
    """Of a loss with params, or of a torch module without, checked at the first leak's images and labels."""
    model = as_model(loss)
    if model is not None:
        need(params is None, "params go with a loss, a torch module has its own: leave them out, module.load_state_dict(...)")
        victim, params = module_victim(model, seen)
    else:
        check_call(loss)
        need(params is not None, "params are needed with a loss: the weights that its gradients are of")
        loss = of_one_image(loss, params, *first) if client.group == 1 else loss
        victim, params = own_victim(loss, params, seen)
    victim = dataclasses.replace(victim, classes_guessed=True)
    check_label_range(victim.loss, params, first[0], y)
    victim = checked_module(victim, first[0].shape, first[1])
    check_loss(victim.loss, params, *first)
    if model is None:  # of a module that was asked before
        check_repeats(victim.loss, params, *first)
    return victim, params


def _classes(labels: Sequence[Any]) -> int:
    """As far as integer labels tell, of all images."""
    leaves = [jax.tree.leaves(y) for y in labels]
    if not all(len(y) == 1 and y[0].dtype.kind in "iu" and y[0].min() >= 0 for y in leaves):
        return 0
    return max(int(y[0].max()) for y in leaves) + 1


def _identity(plan: Plan, mechanism: Any, name: str, batch: int, picked: Picked | None) -> dict[str, Any]:
    """What decides the records of a call, by value or by hash; a loss by its program."""
    (params,) = plan.params.values()
    arrays = hashlib.sha256(plan.images.tobytes())
    for leaf in jax.tree.leaves(plan.labels):
        arrays.update(np.ascontiguousarray(leaf).tobytes())
    return {
        "sigmas": plan.sigmas,
        "methods": {name: repr(method) for name, method in plan.methods.items()},
        "attacker": plan.attacker.attacker,
        **dataclasses.asdict(plan.attacker.knowledge),
        **dataclasses.asdict(plan.client),
        "seeds": plan.seeds,
        "seed": plan.seed,
        "steps": plan.schedule.num_steps,
        "batch": batch,  # which trials are in a chunk
        **({"picked": picked.hash} if picked and picked.places else {}),
        "sha256": {
            "prior": plan.prior.sha256 or modules.digest(plan.prior.denoise.params),
            "prior_settings": plan.prior.settings_sha256,
            "loss": fingerprint(plan.victims[name].loss, params, *first_leak((plan.images, plan.labels), plan.client.group)),
            "params": modules.digest(params),
            "mechanism": digest(mechanism, params),
            "methods": code_of(plan.methods.values()),
            "images and labels": arrays.hexdigest(),
        },
    }


def _beside(more: tuple[Any, Any] | None, images: np.ndarray, labels: Any) -> tuple[np.ndarray, Any] | None:
    """Images and labels beside the audited ones, which are of the same structure."""
    if more is None:
        return None
    need(len(more) == 2, f"more takes images and their labels, a pair; {len(more)} were given")
    x = checks.images_of("more", more[0], images.shape[1:])
    y = checks.labels_of(more[1], len(x))
    need(
        [a.shape[1:] for a in jax.tree.leaves(y)] == [a.shape[1:] for a in jax.tree.leaves(labels)],
        "more: its labels are of another structure than `labels`; give them alike",
    )
    return x, y


def _picked(plan: Plan, beside: tuple[np.ndarray, Any] | None, worst: int, progress: bool) -> Picked | None:
    """Of the audited images and those beside them the ones that seem to leak most."""
    need(worst >= 0, f"worst {worst} must not be negative; 0 leaves the images that leak most out")
    if beside is None:
        return None
    x, y = beside
    ((victim,), (weights,)) = plan.victims.values(), plan.params.values()
    if plan.client.group == 1:
        checks.check_class_range("more", victim.loss, weights, x[0], y)
    join = lambda a, b: np.concatenate([np.asarray(a), np.asarray(b)])
    names = tuple(map(str, range(len(plan.images) + len(x))))
    return pick(plan, join(plan.images, x), jax.tree.map(join, plan.labels, y), names, worst, progress)


def _candidates(candidates: Any, x: np.ndarray) -> np.ndarray:
    """Those that are given, or the private images themselves and the bundled ones where they are of this shape."""
    if candidates is not None:
        others = checks.images_of("candidates", candidates, x.shape[1:])
        need(candidate_count(others, x) > 1, "candidates hold nothing but the private images; give more images")
        return others
    bundled = image_files.to_model(image_files.load_images(image_files.BUNDLED).images)
    return np.concatenate([x, bundled]) if bundled.shape[1:] == x.shape[1:] else x
