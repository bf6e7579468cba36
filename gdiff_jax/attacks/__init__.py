"""What an attacker can do without a diffusion prior: direct inversion, the first layer's analytic inversion, label inference.

Direct inversions are called as a sampler is, without the prior: `image, trace = attack(key, objective, shape, ...)`.
"""

from gdiff_jax.attacks.analytic import LayerInput, dense_layer_input, read_first_dense
from gdiff_jax.attacks.dlg import dlg
from gdiff_jax.attacks.inverting import invert_gradients, total_variation
from gdiff_jax.attacks.labels import JointLabels, counts_to_labels, infer_label, label_accuracy, label_counts

__all__ = [
    "JointLabels",
    "LayerInput",
    "counts_to_labels",
    "dense_layer_input",
    "dlg",
    "infer_label",
    "invert_gradients",
    "label_accuracy",
    "label_counts",
    "read_first_dense",
    "total_variation",
]
