"""From what an audit is asked, by name, to its plan and its question, with the weights and the gradient of the user's files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gdiff_jax import images as image_files
from gdiff_jax import modules
from gdiff_jax.auditing import sentences
from gdiff_jax.auditing.checks import in_other_words
from gdiff_jax.auditing.last_layer import read_label
from gdiff_jax.auditing.own_gradient import check_leak
from gdiff_jax.auditing.pick import MEASURED, Picked, pick
from gdiff_jax.auditing.result import Audit
from gdiff_jax.auditing.run import DEFAULT_METHODS, Question, audited, run, with_analytic
from gdiff_jax.auditing.settings import Asked, AuditConfig, Model
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import say
from gdiff_jax.methods import DSG
from gdiff_jax.metrics import candidate_count
from gdiff_jax.options import replace
from gdiff_jax.sweeping import checks, inputs, processes
from gdiff_jax.sweeping.config import Client, Run, SweepConfig
from gdiff_jax.sweeping.plan import Plan, first_leak
from gdiff_jax.sweeping.records import Row, Store
from gdiff_jax.sweeping.run import run_trials
from gdiff_jax.theory.summary import LARGEST_GRAM, prior_information
from gdiff_jax.victims import saved_trees
from gdiff_jax.victims.checks import check_gradients
from gdiff_jax.victims.left_aside import not_loaded
from gdiff_jax.victims.own import OwnVictim, is_own, module_victim
from gdiff_jax.victims.reached import reached
from gdiff_jax.victims.torch_model import TorchModel
from gdiff_jax.victims.uses import uses


def audit_named(config: AuditConfig) -> Audit:
    """The audit of what is named; the attacks' records stay in OUT/sweep, and a later call goes on from there.

    Raises:
      ConfigError: with the value and the remedy, before anything is computed.
    """
    with in_other_words(r"--(victim|mechanism)s\b", r"--\1"):  # a sweep may have several
        config = config.completed()
        config.check()
        sweep = _with_methods(config)
        plan, left_aside = _load_plan(config, sweep)
        question = dataclasses.replace(load_question(config.asked, sweep, plan), film=DSG(config.attacks.guidance_rate))
        _check_gradients(plan)
        doubt = check_leak(config.model.gradient, plan, config.model.update) if config.model.gradient else ""
        if not config.attacks.methods:
            plan = with_analytic(plan)
        question = dataclasses.replace(question, picked=_picked(config.asked.worst, sweep, plan))
        all_attacked = question.all_attacked(plan)
        store = Store(Path(sweep.run.out), all_attacked.identity, plan.reading)
        with contextlib.closing(store):
            about = {**_about(config, sweep, plan), "doubt": f"{left_aside} {doubt}".strip()}
            return run(plan, question, store, partial(_attack, config.run), about, partial(_show, Path(config.run.out)))


def _show(folder: Path, audit: Audit) -> None:
    """Of an audit that is not finished: the page, which can be opened, and how much comes back."""
    page = audit.report(folder)
    much = " ".join(sentences.decision(audit)[:3])
    tqdm.write(f"\nso far ({len(audit.attacks)} attacks): {much}\n{page}\n")


def _attack(options: Run, plan: Plan, store: Store, **calls: Any) -> list[Row]:
    rows = run_trials(plan, store, options.batch, options.memory_gib, **calls)
    print("theory, film and report ...")
    return rows


def _with_methods(config: AuditConfig) -> SweepConfig:
    """The sweep, with the methods that an audit runs unless some are named."""
    sweep = config.sweep()
    config.attacker.check()
    if config.attacks.methods:
        return checks.write_out_all(sweep, inputs.parse_mechanisms(sweep.mechanisms))
    return replace(sweep, methods=DEFAULT_METHODS)


def _load_plan(config: AuditConfig, sweep: SweepConfig) -> tuple[Plan, str]:
    """And what must be said of what the weights' file holds beside them; "" if nothing."""
    try:
        orders = saved_trees.parse_orders(config.model.flattened)
    except ValueError as error:
        raise ConfigError(f"--flattened: {error}") from None
    left_aside = ""
    plan = inputs.load(sweep, config.images_known, partial(_with_state_dict, config.model, orders))
    if config.model.weights and _model_of(plan.victims[audited(plan)[0].name]) is None:
        plan, left_aside = _with_weights(plan, config.model, orders)
    if config.model.gradient:
        plan = _with_gradient(plan, config, orders)
    return plan, left_aside


def _check_gradients(plan: Plan) -> None:
    """That each private image has a gradient; compiles the loss, so it comes last of the checks."""
    state, _ = audited(plan)
    victim = plan.victims[state.name]
    if plan.images_known and plan.client.group == 1 and not victim.has_batch_norm:
        try:
            check_gradients(victim.loss, plan.params[state], plan.images, plan.labels)
        except ValueError as error:
            raise ConfigError(f"victim {state.name}: {error}") from None


def _fit(
    flag: str, path: str, plan: Plan, orders: saved_trees.Orders, weights: bool, beside: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The arrays of a file, shaped as the victim's weights; whether they are weights, and not what an optimiser keeps.

    To `beside` go the file's other arrays.
    """
    state, _ = audited(plan)
    params, victim = plan.params[state], plan.victims[state.name]
    first = first_leak((plan.images, plan.labels), plan.client.group)
    asked: Any = (victim.loss, params, *jax.tree.map(jnp.asarray, first))
    used, with_one = partial(uses, *asked), partial(reached, *asked)
    try:
        if (model := _model_of(victim)) is not None:
            from gdiff_jax.victims import torch_files  # of the extra `torch`, which a module needs

            of_module = torch_files.files_of(model.module)
        else:
            of_module = None
        tree = saved_trees.fit(
            path, params, orders, used, reached=with_one, beside=beside.update, weights=weights, module=of_module
        )
    except ValueError as error:
        raise ConfigError(f"--{flag}: {error}") from None
    return {name: jnp.asarray(value) for name, value in tree.items()}


def _model_of(victim: Any) -> TorchModel | None:
    """The torch module that a victim is, if it is one."""
    return victim.module if isinstance(victim, OwnVictim) else None


def _with_hash(plan: Plan, **hashes: Any) -> dict[str, Any]:
    return {**plan.identity, "sha256": {**plan.identity["sha256"], **hashes}}


def _with_weights(plan: Plan, model: Model, orders: saved_trees.Orders) -> tuple[Plan, str]:
    """And what must be said of what the file holds beside them."""
    state, _ = audited(plan)
    beside = dict[str, np.ndarray]()
    params = _fit("weights", model.weights, plan, orders, True, beside)
    digest, trained = modules.digest(params), plan.identity["sha256"]["trained_victims"]
    # In place of those that the function made, at random perhaps.
    hashes = {name: digest if name == f"{state.name}/{state.training_steps}" else value for name, value in trained.items()}
    identity = _with_hash(plan, weights=digest, trained_victims=hashes)
    plan = dataclasses.replace(plan, params={state: params}, identity=identity)
    victim = plan.victims[state.name]
    if not is_own(state.name):
        return plan, ""
    first = first_leak((plan.images, plan.labels), plan.client.group)
    if plan.images_known:
        inputs.check_own_loss(state.name, victim, params, *first)  # type: ignore[arg-type]
    left_aside = not_loaded(model.weights, beside, victim.loss, params, *jax.tree.map(jnp.asarray, first))
    if left_aside:
        say(f"--weights: {left_aside}")
    return plan, left_aside


def _with_state_dict(model: Model, orders: saved_trees.Orders, victim: OwnVictim, params: Any) -> tuple[OwnVictim, Any]:
    """Of a torch module, before anything is asked of it: its buffers are weights too, and its loss another one with others."""
    if not model.weights or victim.module is None:
        return victim, params
    from gdiff_jax.victims import torch_files  # of the extra `torch`, which a module needs

    need(not orders, f"--flattened {next(iter(orders), '')}: a torch module's files have its own order; leave it away")
    try:
        return module_victim(torch_files.with_weights(victim.module, model.weights), victim.num_classes)
    except ValueError as error:
        raise ConfigError(f"--weights: {error}") from None


def _with_gradient(plan: Plan, config: AuditConfig, orders: saved_trees.Orders) -> Plan:
    state, _ = audited(plan)
    leak = _fit("gradient", config.model.gradient, plan, orders, config.model.update, {})
    path = config.model.gradient
    if config.model.update:
        leak = _of_update(plan.params[state], leak, config.client)
    need(any(np.any(value) for value in leak.values()), f"--gradient {path} is zero everywhere: there is nothing to attack")
    known, normed = config.images_known, plan.victims[state.name].has_batch_norm
    need(
        known or not normed or plan.attacker.knowledge.statistics != "known",
        f"--gradient of {state.name} without --images: its BatchNorms' statistics are not known; --attacker=server",
    )
    plan = dataclasses.replace(plan, leak=leak, identity=_with_hash(plan, gradient=modules.digest(leak), truth=known))
    if not config.reads_label:
        return plan
    return dataclasses.replace(plan, labels=np.full(len(plan.images), read_label(plan), np.int32))


def _of_update(before: dict[str, Any], after: dict[str, Any], client: Client) -> dict[str, Any]:
    """The mean gradient on the way of a client's local steps, as `LocalSGD` releases it, of the weights at both ends."""
    scale = client.local_learning_rate * client.local_steps
    wide = lambda a: np.asarray(a, np.float64)
    return {name: jnp.asarray((wide(before[name]) - wide(after[name])) / scale, jnp.float32) for name in before}


def load_question(asked: Asked, sweep: SweepConfig, plan: Plan) -> Question:
    """What is asked, with its images."""
    shape, prior, source = plan.prior.image_shape, sweep.prior.prior, asked.candidates or sweep.private.images
    others, labels = np.zeros((0, *shape), np.float32), None
    if plan.images_known:
        read = inputs.read_images("candidates", source, "test", prior, shape)
        if asked.candidates:  # else they are those of --images, of which it was told
            inputs.tell(source, dataclasses.replace(read, classes=()))
        others, labels = image_files.to_model(read.images), _labels_of(read, asked, sweep, plan)
        more = candidate_count(others, plan.images) >= 2
        need(more or not asked.candidates, f"--candidates {source} holds nothing but the private images; give more images")
        if not more:
            say(f"{source} holds one image: whether it is recognised among others is left out; --candidates names others")
    information = None
    if asked.data:
        size = math.prod(shape)
        need(size <= LARGEST_GRAM, f"--data: images of {size} numbers are too large for the van Trees limit; leave it away")
        alike = inputs.read_images("data", asked.data, "train", prior, shape)
        inputs.tell(asked.data, dataclasses.replace(alike, classes=()))
        information = prior_information(alike.images)
    return Question(others, asked.threshold, asked.share, asked.spectra, information, labels, asked.more_levels)


def _picked(count: int, sweep: SweepConfig, plan: Plan) -> Picked | None:
    """Of all of --images those that seem to leak most, as far as they have labels that count."""
    private, prior = sweep.private, sweep.prior.prior
    if count < 1 or not plan.images_known or plan.leak is not None:
        return None
    read = inputs.read_images("images", private.images, "test", prior, plan.prior.image_shape, MEASURED)
    labels = np.zeros(len(read), np.int32) if read.labels is None else read.labels
    labels = np.full(len(read), private.label, np.int32) if private.label >= 0 else labels
    counted = np.flatnonzero((labels >= 0) & (labels < private.num_classes))
    read = dataclasses.replace(read, labels=labels).take(counted)
    return pick(plan, image_files.to_model(read.images), read.labels, read.names, count, processes.is_first())


def _labels_of(candidates: image_files.ImageSet, asked: Asked, sweep: SweepConfig, plan: Plan) -> np.ndarray | None:
    """As the private images have theirs; None where nothing says them, or another folder's classes count otherwise."""
    if sweep.private.label >= 0:
        return np.full(len(candidates), sweep.private.label, np.int32)
    if not asked.candidates:
        return np.zeros(len(candidates), np.int32) if candidates.labels is None else candidates.labels
    alike = {name: label for label, name in enumerate(candidates.classes)} == plan.reading.get("classes", {})
    return candidates.labels if alike else None


def _about(config: AuditConfig, sweep: SweepConfig, plan: Plan) -> dict[str, Any]:
    """What the report says of the question as it was asked."""
    model = config.model
    trained = f" after {model.training_steps} training steps" if model.training_steps else ""
    untrained = not (trained or model.weights or is_own(model.victim))
    return {
        "victim": f"{os.path.basename(model.victim)}{trained}" + (" (untrained)" if untrained else ""),
        "victim_given": model.victim,
        "weights": model.weights,
        "gradient": model.gradient,
        "images": sweep.private.images if plan.images_known else "not known",
        **{f"images_{name}": value for name, value in plan.reading.items()},
        "assumed": config.assumed,
        "candidates_from": config.asked.candidates or sweep.private.images,
        "hashes": {name: value for name, value in plan.identity["sha256"].items() if value},
    }
