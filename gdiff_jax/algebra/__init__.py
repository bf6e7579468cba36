"""What of a gradient can be solved in place of searched for: `solve` an image, `solve_batch` several, `explain` a network."""

from gdiff_jax.algebra.batch import Batch, solve_batch
from gdiff_jax.algebra.solve import Solution, solve
from gdiff_jax.algebra.structure import Structure, explain, infer_label, last_bias, last_layer_of, structure_of
from gdiff_jax.algebra.tokens import image_of_tokens

__all__ = [
    "Batch",
    "Solution",
    "Structure",
    "explain",
    "image_of_tokens",
    "infer_label",
    "last_bias",
    "last_layer_of",
    "solve",
    "solve_batch",
    "structure_of",
]
