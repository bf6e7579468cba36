"""The U-Net of diffusers against closed forms and diffusers' own parameter lists; its configs."""

import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from objectives import float32
from parity_cases import CELEBAHQ, CIFAR10

from gdiff_jax import modules
from gdiff_jax.conv import conv_prior
from gdiff_jax.modules import GroupNorm
from gdiff_jax.priors import Denoiser, UNet2DConfig
from gdiff_jax.priors.layers import depth_to_space, space_to_depth, timestep_embedding
from gdiff_jax.priors.unet2d_blocks import Attention, Downsample, Upsample
from gdiff_jax.priors.weights import to_torch

# Configs


def test_config_fields_are_read():
    config = UNet2DConfig.from_diffusers(CELEBAHQ)
    for field in dataclasses.fields(config):
        if field.name in CELEBAHQ:
            value = CELEBAHQ[field.name]
            assert getattr(config, field.name) == (tuple(value) if isinstance(value, list) else value)
    assert config.image_shape == (256, 256, 3)
    assert UNet2DConfig.from_diffusers(config.to_diffusers()) == config
    assert UNet2DConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("colour", "blue"),
        ("act_fn", "tanh"),
        ("attn_norm_num_groups", 7),
        ("class_embed_type", "projection"),
        ("downsample_type", "fir"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("num_class_embeds", 0),
        ("num_train_timesteps", 1.5),
        ("resnet_time_scale_shift", "spatial"),
        ("time_embedding_type", "cosine"),
        ("upsample_type", "fir"),
        ("downsample_padding", 2),
        ("sample_size", None),
        ("sample_size", [32, 64]),
        ("sample_size", 30),
    ],
)
def test_config_values_that_are_not_implemented_are_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}[= ]{re.escape(repr(value))}"):
        UNet2DConfig.from_diffusers(CIFAR10 | {field: value})


def test_all_that_is_wrong_with_a_config_is_listed_at_once():
    with pytest.raises(ValueError, match=r"act_fn='tanh'.*time_embedding_type='cosine'"):
        UNet2DConfig.from_diffusers(CIFAR10 | dict(time_embedding_type="cosine", act_fn="tanh"))
    with pytest.raises(ValueError, match=r"colour='blue' .*shape='round' \(unknown field\)"):
        UNet2DConfig.from_diffusers(CIFAR10 | dict(colour="blue", shape="round"))


@pytest.mark.parametrize("field", ["down_block_types", "up_block_types", "block_out_channels"])
def test_config_of_uneven_lengths_is_refused(field):
    with pytest.raises(ValueError, match=field):
        UNet2DConfig.from_diffusers(CIFAR10 | {field: CIFAR10[field][:3]})


def test_config_with_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="'KDownBlock2D' is not implemented"):
        UNet2DConfig.from_diffusers(CIFAR10 | dict(down_block_types=["DownBlock2D"] * 3 + ["KDownBlock2D"]))
    with pytest.raises(ValueError, match="Skip blocks hand the image on, so all must be"):
        UNet2DConfig.from_diffusers(CIFAR10 | dict(down_block_types=["DownBlock2D"] * 3 + ["SkipDownBlock2D"]))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (dict(_diffusers_version="0.0.4"), None),  # older than the field: one head
        (dict(_diffusers_version="0.0.4", attention_head_dim=8), 8),
        (dict(_diffusers_version="0.10.0"), 8),  # today's default
        (dict(), 8),
        (dict(attention_head_dim=None), None),
    ],
)
def test_absent_attention_head_dim(given, read):
    assert UNet2DConfig.from_diffusers(dict(sample_size=32) | given).attention_head_dim == read


# Parameters, by diffusers' lists of names and shapes


@pytest.mark.parametrize(
    ("config", "tensors", "size", "digest", "some"),
    [
        (
            CELEBAHQ,
            450,
            113_673_219,
            "2ed57dfc8f11dc28c514750233de516cb817aacd10fe665b6920f2238432447c",
            {
                "conv_in.weight": (128, 3, 3, 3),
                "time_embedding.linear_1.weight": (512, 128),
                "down_blocks.4.attentions.1.to_out.0.weight": (512, 512),
                "down_blocks.2.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
                "mid_block.attentions.0.group_norm.weight": (512,),
                "up_blocks.1.resnets.2.conv1.weight": (512, 768, 3, 3),
                "up_blocks.4.upsamplers.0.conv.bias": (128,),
            },
        ),
        (
            CIFAR10,
            328,
            35_746_307,
            "79f1c1939f7b73cd72e7554038ef2acfee681b8d2b786ee65b39929e738d4f2a",
            {
                "down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
                "down_blocks.1.resnets.0.time_emb_proj.weight": (256, 512),
                "up_blocks.3.resnets.0.conv_shortcut.weight": (128, 384, 1, 1),
                "conv_out.weight": (3, 128, 3, 3),
            },
        ),
    ],
    ids=["celebahq", "cifar10"],
)
def test_parameters_are_those_of_diffusers(config, tensors, size, digest, some):
    shapes = modules.param_shapes(UNet2DConfig.from_diffusers(config))
    torch = to_torch({name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()})
    torch = {name: value.shape for name, value in torch.items()}
    assert some.items() <= torch.items()
    assert len(torch) == len(shapes) == tensors
    assert sum(map(np.prod, torch.values())) == size
    # Of the sorted lines "name<tab>shape" of the state dict of diffusers' own model: every name and every shape.
    lines = sorted(f"{name}\t{shape}" for name, shape in torch.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_up_blocks_take_the_skips_last_in_first_out():
    shapes = modules.param_shapes(UNet2DConfig.from_diffusers(CIFAR10))
    channels = [[shapes[f"up_blocks.{i}.resnets.{j}.norm1.scale"][0] for j in range(3)] for i in range(4)]
    # own + skip: the skips are 128 128 128 128 | 256 256 256 | 256 256 256 | 256 256, popped from the end
    assert channels == [[512, 512, 512], [512, 512, 512], [512, 512, 384], [384, 256, 256]]


# Pieces against closed forms


def test_space_to_depth_orders_channels_as_torch_pixel_unshuffle():
    n, h, w, c, p = 2, 4, 6, 3, 2
    x = np.arange(n * h * w * c).reshape(n, h, w, c)
    folded = np.asarray(space_to_depth(jnp.asarray(x), p))
    for a in range(p):
        for b in range(p):
            for k in range(c):
                np.testing.assert_array_equal(folded[..., k * p * p + a * p + b], x[:, a::p, b::p, k])
    np.testing.assert_array_equal(depth_to_space(jnp.asarray(folded), p), x)


@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_timestep_embedding(freq_shift, flip):
    t, half = np.array([0, 1, 500, 999]), 8
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - freq_shift))
    parts = [np.cos(angles), np.sin(angles)] if flip else [np.sin(angles), np.cos(angles)]
    embedding = timestep_embedding(jnp.asarray(t), 2 * half, freq_shift, flip)
    assert embedding.dtype == jnp.float32
    np.testing.assert_allclose(embedding, np.concatenate(parts, -1), atol=2e-4)  # 999 radians in float32


def error(a, b):
    """Largest difference, relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def normal(*shape):
    return float32(np.random.default_rng(0).normal(size=shape))


def layer(make, **replaced):
    """`make(config, rngs)` with random parameters, biases too."""
    config = dataclasses.replace(UNet2DConfig(sample_size=8), norm_num_groups=4, **replaced)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(config, nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda leaf: normal(*leaf.shape), state))


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_group_norm_keeps_its_digits_at_a_large_mean(mean):
    rng = np.random.default_rng(0)
    x = np.float32(mean + rng.normal(size=(2, 5, 4, 12)))
    scale, bias = rng.normal(size=(2, 12)).astype(np.float32)
    norm = GroupNorm(12, 3, 1e-5)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    groups = x.astype(np.float64).reshape(2, 20, 3, 4)
    centred = groups - groups.mean((1, 3), keepdims=True)
    expected = (centred / np.sqrt(centred.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=2e-4)


@pytest.mark.parametrize(("head_dim", "heads"), [(None, 1), (4, 2), (2, 4)])
def test_attention_against_numpy(head_dim, heads):
    attention = layer(lambda config, rngs: Attention(8, config, rngs, GroupNorm(8, 4, 1e-5)), attention_head_dim=head_dim)
    x = normal(2, 3, 4, 8)
    dense = lambda f, h: h @ np.asarray(f.kernel[...]) + np.asarray(f.bias[...])
    h = np.asarray(attention.group_norm(x)).reshape(2, 12, 8)
    q, k, v = (dense(f, h) for f in (attention.to_q, attention.to_k, attention.to_v))
    mixed = np.empty_like(h)
    for head in np.split(np.arange(8), heads):
        weights = np.exp(q[..., head] @ k[..., head].swapaxes(1, 2) / np.sqrt(len(head)))
        mixed[..., head] = weights / weights.sum(-1, keepdims=True) @ v[..., head]
    assert error(attention(x), np.asarray(x) + dense(attention.to_out[0], mixed).reshape(x.shape)) < 1e-5


@pytest.mark.parametrize(("padding", "pads"), [(0, (0, 1)), (1, (1, 1))])
def test_downsampling_pads_as_diffusers_does(padding, pads):
    down = layer(lambda config, rngs: Downsample(8, config, rngs), downsample_padding=padding)
    x = normal(2, 6, 6, 8)
    padded = np.pad(x, ((0, 0), pads, pads, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
    expected = np.einsum("nhwcij,ijco->nhwo", windows, np.asarray(down.conv.kernel[...])) + np.asarray(down.conv.bias[...])
    assert expected.shape == (2, 3, 3, 8)
    assert error(down(x, None), expected) < 1e-5


def test_upsampling_repeats_pixels():
    up = layer(lambda config, rngs: Upsample(8, rngs))
    x = normal(2, 3, 4, 8)
    twice = jnp.asarray(np.repeat(np.repeat(x, 2, 1), 2, 2))
    assert error(up(x, None), conv_prior(twice, up.conv.kernel[...]) + up.conv.bias[...][None, None, None]) < 1e-6


# The whole network


SMALL = UNet2DConfig(
    sample_size=4,
    in_channels=8,  # two channels, folded
    out_channels=8,
    patch_size=2,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=8,
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def denoise() -> Denoiser:
    """Random weights, none of them zero, so that every path carries signal."""
    rng = np.random.default_rng(0)
    shapes = modules.param_shapes(SMALL)
    return Denoiser({name: float32(0.2 * rng.normal(size=s)) for name, s in shapes.items()}, SMALL)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return normal(3, 8, 8, 2)


T = jnp.array([0, 400, 999])
run = jax.jit(
    lambda denoise, x, t: denoise.batch(x, t)[0], compiler_options={"xla_backend_optimization_level": 0}
)  # compiles in half the time


def test_one_image_a_vmap_and_a_batch_agree(denoise, x):
    batch = run(denoise, x, T)
    assert batch.shape == x.shape
    assert batch.dtype == jnp.float32
    assert np.isfinite(batch).all()
    assert error(batch[0], batch[1]) > 0.1  # image and time are looked at
    mapped = jax.jit(lambda denoise: jax.vmap(denoise)(x, T))(denoise)
    assert mapped[1] is None  # no variance output
    assert error(mapped[0], batch) < 1e-5
    assert error(run(denoise, x[1:2], T[1:2])[0], batch[1]) < 1e-5


def test_bfloat16_is_used_inside_and_float32_returned(denoise, x):
    half = run(dataclasses.replace(denoise, dtype="bfloat16"), x, T)
    assert half.dtype == jnp.float32
    assert 1e-4 < error(half, run(denoise, x, T)) < 5e-2


@pytest.mark.parametrize(
    ("field", "value"),
    dict(norm_eps=1e-3, attention_head_dim=None, freq_shift=1, flip_sin_to_cos=False, downsample_padding=0).items(),
)
def test_config_fields_change_the_network(denoise, x, field, value):
    """The parameters fit either value: nothing but the result would tell that a field is ignored."""
    other = dataclasses.replace(denoise, config=dataclasses.replace(SMALL, **{field: value}))
    assert error(run(other, x, T), run(denoise, x, T)) > 1e-4
