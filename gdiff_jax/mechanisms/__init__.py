"""What happens to a gradient before it leaves the client: noise, clipping, sparsification, quantisation, pruning.

A mechanism is a callable pytree `leak = mechanism(key, gradient)`, and pure; several are joined with `Chain`. Its numbers are
leaves, so a grid over them compiles once; what decides shapes is static. Every noise is given by its *standard deviation*
sigma, in gradient units and per coordinate, so that Gaussian, Laplace and uniform noise of one sigma have equal variance.

Each mechanism declares
  `norm_bound(norm, size)`  a bound on the L2 norm of what it lets through of one example, given a bound on the norm of the
                            example's gradient (inf: none) and its number of coordinates. Before noise is added this is the
                            L2 sensitivity of a sum over examples under add/remove adjacency;
  `differentiable`          whether `simulate` is its derivative, or (False) a stand-in for one that is zero or random;
  `simulate(gradient, leak)`  what an attacker who knows the mechanism expects it to make of a candidate's gradient, given the
                            leak: deterministic, with a derivative. `GradientMatching` matches through it;
  `keeps_pattern`           whether zeros of its input, and no others that it did not mean, can be read off the leak. Behind a
                            stage that fills or makes zeros at random `simulate` gets None for the leak.

Noise is expected to be zero. With an L2 distance that is the likelihood of Gaussian noise; of Laplace or uniform noise an
attacker could make more than its variance.
"""

from gdiff_jax.mechanisms.base import Chain, Gradient, Mechanism
from gdiff_jax.mechanisms.compression import Clip, RandomSparsification, Sign, StochasticQuantisation, TopK
from gdiff_jax.mechanisms.dp_sgd import dp_sgd_gradient
from gdiff_jax.mechanisms.noise import GaussianNoise, LaplaceNoise, UniformNoise
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
    "soteria_mask",
]
