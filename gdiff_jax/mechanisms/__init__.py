"""What happens to a gradient before it leaves the client: noise, clipping, sparsification, quantisation, pruning.

A mechanism is a callable pytree `leak = mechanism(key, gradient)`, see `Mechanism`; several are joined with `Chain`. In text,
`clip:1+gaussian`, they are read by `mechanisms.text`.

Noise is expected to be zero. With an L2 distance that is the likelihood of Gaussian noise; of Laplace or uniform noise an
attacker could make more than its variance.
"""

from gdiff_jax.mechanisms.base import Chain, Gradient, Mechanism, stages_of
from gdiff_jax.mechanisms.compression import Clip, RandomSparsification, Sign, StochasticQuantisation, TopK
from gdiff_jax.mechanisms.dp_sgd import dp_sgd_gradient
from gdiff_jax.mechanisms.noise import GaussianNoise, LaplaceNoise, UniformNoise, noise_of
from gdiff_jax.mechanisms.soteria import PruneRepresentation, soteria_mask

__all__ = [
    "Chain",
    "Clip",
    "GaussianNoise",
    "Gradient",
    "LaplaceNoise",
    "Mechanism",
    "PruneRepresentation",
    "RandomSparsification",
    "Sign",
    "StochasticQuantisation",
    "TopK",
    "UniformNoise",
    "dp_sgd_gradient",
    "noise_of",
    "soteria_mask",
    "stages_of",
]
