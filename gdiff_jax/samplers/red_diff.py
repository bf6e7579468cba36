"""RED-diff (Mardani, Song, Kautz & Vahdat, ICLR 2024, arXiv 2305.04391): inversion with a diffusion prior as regulariser.

An image is optimised, not sampled: the prior is asked at falling noise levels whether it would have removed the noise
that was just added, and what it would have removed besides is the regulariser's gradient. No derivative through the prior.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from gdiff_jax.samplers.base import Denoise, predict_kept
from gdiff_jax.schedule import Schedule
from gdiff_jax.trace import Objective, StepInfo, norm, x0_error


def red_diff_sample(
    key: jax.Array,
    denoise: Denoise,
    objective: Objective,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    weight: jax.Array | float = 0.5,
    learning_rate: float = 0.1,
    truth: jax.Array | None = None,
) -> tuple[jax.Array, StepInfo]:
    """One reconstruction by RED-diff (Alg. 1), the image mu confined to [-1, 1].

    Args:
      key: typed PRNG key of the trial.
      denoise: `eps, v = denoise(x_t, t)`, a pytree (see `samplers.base`).
      objective: scalar distance of an image (H, W, C) to the leak.
      schedule: kept timesteps of the prior, one optimiser step each, noisiest first.
      shape: (H, W, C) of the image.
      weight: lambda >= 0; an array is traced. The regulariser's gradient is weight sqrt((1 - abar) / abar) (eps_hat - eps), the
        paper's weighting; its norm is taken relative to that of the objective's, which has units of its own [our choice].
      learning_rate: of Adam.
      truth: (H, W, C); only fills `x0_error` of the trace.

    Returns:
      image (H, W, C) in [-1, 1] and the trace, of the iterates before each step.
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, schedule.num_steps), b1=0.9, b2=0.99)
    key_init, key_steps = jax.random.split(key)

    def step(carry: tuple[jax.Array, optax.OptState], i: jax.Array) -> tuple[tuple[jax.Array, optax.OptState], StepInfo]:
        x, state = carry
        noise = jax.random.normal(jax.random.fold_in(key_steps, i), shape)
        x0, _ = predict_kept(denoise, schedule, schedule.add_noise(x, noise, i), i, clip=False)
        pull = x - x0  # sqrt((1 - abar) / abar) (eps_hat - eps), whatever the network predicts
        distance, grad = jax.value_and_grad(objective)(x)
        length = norm(grad)
        direction = grad / jnp.where(length > 0, length, 1.0) + weight * pull / x.size**0.5
        with jax.numpy_dtype_promotion("standard"):  # inside optax
            updates, state = optimiser.update(direction, state, x)
        return (jnp.clip(x + updates, -1.0, 1.0), state), StepInfo(distance, length, x0_error(x, truth))

    x = jnp.clip(0.1 * jax.random.normal(key_init, shape), -1.0, 1.0)
    (x, _), trace = jax.lax.scan(step, (x, optimiser.init(x)), jnp.arange(schedule.num_steps - 1, -1, -1))
    return x, trace
