"""An audit of a plan: the engine's trials, what theory says and is guaranteed beside them, one answer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import numerics
from gdiff_jax.auditing.about import about_run, clip_norm, guarantee_row
from gdiff_jax.auditing.assemble import Trials, assemble
from gdiff_jax.auditing.between import next_level
from gdiff_jax.auditing.film import film, film_steps
from gdiff_jax.auditing.identify import measured
from gdiff_jax.auditing.pick import Picked
from gdiff_jax.auditing.result import Audit
from gdiff_jax.methods import DSG, Analytic, AnalyticDSG, Problem
from gdiff_jax.metrics import candidate_count, distinct_images
from gdiff_jax.sweeping import trials, words
from gdiff_jax.sweeping.checks import hindrances
from gdiff_jax.sweeping.plan import PRIOR_ONLY, Plan, VictimState
from gdiff_jax.sweeping.records import MemoryStore, Row, Store
from gdiff_jax.theory.summary import summarise
from gdiff_jax.victims.own import OwnVictim

PAUSE = 60.0  # seconds at least, between what is shown of an audit that is not finished
BLIND_GUESS = 1e-4  # probability of a blind guess's success, where no candidates say it


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked beside the attacks.

    Attributes:
      candidates: (K, H, W, C) images among which the private ones are looked for, of equal ones the first; none where the
        private are not known.
      threshold: PSNR in dB from which on an image counts as recovered.
      share: look for the noise from which on fewer than this share of the images is recovered.
      spectra: images whose spectrum of J^T J is computed.
      information: (d, d) inverse covariance of images like the private ones, for the van Trees limit; None leaves it out.
      candidate_labels: (K, ...) of the candidates, as the private images' labels are; None where they are not known.
      more_levels: noise levels, so many at most, that are tried beside the plan's, see `between.next_level`.
      picked: images that are attacked besides because they seem to leak much; None for none.
      film: the DSG by which one reconstruction is made again, to be looked at while it comes into being.
    """

    candidates: np.ndarray
    threshold: float = 20.0
    share: float = 0.1
    spectra: int = 1
    information: np.ndarray | None = None
    candidate_labels: Any = None
    more_levels: int = 0
    picked: Picked | None = None
    film: DSG = DSG()

    def all_attacked(self, plan: Plan) -> Plan:
        """The plan of an audit, with the images that were picked after its own."""
        return plan if self.picked is None else self.picked.beside(plan)

    def __post_init__(self) -> None:
        # One that is there twice is as easily named as one: counted twice, a blind guess would look worse than it is.
        kept = distinct_images(self.candidates)
        object.__setattr__(self, "candidates", self.candidates[kept])
        if self.candidate_labels is not None:
            object.__setattr__(self, "candidate_labels", jax.tree.map(lambda a: a[kept], self.candidate_labels))


def audited(plan: Plan) -> tuple[VictimState, str]:
    """The one victim and the one mechanism of an audit's plan."""
    (state,), (mechanism,) = plan.params, plan.mechanisms
    return state, mechanism


DEFAULT_METHODS = ("auto",)


def with_analytic(plan: Plan) -> Plan:
    """`plan` with the analytic attacks where a first layer is dense: what an audit runs too unless methods are named."""
    state, _ = audited(plan)
    fitting = [m for m in (Analytic(), AnalyticDSG()) if m.fits(plan.victims[state.name].first_dense, plan.client.group)]
    methods = {**plan.methods, **{m.name: m for m in fitting if not hindrances(m, plan.attacker, plan.client)}}
    return dataclasses.replace(plan, methods=methods, identity={**plan.identity, "methods": list(methods)})


def run(
    plan: Plan,
    question: Question,
    store: Store | MemoryStore,
    attack: Callable[..., list[Row]],
    about: dict[str, Any],
    show: Callable[[Audit], None] | None = None,
) -> Audit:
    """Attacks, measures, and says what came of it.

    Args:
      plan: of one victim in one state, and one mechanism.
      question: what is asked.
      store: of the trials' records.
      attack: rows of all trials of a plan into a store, such as `sweeping.run.run_trials` with its options bound.
      about: what the report says of the question beside what the plan does, such as the victim's name.
      show: what is done meanwhile with the audit of what has finished, as soon as an attack has and then from time to time. It
        holds neither theory nor film, and its `warnings()` say that more is to come.
    """
    started = time.time()
    seconds = lambda: {"seconds": round(time.time() - started, 1)}
    of_rows = lambda rows: _assemble(plan, question, store, rows, {**about, **seconds(), "unfinished": True}, None, [], None)
    early = lambda done: of_rows(store.rows(done))
    more = partial(_more, plan, question.more_levels, of_rows) if plan.images_known and question.more_levels else None
    attacked = question.all_attacked(plan)
    rows = attack(attacked, store, after=_now_and_then(early, show) if show else None, more=more)
    plan = dataclasses.replace(plan, sigmas={audited(plan)[1]: _levels(rows)})
    theory, frames, identification = None, [], None
    failed: list[str] = []
    with _told(failed, "theory"):
        theory = _theory(plan, question)
    with _told(failed, "the film"):
        frames = _film(plan, question.film)
    with _told(failed, "identification"):
        identification = measured(plan, question.candidates, question.candidate_labels, question.share)
    parts = {"failed_parts": failed} if failed else {}
    return _assemble(plan, question, store, rows, {**about, **parts, **seconds()}, theory, frames, identification)


def _now_and_then(early: Callable[[list[int]], Audit], show: Callable[[Audit], None]) -> Callable[[list[int]], None]:
    """Shows what has finished when there is a first attack, and again when ten times as long as showing takes has passed."""
    due = 0.0

    def after(done: list[int]) -> None:
        nonlocal due
        started = time.time()
        if started < due:
            return
        failed: list[str] = []
        with _told(failed, "what is shown meanwhile"):  # a page that fails now may be written at the end
            audit = early(done)
            if not audit.attacks:
                return
            show(audit)
        due = time.time() + max(PAUSE, 10 * (time.time() - started)) if not failed else math.inf

    return after


def _assemble(
    plan: Plan,
    question: Question,
    store: Store | MemoryStore,
    rows: list[Row],
    about: dict[str, Any],
    theory: dict[str, Any] | None,
    frames: list[np.ndarray],
    identification: dict[str, Any] | None,
) -> Audit:
    """The audit of these rows: of all that were asked for, or of those that have finished."""
    state, mechanism = audited(plan)
    known = plan.images_known
    count = candidate_count(question.candidates, plan.images) if known else 0
    kappa = 1 / count if count > 1 else BLIND_GUESS
    own, beside = ([r for r in rows if (r["image"] < len(plan.images)) == is_own] for is_own in (True, False))
    picked = None if question.picked is None else (question.picked, gather(beside, store))
    guarantees = [guarantee_row(s, plan.guarantee(state.name, mechanism, s), kappa) for s in _levels(own)]
    return assemble(
        {**_about(plan, question), "num_images": len({row["image"] for row in own}), **about}, gather(own, store),
        plan.images if known else None, candidates=question.candidates, mean_image=plan.prior.mean_image, guarantees=guarantees,
        theory=theory, film=frames, identification=identification, picked=picked,
    )  # fmt: skip


def _levels(rows: list[Row]) -> tuple[float, ...]:
    """Noise levels that were attacked, ascending."""
    return tuple(sorted({row["sigma"] for row in rows if row["method"] != PRIOR_ONLY}))


def _more(plan: Plan, most: int, of_rows: Callable[[list[Row]], Audit], rows: list[Row]) -> dict[str, tuple[float, ...]]:
    """For the engine: the level to try beside those of the rows; {} where there is none, or enough were tried."""
    _, mechanism = audited(plan)
    if len(_levels(rows)) - len(plan.sigmas[mechanism]) >= most:
        return {}
    sigma = next_level(of_rows(rows))
    return {} if sigma is None else {mechanism: (sigma,)}


@contextlib.contextmanager
def _told(failed: list[str], part: str) -> Iterator[None]:
    """A part of the report that fails is told on it: the attacks, hours of work, are there."""
    try:
        yield
    except Exception as error:  # of the user's loss, of XLA, for want of memory
        failed.append(f"{part} ({type(error).__name__}: {' '.join(str(error).split())[:300]})")


def gather(rows: list[Row], store: Store | MemoryStore) -> Trials:
    """The engine's rows as an audit's, with the image, the trace and the deviations of each."""
    arrays_of = cache(store.arrays)
    kept, images, traces, deviations = [], [], [], []
    for row in rows:
        arrays = arrays_of(row["chunk"])
        per_leak = len(arrays["images"]) // len(arrays["trace_distance"])
        kept.append({**row, "leak": row["image"] - row["row"] % per_leak})
        images.append(arrays["images"][row["row"]])
        names = [name for name in ("distance", "x0_error", "signal") if f"trace_{name}" in arrays]
        traces.append({name: arrays[f"trace_{name}"][row["trial"]] for name in names})
        deviations.append(arrays["deviations"][row["row"]] if "expected_psnr" in row else None)
    return Trials(kept, images, traces, deviations)


def _theory(plan: Plan, question: Question) -> dict[str, Any] | None:
    """None where theory does not speak of the case: of batches and updates, and where nothing is known of the image."""
    state, mechanism = audited(plan)
    victim = plan.victims[state.name]
    if plan.client.group > 1 or plan.client.local_steps > 1 or not plan.images_known or victim.has_batch_norm:
        return None
    key = jax.random.fold_in(numerics.key(plan.seed), 2**18)
    return summarise(
        key, victim.loss, plan.params[state], plan.images, plan.labels, plan.sigmas[mechanism],
        spectra=question.spectra, information=question.information,
    )  # fmt: skip


def _film(plan: Plan, dsg: DSG) -> list[np.ndarray]:
    """Of the first trial at the smallest noise; [] for groups of images."""
    if plan.client.group > 1:
        return []
    state, mechanism = audited(plan)
    group = trials.Group("dsg", state.name, state.training_steps, mechanism)
    own = trials.own_arguments(plan, [trials.Trial(group, plan.sigmas[mechanism][0], 0, 0)])
    # On a device by name, wherever the prior's file was read from: what is compiled serves a later run too.
    shared = jax.device_put(trials.shared_arguments(plan, group), jax.local_devices()[0])

    @jax.jit
    def leaked(shared: trials.Shared, own: trials.Private) -> tuple[jax.Array, Problem]:
        key, _, _, problem = trials.leaked(plan, group, shared, own)
        return key, problem

    key, problem = leaked(shared, jax.tree.map(lambda a: jnp.asarray(a)[0], own))
    return film(key, problem, dsg.guidance_rate)


def _about(plan: Plan, question: Question) -> dict[str, Any]:
    state, mechanism = audited(plan)
    victim = plan.victims[state.name]
    said = victim.said if isinstance(victim, OwnVictim) else ()
    return {
        **about_run(plan.prior),
        **({"module": list(said)} if said else {}),
        "victim": state.name,
        "parameters": int(plan.size(state.name)),
        "group": plan.client.group,
        "seeds": plan.seeds,
        "seed": plan.seed,
        "steps": plan.schedule.num_steps,
        "methods": list(plan.methods),
        "attacks": words.settings(plan),
        "mechanism": mechanism,
        "clip_norm": clip_norm(plan),
        "threat_model": words.threat_model(plan),
        "threshold": question.threshold,
        "share": question.share,
        "delta": plan.delta,
        "film_steps": film_steps(plan.schedule),
    }
