"""What a conditional prior is told: a label, none, or more of the one than of the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from parity_cases import TWO, state_dict, torch_shapes

from gdiff_jax.priors import Denoiser, UNet2DConfig, weights

ONE = TWO | dict(
    block_out_channels=[8],
    norm_num_groups=4,
    down_block_types=["DownBlock2D"],
    up_block_types=["UpBlock2D"],
    mid_block_type=None,
)


def told_classes(**config):
    spec = UNet2DConfig.from_diffusers(ONE | config)
    return Denoiser(weights.to_params(spec, state_dict(torch_shapes(spec)), "toy"), spec)


def test_a_conditional_prior_is_told_a_label_or_says_that_it_needs_one():
    denoise = told_classes(num_class_embeds=5)
    x, t = jnp.ones((3, 8, 8, 3)), jnp.full(3, 7)
    with pytest.raises(ValueError, match=r"is conditional and was told no label: give it one, denoise\.given"):
        denoise(x[0], t[0])
    labels = jnp.array([0, 4, 2])
    of_batch = jax.jit(lambda: denoise.given(labels).batch(x, t)[0], compiler_options=QUICK_COMPILE)
    of_trials = jax.jit(jax.vmap(lambda label: denoise.given(label)(x[0], t[0])[0]), compiler_options=QUICK_COMPILE)
    each = of_batch()
    np.testing.assert_allclose(of_trials(labels), each, atol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 0.01
    for label, message in ((5, r"label 5 is outside 0\.\.4"), (-1, "label -1 is outside"), (1.0, "labels are float32")):
        with pytest.raises(ValueError, match=message):
            denoise.given(label)
    with pytest.raises(ValueError, match=r"class_guidance 2\.0 needs a null_label"):
        dataclasses.replace(denoise.given(1), class_guidance=2.0)(x[0], t[0])
    with pytest.raises(ValueError, match="this prior is not conditional"):
        told_classes().given(1)


def test_classifier_free_guidance_goes_from_the_null_label_past_the_label():
    denoise = told_classes(num_class_embeds=5, out_channels=6)
    x, t = jnp.ones((1, 8, 8, 3)), jnp.full(1, 7)
    run = jax.jit(lambda denoise: denoise.batch(x, t), compiler_options=QUICK_COMPILE)
    (of_label, v), (of_none, v_of_none) = run(denoise.given(2)), run(denoise.given(4))
    assert np.abs(v - v_of_none).max() > 0.01
    guided = dataclasses.replace(denoise, null_label=4, class_guidance=3.0)
    found, found_v = run(guided.given(2))
    np.testing.assert_allclose(found, of_none + 3 * (of_label - of_none), atol=1e-5)
    np.testing.assert_allclose(found_v, v, atol=1e-6)  # a variance is not gone further in
    np.testing.assert_allclose(run(guided.given(None))[0], of_none, atol=1e-6)
    np.testing.assert_allclose(run(guided.of_any_class(jax.random.key(0)))[0], of_none, atol=1e-6)
    drawn = [int(denoise.of_any_class(jax.random.key(i)).label) for i in range(40)]
    assert set(drawn) == set(range(5))
    assert set(denoise.of_any_class(jax.random.key(0), (40,)).label.tolist()) == set(range(5))  # each image its own
