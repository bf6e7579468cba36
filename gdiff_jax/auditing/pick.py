"""Which images of a larger set seem to leak most, told without an attack. They are attacked besides, and are in no average."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gdiff_jax import numerics, parallel
from gdiff_jax.auditing.summary import EXACT
from gdiff_jax.metrics import distinct_images
from gdiff_jax.modules import digest
from gdiff_jax.sweeping.conditioning import told
from gdiff_jax.sweeping.plan import Plan
from gdiff_jax.theory.expected import PROBES, STEPS, expected_psnr
from gdiff_jax.theory.jacobian import gram_vector

MEASURED = 256  # images, the first of a set
WORK = 5e11  # floating-point operations of all of them together: 20 seconds on two cores; of a large model fewer are measured


@dataclasses.dataclass(frozen=True)
class Picked:
    """Images to be attacked beside those audited.

    Attributes:
      images: (K, H, W, C) in [-1, 1], labels: (K, ...), names: of them.
      expected: (N, S) PSNR in dB of each image that was measured, those audited first, at each noise level.
      places: (K,) of the picked ones among the measured.
      total: images there were.
    """

    images: np.ndarray
    labels: Any
    names: tuple[str, ...]
    expected: np.ndarray
    places: tuple[int, ...]
    total: int

    def beside(self, plan: Plan) -> Plan:
        """The plan with these images after its own."""
        if not self.places:
            return plan
        join = lambda a, b: np.concatenate([np.asarray(a), np.asarray(b)])
        identity = {**plan.identity, "picked": self.hash}
        return dataclasses.replace(
            plan, images=join(plan.images, self.images), labels=jax.tree.map(join, plan.labels, self.labels),
            names=(*plan.names, *self.names), identity=identity,
        )  # fmt: skip

    @property
    def hash(self) -> str:
        """Of the images and their labels."""
        labels = {str(k): np.asarray(leaf) for k, leaf in enumerate(jax.tree.leaves(self.labels))}
        return digest({"images": self.images, **labels})

    @property
    def told(self) -> dict[str, Any]:
        """For `AuditRecord.worst`: "measured" of "total" images, "expected" PSNR of each at each noise level, and "places"."""
        measured = len(self.expected)
        return {
            "measured": measured, "total": self.total, "expected": np.round(self.expected, 2).tolist(),
            "places": list(self.places),
        }  # fmt: skip


def pick(
    plan: Plan, images: np.ndarray, labels: Any, names: tuple[str, ...], count: int, progress: bool = True
) -> Picked | None:
    """Those of the `count` images that seem to leak most that are not audited anyway; None where that cannot be told.

    Of batches, of several local steps, of a gradient from elsewhere and of BatchNorm's statistics the derivative of one image's
    gradient does not tell it, and of a very large model it takes too long.

    Args:
      plan: of one victim and one mechanism.
      images: (N, H, W, C) in [-1, 1], the audited ones first.
      labels: (N, ...) of them.
      names: of them.
      count: how many of the images are wanted.
      progress: show a bar.
    """
    (state,) = plan.params
    known = plan.images_known and plan.leak is None and not plan.victims[state.name].has_batch_norm
    if not known or plan.client.group > 1 or plan.client.local_steps > 1 or count < 1 or len(images) <= len(plan.images):
        return None
    # One that is there twice leaks as much as itself, and is no other image.
    kept = [*range(len(plan.images)), *[int(i) for i in distinct_images(images) if i >= len(plan.images)]]
    images, labels = images[kept], jax.tree.map(lambda a: np.asarray(a)[kept], labels)
    names = tuple(names[i] for i in kept)
    measured = expectations(plan, images, labels, progress)
    if len(measured) <= len(plan.images):
        return None
    score = np.minimum(np.nan_to_num(measured, nan=-np.inf), EXACT).mean(1).round(2)  # rounded: it is to be the same again
    first = [int(i) for i in np.argsort(-score, kind="stable")[:count] if np.isfinite(score[i])]
    places = tuple(i for i in first if i >= len(plan.images))
    take = lambda a: np.asarray(a)[list(places)]
    return Picked(take(images), jax.tree.map(take, labels), tuple(names[i] for i in places), measured, places, len(images))


def expectations(plan: Plan, images: np.ndarray, labels: Any, progress: bool) -> np.ndarray:
    """(N, S) PSNR that may be expected of the first so many images, at each noise level of the plan."""
    ((state, params),), ((text, mechanism),) = plan.params.items(), plan.mechanisms.items()
    loss, prior, sigmas = plan.victims[state.name].loss, plan.prior, np.array(plan.sigmas[text], np.float32)
    mesh = parallel.trial_mesh()
    count = min(len(images), MEASURED, int(WORK / _work(loss, params, images[0], labels)))
    if count <= len(plan.images):
        return np.zeros((0, len(sigmas)))

    def expected(common: Any, own: Any) -> jax.Array:
        (params, denoise, schedule, mean), (x, y) = common, own
        denoise = told(denoise, y, plan.victims[state.name], several=False)
        key = jax.random.fold_in(numerics.key(plan.seed), 2**19)  # of all images the same, so that they compare
        return expected_psnr(
            key, loss, params, x, y, sigmas, denoise, schedule, mean, clip_norm=mechanism.clip_norm, clip=prior.clip
        )

    common = parallel.replicate((params, prior.denoise, plan.schedule, jnp.asarray(prior.expected_image)), mesh)
    program, found = jax.jit(parallel.map_trials(expected, mesh)), []
    steps = range(0, count, mesh.size)
    for start in tqdm(steps, "which images leak most", unit="image", unit_scale=mesh.size, disable=not progress):
        index = np.minimum(np.arange(start, start + mesh.size), count - 1)  # the last one again, to fill the devices
        own = jax.tree.map(lambda a, index=index: jnp.asarray(np.asarray(a)[index]), (images, labels))
        found.append(jax.device_get(program(common, parallel.divide(own, mesh))))
    return np.concatenate(found)[:count].astype(np.float64)


def _work(loss: Any, params: Any, x: np.ndarray, labels: Any) -> float:
    """Floating-point operations of one image's measure, by XLA's own count of one product; of none that it does not know."""
    y = jax.tree.map(lambda a: jnp.asarray(a)[0], labels)
    product = jax.jit(lambda params, x, y: gram_vector(loss, params, x, y, x)).lower(params, jnp.asarray(x), y)
    counted = product.cost_analysis() or {}
    return max(float(counted.get("flops", 0.0)), 1.0) * PROBES * STEPS
