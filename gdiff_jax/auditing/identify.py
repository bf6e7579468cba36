"""Measured against bound: how often a release names its record among K candidates, beside what gamma(1/K) allows.

The candidates are the private images and those they are looked for among, each with its label. Releases go through the
mechanism as the audit's trials do; scores are of gradients that are clipped here, apart from it. So a mechanism that forgets
its noise or its clipping gives away more than it says, and is found. Of Gaussian noise without clipping there is no bound, but
the same attacker is the best, and what is to be expected the same.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax import numerics
from gdiff_jax.auditing.about import GaussianRelease, release_at
from gdiff_jax.intervals import Interval, upper_quantile
from gdiff_jax.matching import at_full_precision, released
from gdiff_jax.sweeping import trials
from gdiff_jax.sweeping.plan import Plan
from gdiff_jax.theory import identification
from gdiff_jax.victims.label_range import check_label_range

COUNTS = (10, 100, 1000, 10_000)
REPETITIONS = 1000  # releases at each noise level
FEWEST = 100
DRAWS = 250_000  # of what is to be expected, at most; they cost no gradient. A share of 10 % is known to 1 % of its noise
AT_ONCE = 2**25  # numbers: gradients that are computed together
LARGEST = 2**28  # numbers: gradients that are held, 1 GiB
WORK = 1e11  # of all repetitions, by `_work`: half a minute on two cores; a large model gets fewer of them
LARGEST_GRAM = 2048  # candidates, of whose inner products what is to be expected is computed


def counts_for(pool: int) -> tuple[int, ...]:
    """The K that are asked of a pool of candidates: powers of ten, and all of them where those are twice as many or more."""
    powers = tuple(count for count in COUNTS if count <= pool)
    everything = min(pool, COUNTS[-1])
    return powers if powers and everything < 2 * powers[-1] else (*powers, everything)


def measured(plan: Plan, candidates: np.ndarray, labels: Any, share: float) -> dict[str, Any]:
    """How often the best attacker names the record, at each noise level and for each K, and the noise that is enough.

    Args:
      plan: of one victim and one mechanism.
      candidates: (N, H, W, C) in [-1, 1], beside the private images.
      labels: (N, ...) of the candidates, as those of the private ones are; None where they are not known, and none of them
        takes part.
      share: the noise is looked for from which on the record is named in fewer than this share of releases.

    Returns:
      "reason", where nothing was measured, and only that; else it is "", and there are "pool" (how many candidates), "notes"
      (sentences), "repetitions", "draws" of what is expected (0 where it was left out), "clip_norm" (None without clipping),
      "norm" and "nearest" (medians: norm of the gradients, clipped, and distance to the nearest other), "enough" ("count" of
      candidates, "share", and "sigma": the noise and the ends of its interval; None where it was not found), and "levels": by
      sigma, that noise among them, "epsilon" (None without clipping) and "counts", by K "hits" of the repetitions, "expected"
      of the draws (None where it was left out), "bound" (gamma) and "worst" (the most that any gradients are known to give
      away), both None without clipping.
    """
    (state,), (mechanism,) = plan.params, plan.mechanisms
    releases = {sigma: release_at(plan, sigma) for sigma in plan.sigmas[mechanism]}
    if reason := _reason(plan, releases):
        return {"reason": reason}
    # The mechanism's own sigma need not be the grid's.
    noise = {sigma: release.noise for sigma, release in releases.items() if release and release.noise > 0}
    norm, size = next(release.norm for release in releases.values() if release), plan.size(state.name)
    x, y, notes = _pool(plan, candidates, labels, LARGEST // size)
    group = trials.Group("", state.name, state.training_steps, mechanism)
    shared = trials.shared_arguments(plan, group)
    clean = _gradients(plan, group, shared, x, y, max(1, min(32, AT_ONCE // size)))
    finite = np.isfinite(clean).all(1)
    if not finite.all():
        notes.append(f"{(~finite).sum()} of them have no finite gradient, and are left out.")
        clean, x, y = clean[finite], x[finite], _take(y, finite)
    if len(x) < 2:
        return {"reason": "there is no second image with a label to take the private one for"}
    factor = np.minimum(1, norm / np.maximum(_norms(clean), 1e-30)).astype(np.float32)
    clipped = np.multiply(clean, factor[:, None], out=clean)
    counts, rng = counts_for(len(x)), np.random.default_rng(plan.seed)
    gram, critical, enough = _gram(clipped[:LARGEST_GRAM]), None, None
    if len(x) <= LARGEST_GRAM:
        critical = identification.critical_noise(rng, gram, counts, min(DRAWS, 2**25 // len(x)))
        if 1 / counts[-1] < share:
            enough = _enough(plan, critical[:, -1], share, noise)
        else:
            blind = f"A blind guess names one of {counts[-1]} in {1 / counts[-1]:.0%} of cases"
            notes.append(f"{blind}: no noise leaves fewer than {share:.0%}.")
    else:
        notes.append(f"What is to be expected is computed of at most {LARGEST_GRAM} candidates, and left out.")
    if enough and enough[0] > 0:  # released at as any level is: what was computed and what the mechanism does must agree
        noise[enough[0]] = release_at(plan, enough[0]).noise  # type: ignore[union-attr]  # it is one there too
    sigmas = sorted(noise)
    repetitions = int(np.clip(WORK // _work(size, len(sigmas), len(x)), FEWEST, REPETITIONS))
    order = identification.orders(rng, repetitions, len(x), counts[-1])
    together = max(1, min(32, AT_ONCE // (size * len(sigmas))))
    scores = _scores(plan, group, shared, x, y, order[:, 0], np.array(sigmas, np.float32), clipped, together)
    levels = []
    for sigma, of_level in zip(sigmas, scores, strict=True):
        hits = identification.identified(rng, of_level, order, counts).sum(0)
        expected = None if critical is None else (critical >= noise[sigma]).sum(0)
        guarantee = plan.guarantee(state.name, mechanism, sigma) if math.isfinite(norm) else None
        rows = [
            {
                "count": count,
                "hits": int(hits[j]),
                "expected": None if expected is None else int(expected[j]),
                "bound": guarantee and guarantee.reconstruction_bound(1 / count),
                "worst": guarantee and identification.simplex_success(count, norm / noise[sigma]),
            }
            for j, count in enumerate(counts)
        ]
        levels.append({"sigma": float(sigma), "epsilon": guarantee and guarantee.epsilon, "counts": rows})
    return {
        "reason": "", "pool": len(x), "notes": notes, "repetitions": repetitions,
        "draws": 0 if critical is None else len(critical), "clip_norm": norm if math.isfinite(norm) else None,
        "norm": float(np.median(_norms(clipped))), "nearest": _nearest(gram),
        "enough": enough and {"count": counts[-1], "share": share, "sigma": list(enough)}, "levels": levels,
    }  # fmt: skip


def _enough(plan: Plan, critical: np.ndarray, share: float, noise: dict[float, float]) -> Interval | None:
    """The sigma from which on fewer than the share of releases is named; None where a mechanism's own units do not tell it.

    Args:
      plan: see `measured`.
      critical: (draws,) of `identification.critical_noise`.
      share: above a blind guess's.
      noise: by sigma of the grid, what the mechanism makes of it.
    """
    found = upper_quantile(critical, share)
    unit = next((own / sigma for sigma, own in noise.items() if sigma > 0), None)
    if unit is None:
        return None
    sigma = found.value / unit
    release = release_at(plan, sigma) if math.isfinite(sigma) else None
    same = release is not None and math.isclose(release.noise, found.value, rel_tol=1e-5)
    return Interval(sigma, found.low / unit, found.high / unit) if same else None


def _work(size: int, levels: int, pool: int) -> float:
    """Of one repetition: noise for each coordinate costs as much as its part in the scores of 400 candidates [measured]."""
    return size * (levels * pool / 4 + 100)


def _reason(plan: Plan, releases: dict[float, GaussianRelease | None]) -> str:
    """Why nothing can be measured; "" where it can."""
    if not plan.images_known or plan.leak is not None:
        return "the gradient was made elsewhere, and is one release"
    if plan.client.group > 1:
        return f"a leak is of {plan.client.group} images, and the attacker would have to know the others"
    if None in releases.values():
        return "the mechanism is not Gaussian noise, clipped before or not, of which the best attacker is known"
    if len({release.norm for release in releases.values() if release}) > 1:
        return "the mechanism clips to another norm at each noise level"
    return "" if any(release and release.noise > 0 for release in releases.values()) else "no noise level has any noise"


def _pool(plan: Plan, candidates: np.ndarray, labels: Any, most: int) -> tuple[np.ndarray, Any, list[str]]:
    """Images and labels of the candidates, the private ones first, each once; and what is to be said of them."""
    x, y, notes = plan.images, plan.labels, []
    if labels is None:
        notes.append("Other images have no label here, so only the private ones are candidates.")
    else:
        known = {image.tobytes() for image in x}
        new = [i for i, image in enumerate(candidates) if image.tobytes() not in known]
        others, theirs = candidates[new], jax.tree.map(lambda own, a: np.asarray(a)[new].astype(own.dtype), y, labels)
        try:
            _check_labels(plan, y, theirs)
            x, y = np.concatenate([x, others]), jax.tree.map(lambda *a: np.concatenate(a), y, theirs)
        except ValueError as error:
            notes.append(f"Other images are no candidates: {error}.")
    if len(x) > most:
        notes.append(f"Of {len(x)} candidates the first {most} take part: the gradients of more do not fit in 1 GiB.")
    return x[:most], _take(y, slice(most)), notes


def _check_labels(plan: Plan, known: Any, others: Any) -> None:
    """ValueError where a label beyond those of the private images, which were checked, is none of the loss's classes."""
    (own, *_), (new, *_) = jax.tree.leaves(known), jax.tree.leaves(others)
    if len(new) and (new.max() > np.max(own) or new.min() < 0):
        (state,) = plan.params
        check_label_range(plan.victims[state.name].loss, plan.params[state], plan.images[0], others)


def _take(labels: Any, which: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a)[which], labels)


def _flat(gradient: Any) -> jax.Array:
    return jnp.concatenate([g.astype(jnp.float32).ravel() for g in jax.tree.leaves(gradient)])


def _blocks(count: int, size: int) -> list[np.ndarray]:
    """Indices in blocks of one size, for one compilation; the last one repeats its last."""
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


def _gradients(plan: Plan, group: trials.Group, shared: trials.Shared, x: np.ndarray, y: Any, size: int) -> np.ndarray:
    """(N, p): what a client computes of each candidate, before any mechanism."""
    loss = plan.victims[group.victim].loss
    one = lambda params, x, y: _flat(released(plan.local_sgd, loss, params, x, y))
    many = jax.jit(jax.vmap(one, (None, 0, 0)))
    parts = [many(shared.params, jnp.asarray(x[b]), jax.tree.map(jnp.asarray, _take(y, b))) for b in _blocks(len(x), size)]
    return np.concatenate([np.asarray(part) for part in parts])[: len(x)]


def _scores(
    plan: Plan, group: trials.Group, shared: trials.Shared, x: np.ndarray, y: Any, records: np.ndarray, sigmas: np.ndarray,
    clipped: np.ndarray, size: int,
) -> np.ndarray:  # fmt: skip
    """(levels, R, N): of a release of each record, at each noise level, the score of each candidate.

    The noise of a release is the same at every level, as it is in the audit's trials.
    """

    def leak(shared: trials.Shared, key: jax.Array, x: jax.Array, y: Any, sigma: jax.Array) -> jax.Array:
        own = trials.Private(key, sigma, x[None], jax.tree.map(lambda a: a[None], y))
        return _flat(trials.release(plan, group, shared, own, key).leak)

    @jax.jit
    @at_full_precision
    def many(shared: trials.Shared, columns: jax.Array, half: jax.Array, keys: jax.Array, x: jax.Array, y: Any) -> jax.Array:
        at_levels = jax.vmap(leak, (None, None, None, None, 0))  # one gradient, and one draw of noise, for all levels
        leaks = jax.vmap(at_levels, (None, 0, 0, 0, None))(shared, keys, x, y, jnp.asarray(sigmas))
        return leaks @ columns - half[None, None]

    base, half = jax.random.fold_in(numerics.key(plan.seed), 2**19), jnp.asarray(_norms(clipped) ** 2 / 2, jnp.float32)
    columns = jnp.asarray(np.ascontiguousarray(clipped.T))  # a product with rows takes three times as long on a CPU
    parts = []
    for block in _blocks(len(records), size):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(base, jnp.asarray(block))
        whose = records[block]
        parts.append(many(shared, columns, half, keys, jnp.asarray(x[whose]), jax.tree.map(jnp.asarray, _take(y, whose))))
    return np.concatenate([np.asarray(part) for part in parts])[: len(records)].swapaxes(0, 1)


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.array([np.vdot(row, row) for row in rows.astype(np.float64)]))


def _gram(rows: np.ndarray) -> np.ndarray:
    """Inner products in float64, a block of coordinates at a time."""
    total = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], 2**14):
        block = rows[:, start : start + 2**14].astype(np.float64)
        total += block @ block.T
    return total


def _nearest(gram: np.ndarray) -> float:
    """How far the nearest other gradient is, the median over gradients."""
    squares = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    np.fill_diagonal(squares, np.inf)
    return math.sqrt(max(0.0, float(np.median(squares.min(1)))))
