"""Models of torchvision, timm and transformers, with random weights, and of Opacus: `pip install -e ".[torch,parity]"`."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extras `torch` and `parity`")
pytest.importorskip("torchax", reason="needs the extra `torch`")
torchvision = pytest.importorskip("torchvision", reason="needs the extra `parity`")
timm = pytest.importorskip("timm", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
grad_sample = pytest.importorskip("opacus.grad_sample", reason="needs the extra `parity`")

import torch_modules

from gdiff_jax import algebra
from gdiff_jax.victims import TorchModel, own, torch_checks
from gdiff_jax.victims.checks import gradient_at

pytestmark = pytest.mark.long  # of the size that they are used at

LABEL = np.int32(7)


def hugging_face_vit():
    """ViT-B/16 with two of its twelve blocks, which change nothing for what is read off its positions."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=2, num_labels=1000))


MODELS = {
    "torchvision resnet18": (torchvision.models.resnet18, 32),
    "torchvision vit_b_16": (torchvision.models.vit_b_16, 224),
    "timm vit_small_patch16_224": (lambda: timm.create_model("vit_small_patch16_224", depth=2), 224),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto"), 32),
    "transformers ViT": (hugging_face_vit, 224),
}
VITS = {
    "torchvision vit_b_16": "encoder.pos_embedding",
    "timm vit_small_patch16_224": "pos_embed",
    "transformers ViT": "vit.embeddings.position_embeddings",
}


def made(name):
    """The victim, its params and the shape of an image."""
    torch.manual_seed(0)
    make, size = MODELS[name]
    module = make().eval()
    with torch.no_grad():  # zeros, such as a head begins with, let no gradient through
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return *own.module_victim(TorchModel(module), 1000), (size, size, 3)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_torchs_own(name):
    victim, _, shape = made(name)
    assert torch_checks.check_gradient(victim.loss, shape, LABEL) < 1e-5


@pytest.mark.parametrize("name", VITS)
def test_a_vit_gives_its_image_away(name):
    victim, params, shape = made(name)
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    lines = algebra.explain(victim.loss, params, x)
    assert f"its delta is the gradient of {VITS[name]}; its input is solved from its kernel's" in lines[0]
    leak, _ = gradient_at(victim.loss, params, x, LABEL)
    solution = algebra.solve(victim.loss, params, leak, shape, jnp.asarray(LABEL), check=False)
    assert 10 * np.log10(4 / np.mean(np.square(solution.image - x))) > 85, solution.steps


def test_a_resnet_is_taken_apart_at_its_blocks():
    """Its last layer tells the label; what cannot be inverted is said to be so, and the image searched for."""
    victim, params, shape = made("torchvision resnet18")
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    lines = algebra.explain(victim.loss, params, x)
    assert sum("bn1.weight" in line for line in lines) >= 8
    assert any("its delta is the gradient of fc.bias" in line for line in lines)
    leak, _ = gradient_at(victim.loss, params, x, LABEL)
    assert algebra.infer_label(victim.loss, params, leak, shape) == LABEL


def test_what_timm_and_hugging_face_keep_beside_a_model_is_found():
    said = made("timm convnext_atto")[0].said
    assert said[0].endswith(
        "normalised by mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225), which were found in its pretrained_cfg"
    )
    assert "it says that it was made for 224 x 224 pixels" in said
    assert "it says that it was made for 224 x 224 pixels" in made("transformers ViT")[0].said


@pytest.mark.parametrize("mode", ["GradSampleModule", "GradSampleModuleFastGradientClipping"])
def test_what_opacus_wraps_is_taken_out_of_its_hooks(mode):
    """Also in the midst of a step; and the user's own goes on to collect gradients by sample."""
    shape, x, y = (8, 8, 3), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    options = dict(max_grad_norm=1.0) if "Clipping" in mode else {}
    wrapped = getattr(grad_sample, mode)(torch_modules.lenet(), **options)
    torch.nn.functional.cross_entropy(wrapped(x), y).backward()
    for module in (wrapped, wrapped._module):
        victim, params = own.module_victim(TorchModel(module), 4)
        assert list(params) == [name for name, _ in torch_modules.lenet().named_parameters()]
        assert torch_checks.check_gradient(victim.loss, shape, LABEL % 4) < 1e-5
    wrapped.zero_grad()
    torch.nn.functional.cross_entropy(wrapped(x), y).backward()
    collected = "_norm_sample" if "Clipping" in mode else "grad_sample"
    assert all(len(getattr(p, collected)) == 2 for p in wrapped.parameters())
