"""One victim at its private images, in plain numbers: vulnerability, spectrum, influence of noise, limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.images import to_model
from gdiff_jax.matching import Loss, victim_gradient
from gdiff_jax.metrics import psnr_from_error
from gdiff_jax.pytrees import as_float64
from gdiff_jax.theory import jacobian, limits, spectrum

LARGEST_GRAM = 4096  # pixels x channels; above it the spectrum is estimated
KEPT = 128  # eigenvalues of a spectrum, evenly over it


def prior_information(images: np.ndarray) -> np.ndarray:
    """Inverse covariance (d, d) of uint8 images (N, H, W, C) in units of [-1, 1], in float64, for the van Trees limit."""
    flat = np.asarray(to_model(images), np.float32).reshape(len(images), -1)
    with jax.enable_x64(True):
        # Enough images need no shrinkage; a hundredth keeps a few images from giving a singular matrix.
        share = 0.0 if len(flat) > 4 * flat.shape[1] else 0.01
        _, covariance = limits.shrunk_covariance(jnp.asarray(flat, jnp.float64), share)
        return np.asarray(jnp.linalg.inv(covariance))


def exact_spectra(
    loss: Loss, params: Any, x: Any, y: Any, sigmas: Sequence[float], information: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Everything that follows from the whole J^T J, in float64, for each of the images x (N, H, W, C) with labels y.

    Args:
      loss: `loss(params, x, y)`.
      params: the victim's parameters.
      x: images.
      y: their labels, arrays (N, ...) of any pytree.
      sigmas: standard deviations > 0 for the limits.
      information: (d, d) inverse covariance of images in [-1, 1] for the van Trees limit; without it that is left out.

    Returns:
      A dict an image; limits are sums of squared errors over the pixels, one a sigma.
    """
    with jax.enable_x64(True):
        wide = as_float64(params)
        gram_of = jax.jit(lambda p, x, y: jacobian.gram(loss, p, x, y))
        found = []
        for i, image in enumerate(x):
            gram = gram_of(wide, jnp.asarray(image, jnp.float64), as_float64(_label(y, i)))
            values = jnp.linalg.eigvalsh(gram)
            d, top = values.size, float(values[-1])
            row = {
                "lambda_max": top,
                "lambda_min": max(float(values[0]), 0.0),
                "lambda_median": float(jnp.median(values)),
                "frobenius_exact": float(jnp.sqrt(values.sum())),
                "effective_rank": float(spectrum.effective_rank(values)),
                "rank": int((values > d * jnp.finfo(values.dtype).eps * top).sum()),
                "dimensions": d,
                "eigenvalues": [float(v) for v in values[:: -max(1, d // KEPT)]],
                "cramer_rao": [float(limits.cramer_rao(values, s)) for s in sigmas],
            }
            if information is not None:
                row["van_trees"] = [float(limits.van_trees(gram, s, jnp.asarray(information))) for s in sigmas]
            found.append(row)
        return found


def estimated_spectra(key: jax.Array, loss: Loss, params: Any, x: Any, y: Any, probes: int) -> list[dict[str, Any]]:
    """The same from products with vectors, for large images; lambda_min is an upper bound, and there are no limits."""

    @jax.jit
    def summary(key: jax.Array, params: Any, x: jax.Array, y: jax.Array) -> spectrum.Spectrum:
        matvec = lambda v: jacobian.gram_vector(loss, params, x, y, v.reshape(x.shape)).ravel()
        return spectrum.spectrum(key, matvec, x.size, probes=max(2, probes // 16))

    found = []
    for i, image in enumerate(x):
        s = summary(jax.random.fold_in(key, i), params, jnp.asarray(image), _label(y, i))
        low = max(float(s.smallest), 0.0)
        found.append({"lambda_max": float(s.largest), "lambda_min": low, "effective_rank": float(s.effective_rank.value)})
    return found


def summarise(
    key: jax.Array,
    loss: Loss,
    params: Any,
    x: Any,
    y: Any,
    sigmas: Sequence[float],
    *,
    spectra: int = 1,
    probes: int = 64,
    information: np.ndarray | None = None,
) -> dict[str, Any]:
    """What can be said of a victim without an attack, for images x (N, H, W, C) in [-1, 1] with labels y (N, ...).

    Args:
      key: typed PRNG key of the random directions.
      loss: `loss(params, x, y)` of one image.
      params: the victim's parameters, any pytree.
      x: images.
      y: their labels.
      sigmas: standard deviations of the noise; 0 is passed over.
      spectra: of how many images, the first ones, the spectrum of J^T J is computed.
      probes: random directions an estimate.
      information: as in `exact_spectra`.

    Returns:
      "rv" and each "frobenius" norm with standard errors; "shares" of each array of the parameters in || J ||_F^2; norms of
      the gradient, and each array's part of it; "spectra"; by sigma "i2f" (root mean square of the I2F in pixels' units) and,
      where the spectrum is exact, "cramer_rao_psnr" and "van_trees_psnr" (dB), medians over the images of the spectra.
    """
    noisy = [float(s) for s in sigmas if s > 0]

    @jax.jit
    def jacobians(key: jax.Array, params: Any, x: jax.Array, y: jax.Array) -> dict[str, Any]:
        gradient = jax.lax.map(lambda a: _norms(victim_gradient(loss, params, *a)), (x, y))
        return {"rv": jacobian.reconstruction_vulnerability(key, loss, params, x, y, probes), "gradient": gradient}

    found = jax.device_get(jacobians(key, params, jnp.asarray(x), jax.tree.map(jnp.asarray, y)))
    rv: jacobian.Vulnerability = found["rv"]
    exact = x[0].size <= LARGEST_GRAM
    some = x[:spectra], jax.tree.map(lambda a: a[:spectra], y)
    if exact:
        rows = exact_spectra(loss, params, *some, noisy, information)
    else:
        rows = estimated_spectra(key, loss, params, *some, probes)
    frobenius = float(np.median(rv.per_image.value))
    numbers = lambda values: np.asarray(values, np.float64).tolist()
    shares = jax.tree.leaves_with_path(rv.shares, is_leaf=lambda s: isinstance(s, jacobian.Estimate))
    energies = jax.tree.leaves_with_path(found["gradient"])
    result = {
        "parameters": int(sum(p.size for p in jax.tree.leaves(params))),
        "rv": numbers(rv.rv),
        "frobenius": numbers(rv.per_image.value),
        "frobenius_error": numbers(rv.per_image.standard_error),
        "shares": {_path(path): float(np.mean(s.value)) for path, s in shares},
        "gradient_norm": numbers(np.sqrt(sum(e for _, e in energies))),
        "gradient_shares": {_path(path): _mean_share(e, sum(e for _, e in energies)) for path, e in energies},
        "spectrum_is_exact": exact,
        "spectra": rows,
        "sigmas": noisy,
        "i2f": [],
    }
    if rows:
        top = float(np.median([r["lambda_max"] for r in rows]))
        result["i2f"] = [float(jacobian.i2f_of_noise(s, jnp.float32(frobenius), jnp.float32(top))) for s in noisy]
    for name in ("cramer_rao", "van_trees"):
        if rows and name in rows[0]:
            errors = np.median([r[name] for r in rows], axis=0) / x[0].size
            result[f"{name}_psnr"] = [float(psnr_from_error(jnp.float32(e))) for e in errors]
    return result


def _label(y: Any, i: int) -> Any:
    """Of image i."""
    return jax.tree.map(lambda a: jnp.asarray(a[i]), y)


def _mean_share(part: np.ndarray, whole: np.ndarray) -> float:
    """Over the images that have a gradient; 0 where none has."""
    shares = part[whole > 0] / whole[whole > 0]
    return float(np.mean(shares)) if shares.size else 0.0


def _norms(gradient: Any) -> Any:
    return jax.tree.map(lambda g: jnp.vdot(g, g), gradient)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"
