"""The diffusion's noise schedule: betas, abar, respacing, posterior mean and standard deviation.

Everything is computed once in numpy float64 and cast to float32 at the end: products of a thousand factors lose
digits otherwise. Index i counts the *kept* steps, 0 (least noise) to num_steps - 1; `Schedule.t[i]` is what the network is told
then: the timestep that it was trained with, or where it is continuous in time its own measure of the level.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gdiff_jax.parametrisation import EDM, Epsilon, Parametrisation, Score
from gdiff_jax.pytrees import pytree, static

VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
Spacing = Literal["uniform", "quadratic", "trailing"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


def make_betas(schedule: BetaSchedule = "linear", num: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas of the forward process, float64, shape (num,), named as diffusers' schedulers name them.

    `linear` is DDPM's (Ho et al. 2020), `squaredcos_cap_v2` the cosine schedule (Nichol & Dhariwal 2021, Eq. 17).
    """
    if schedule == "linear":
        return np.linspace(start, end, num, dtype=np.float64)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, num, dtype=np.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        s = np.arange(num + 1, dtype=np.float64) / num
        abar = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    raise ValueError(f"beta schedule {schedule!r} is not known; use linear, scaled_linear or squaredcos_cap_v2")


def betas_of(abar: np.ndarray) -> np.ndarray:
    """Betas of a process that is given by its levels: abar (T,) float64, falling, in [0, 1)."""
    return 1 - abar / np.append(1.0, abar[:-1])


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last step is noise alone (Lin et al. 2024, arXiv 2305.08891, Alg. 1): sqrt(abar) shifted to 0 and scaled."""
    signal = np.sqrt(np.cumprod(1 - betas))
    return betas_of(np.square((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])))


def _kept(total: int, num: int, spacing: Spacing) -> np.ndarray:
    """Increasing timesteps, `num` different ones, the last of them total - 1: sampling starts from pure noise.

    The first is 0 if there are two, but for `trailing`, which is diffusers' (Lin et al. 2024, Table 2).
    """
    if spacing not in ("uniform", "quadratic", "trailing"):
        raise ValueError(f"spacing {spacing!r} is not known; use uniform, quadratic or trailing")
    if spacing == "trailing":
        # Counted down, as diffusers does: counted up, halves round to another timestep at some numbers of steps.
        return np.round(np.arange(total, 0, -total / num)[:num])[::-1].astype(np.int64) - 1
    if num == 1:
        return np.array([total - 1])
    u = np.linspace(0, total - 1, num)
    t = np.round(u if spacing == "uniform" else u**2 / (total - 1)).astype(np.int64)
    # The square crowds timesteps near 0 onto each other: push each at least one above the one before.
    return np.maximum.accumulate(t - np.arange(num)) + np.arange(num)


@pytree
class Schedule:
    """The kept timesteps of a reverse process, a pytree of arrays of shape (num_steps,); make with `Schedule.create`."""

    t: jax.Array  # what the network is told: int32, the timestep; float32 where its parametrisation has a time of its own
    abar: jax.Array  # prod(1 - beta) up to t
    noise: jax.Array  # sqrt(1 - abar), of which float32 would keep few digits where abar is near 1
    abar_prev: jax.Array  # the same at the next kept step towards 0; 1 at the last one
    mean_x0: jax.Array  # posterior mean = mean_x0 * x0 + mean_xt * x_t
    mean_xt: jax.Array
    log_beta: jax.Array  # log of beta_t = 1 - abar / abar_prev, the largest sensible variance
    log_beta_tilde: jax.Array  # log of the posterior variance; at t = 0, where it is 0, that of the next step up
    variance: VarianceType = static(default="fixed_small")
    parametrisation: Parametrisation = static(default=Epsilon())

    @classmethod
    def create(
        cls,
        betas: np.ndarray | None = None,
        num_steps: int | None = None,
        variance: VarianceType = "fixed_small",
        spacing: Spacing = "uniform",
        parametrisation: Parametrisation = Epsilon(),  # noqa: B008 - frozen
    ) -> Schedule:
        """Schedule that keeps `num_steps` timesteps, the last included, and the first unless the spacing is `trailing`.

        Args:
          betas: (T,) betas the network was trained with; DDPM's linear ones if None. The last may be 1, a zero terminal SNR,
            where the network predicts v, the sample or a flow. A process continuous in time is given by a fine table of
            its levels.
          num_steps: steps to keep, 1 <= num_steps <= T; all if None. As in guided-diffusion's respacing the betas
            of the kept steps are 1 - abar_t / abar_prev, never betas[t] (Nichol & Dhariwal 2021, Eq. 19).
          variance: of the reverse step: `fixed_small` is beta-tilde, `fixed_large` is beta, `learned_range`
            interpolates their logs by the network's second output.
          spacing: `uniform` in t, or `quadratic`, denser towards t = 0 (Song et al. 2021, DDIM, section D.2, who use it for
            CIFAR-10): more of the steps are spent where details are decided. `trailing` is diffusers' `timestep_spacing` of
            that name: uniform, at the end of each of num_steps equal parts.
          parametrisation: what the network predicts, see `gdiff_jax.parametrisation`.

        Raises:
          ValueError: where num_steps is out of range, a beta is outside (0, 1), or variance or spacing is unknown; where the
            last beta is 1 and the network predicts epsilon, of which x0hat is not a function there, or is EDM's or of a
            score, whose sigma would be infinite.
        """
        betas = make_betas() if betas is None else np.asarray(betas, np.float64)
        total = len(betas)
        num_steps = total if num_steps is None else num_steps
        if not 1 <= num_steps <= total:
            raise ValueError(f"num_steps {num_steps} is outside 1..{total}, the steps the prior was trained with")
        if betas[-1] == 1 and isinstance(parametrisation, Epsilon | EDM | Score):
            raise ValueError(
                f"the last beta is 1, a zero terminal SNR, where x0hat cannot be had by {type(parametrisation).__name__}; it "
                "goes with a network that predicts v, the sample or a flow, or with betas that end below 1"
            )
        if not (np.all((betas > 0) & (betas <= 1)) and np.all(betas[:-1] < 1)):
            raise ValueError(f"betas must lie in (0, 1); got {betas.min()}..{betas.max()}")
        if variance not in ("fixed_small", "fixed_large", "learned_range"):
            raise ValueError(f"variance {variance!r} is not known; use fixed_small, fixed_large or learned_range")
        t = _kept(total, num_steps, spacing)
        abar = np.cumprod(1 - betas)[t]
        abar_prev = np.append(1.0, abar[:-1])
        beta = 1 - abar / abar_prev
        beta_tilde = beta * (1 - abar_prev) / (1 - abar)
        log_tilde = np.log(np.append(beta_tilde[1] if num_steps > 1 else beta[0], beta_tilde[1:]))
        cast = lambda a: jnp.asarray(np.asarray(a, np.float32), jnp.float32)
        noise = cast(np.sqrt(1 - abar))
        time = parametrisation.time(cast(np.sqrt(abar)), noise)
        return cls(
            t=jnp.asarray(np.asarray(t, np.int32), jnp.int32) if time is None else time,
            abar=cast(abar),
            noise=noise,
            abar_prev=cast(abar_prev),
            mean_x0=cast(np.sqrt(abar_prev) * beta / (1 - abar)),
            mean_xt=cast(np.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)),
            log_beta=cast(np.log(beta)),
            log_beta_tilde=cast(log_tilde),
            variance=variance,
            parametrisation=parametrisation,
        )

    @property
    def num_steps(self) -> int:
        return self.t.shape[0]

    def add_noise(self, x0: jax.Array, eps: jax.Array, i: jax.Array) -> jax.Array:
        """x_t of q(x_t | x0) for one image and one index i: sqrt(abar) x0 + sqrt(1 - abar) eps."""
        return jnp.sqrt(self.abar[i]) * x0 + self.noise[i] * eps

    def levels(self) -> jax.Array:
        """(num_steps,) log of noise / signal: of the noise's standard deviation, of an image that is not scaled."""
        return jnp.log(self.noise) - 0.5 * jnp.log(self.abar)

    def posterior_mean(self, x0: jax.Array, x_t: jax.Array, i: jax.Array) -> jax.Array:
        """Mean of q(x_{t-1} | x_t, x0) (DDPM, Eq. 7)."""
        return self.mean_x0[i] * x0 + self.mean_xt[i] * x_t

    def posterior_std(self, i: jax.Array, v: jax.Array | None = None) -> jax.Array:
        """Standard deviation of the reverse step, a scalar, or of v's shape for `learned_range`; 0 at i = 0.

        Args:
          i: index of the step.
          v: the network's variance output in [-1, 1]; frac = (v + 1) / 2 and
            log var = frac log beta + (1 - frac) log beta_tilde (Nichol & Dhariwal 2021, Eq. 15).
        """
        if self.variance == "learned_range":
            if v is None:
                raise ValueError("variance learned_range needs a network with a variance output; this one has none")
            frac = (v + 1) / 2
            log_var = frac * self.log_beta[i] + (1 - frac) * self.log_beta_tilde[i]
        elif self.variance == "fixed_large":
            log_var = self.log_beta[i]
        else:
            log_var = self.log_beta_tilde[i]
        return jnp.where(i > 0, jnp.exp(log_var / 2), 0.0)
