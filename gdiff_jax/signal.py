"""How much of a guidance is signal, and how much the mechanism's noise: what a sampler scales its guidance by.

In image space the residual pulls by h = J^T (grad_W L(x0hat) - g~), J the derivative of the gradient in the pixels. If nothing
but noise were left in the residual, and x0hat had not fitted it, its pull would be like h_n = J^T n', n' a fresh draw of the
mechanism's noise, which costs one more mixed partial. E|| h_n ||^2 = sigma^2 || J ||_F^2: the reconstruction vulnerability, put
to work [our choice]. It changes slowly along a run, so a draw serves several steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gdiff_jax.forward import jvp
from gdiff_jax.matching import GradientMatching, as_compared, at_full_precision, l2, mixed_partial, squared_l2, victim_gradient
from gdiff_jax.pytrees import pytree, static
from gdiff_jax.samplers.base import Share
from gdiff_jax.trace import norm

CALIBRATED_RATE = 0.4  # guidance rate of DSG under `NoiseCalibration`, where all of the guidance is signal [our choice]


@pytree
class NoiseCalibration:
    """s = clip(1 - || h_n ||^2 / || h ||^2, 0, 1) by one draw: about 1 where the leak is clean, near 0 where noise is all.

    Attributes:
      match: the attacker's objective, with the distance `l2`, of one gradient (no `client`), through the `mechanism` that the
        noise is drawn from, which the attacker knows.
      every: guided steps that share a draw.

    Raises:
      ValueError: for another match.
    """

    match: GradientMatching
    every: int = static(default=8)

    def __post_init__(self) -> None:
        m = self.match
        if isinstance(m, GradientMatching) and (m.distance is not l2 or m.client is not None or m.mechanism is None):
            raise ValueError(
                "NoiseCalibration is of an l2 distance to one gradient of a known mechanism: give a match with distance=l2, "
                "mechanism=..., and no client"
            )
        if self.every < 1:
            raise ValueError(f"every {self.every} must be at least 1; 1 draws in each guided step")

    def __call__(
        self,
        key: jax.Array,
        steps_before: jax.Array,
        last_noise_pull: jax.Array,
        x0: jax.Array,
        distance: jax.Array,
        gradient: jax.Array,
    ) -> Share:
        draw = lambda: norm(self.noise_pull(key, x0))
        noise_pull = jax.lax.cond(steps_before % self.every == 0, draw, lambda: last_noise_pull)
        length = norm(gradient)
        pull = distance * length  # of the root, whose derivative is J^T r / || r ||
        signal = jnp.clip(1 - jnp.square(noise_pull / jnp.where(pull > 0, pull, 1.0)), 0.0, 1.0)
        return Share(signal, pull, noise_pull, self.curvature(x0, gradient / jnp.where(length > 0, length, 1.0)))

    @at_full_precision
    def curvature(self, x0: jax.Array, direction: jax.Array) -> jax.Array:
        """|| J u ||^2 of what the match compares, at an image x0 along a direction u, both (H, W, C)."""
        m = self.match
        compared = lambda x: as_compared(m, victim_gradient(m.loss, m.params, x, m.label))
        change = jvp(compared, x0, direction)
        return squared_l2(change, jax.tree.map(jnp.zeros_like, change))

    @at_full_precision
    def noise_pull(self, key: jax.Array, x0: jax.Array) -> jax.Array:
        """h_n at an image: a draw of what the mechanism adds to a gradient there, pulled back to the pixels.

        As seen by one who reads off that draw which coordinates it kept, as of the leak: to keep some back is no noise.
        """
        m = self.match
        gradient = victim_gradient(m.loss, m.params, x0, m.label)
        mechanism = m.mechanism
        assert mechanism is not None
        drawn = mechanism(key, gradient)
        expected, back = jax.vjp(lambda g: mechanism.simulate(g, drawn), gradient)
        drawn = jax.tree.map(jnp.subtract, drawn, expected)
        if m.weights is not None:  # the match compares weighted gradients
            drawn = jax.tree.map(lambda n, w: n * jnp.square(w), drawn, m.weights)
        return mixed_partial(m.loss, m.params, x0, m.label, back(drawn)[0])
