"""What the parity tests, their golden files and `tests/priors/make_golden.py` have in common: configs, weights and inputs.

Weights come from a seed and a name alone, in torch's layout: none is zero and no norm is the identity, so that every path
carries signal, and a golden file needs to hold outputs only.
"""

import zlib
from pathlib import Path

import numpy as np

from gdiff_jax.modules import param_shapes
from gdiff_jax.priors import EDMConfig

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of the largest value; the mistakes that a port makes start at 6e-5

# The config.json of google/ddpm-celebahq-256 and google/ddpm-cifar10-32.
CELEBAHQ = dict(
    _class_name="UNet2DModel",
    _diffusers_version="0.0.4",
    act_fn="silu",
    attention_head_dim=None,
    block_out_channels=[128, 128, 256, 256, 512, 512],
    center_input_sample=False,
    down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    in_channels=3,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-06,
    norm_num_groups=32,
    out_channels=3,
    sample_size=256,
    time_embedding_type="positional",
    up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
)
CIFAR10 = CELEBAHQ | dict(
    block_out_channels=[128, 256, 256, 256],
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    sample_size=32,
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
)
# The flags of DPS's FFHQ-256 model.
FFHQ = dict(
    image_size=256,
    num_channels=128,
    num_res_blocks=1,
    attention_resolutions="16",
    num_heads=4,
    num_head_channels=64,
    learn_sigma=True,
    resblock_updown=True,
)

# Both google configs cut to test size: widths divided, all levels, blocks and fields kept.
SMALL_CELEBAHQ = CELEBAHQ | dict(block_out_channels=[16, 16, 32, 32, 64, 64], norm_num_groups=8, sample_size=32)
SMALL_CIFAR10 = CIFAR10 | dict(block_out_channels=[16, 32, 32, 32], norm_num_groups=8, sample_size=16)
# What else public checkpoints set; a network of two levels.
TWO = SMALL_CIFAR10 | dict(
    block_out_channels=[16, 32],
    down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    layers_per_block=1,
    attention_head_dim=8,
    sample_size=8,
)
# As google/ncsnpp-ffhq-1024 is built, smaller.
NCSNPP = TWO | dict(
    block_out_channels=[32, 64, 64],
    down_block_types=["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"],
    up_block_types=["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
    center_input_sample=True,
    mid_block_scale_factor=2.0**0.5,
    time_embedding_type="fourier",
    norm_num_groups=None,
    attention_head_dim=None,
    norm_eps=1e-6,
)
UNET2D = {
    "celebahq": SMALL_CELEBAHQ,
    "cifar10": SMALL_CIFAR10,
    "defaults": TWO | dict(downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5),
    "learned-variance": TWO | dict(out_channels=6),
    "scale-shift": TWO | dict(resnet_time_scale_shift="scale_shift"),
    "scale-shift-attn-norm": TWO | dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4),
    "no-mid-attention": TWO | dict(add_attention=False),
    "mid-scale": TWO | dict(mid_block_scale_factor=2.0**0.5, center_input_sample=True),
    "resnet-resampling": TWO
    | dict(
        block_out_channels=[16, 32, 32],
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    ),
    "mish": TWO | dict(act_fn="mish", time_embedding_dim=24),
    "gelu": TWO | dict(act_fn="gelu"),
    "relu-grey": TWO | dict(act_fn="relu", in_channels=1, out_channels=1),
    "classes": TWO | dict(num_class_embeds=5),
    "classes-as-time": TWO | dict(class_embed_type="timestep", freq_shift=0),
    "vectors": TWO | dict(class_embed_type="identity", time_embedding_dim=24),
    "fourier": TWO | dict(time_embedding_type="fourier", class_embed_type="timestep"),
    "learned-time": TWO | dict(time_embedding_type="learned", num_train_timesteps=1000),
    "no-mid-block": TWO | dict(mid_block_type=None, dropout=0.3),
    "ncsnpp": NCSNPP,
    "ncsnpp-classes": NCSNPP
    | dict(
        block_out_channels=[32, 64],
        down_block_types=["SkipDownBlock2D", "SkipDownBlock2D"],
        up_block_types=["SkipUpBlock2D", "SkipUpBlock2D"],
        norm_num_groups=None,
        layers_per_block=2,
        num_class_embeds=3,
        resnet_time_scale_shift="scale_shift",
    ),
}
# The rows of the table of mistakes: each change must be seen by the golden file of the right network.
UNET2D_MISTAKES = {
    "norm_eps 1e-5 for 1e-6": dict(norm_eps=1e-5),
    "head_dim 8 for null": dict(attention_head_dim=8),
    "freq_shift 0 for 1": dict(freq_shift=0),
    "sin and cos flipped": dict(flip_sin_to_cos=True),
    "symmetric downsample padding": dict(downsample_padding=1),
}

SMALL_FFHQ = FFHQ | dict(image_size=16, num_channels=32, channel_mult="1,2,2", attention_resolutions="8", num_head_channels=16)
ADM = {
    "ffhq": SMALL_FFHQ,
    "imagenet": SMALL_FFHQ | dict(num_res_blocks=2, attention_resolutions="8,4"),
    "classes": SMALL_FFHQ | dict(class_cond=True, resblock_updown=False),
    "plain": dict(
        image_size=8,
        num_channels=32,
        num_res_blocks=1,
        channel_mult="1,2",
        attention_resolutions="4",
        num_heads=2,
        use_scale_shift_norm=False,
        use_new_attention_order=True,
    ),
}


ADM_CONV1D = ("qkv", "proj_out")  # what guided-diffusion has as 1-d convolutions, and we as matrices


# As the published models are built (CIFAR-10's DDPM++ and NCSN++, ImageNet-64's ADM), smaller.
DDPMPP = dict(
    class_name="EDMPrecond",
    model_type="SongUNet",
    img_resolution=16,
    model_channels=16,
    channel_mult=[1, 2, 2],
    num_blocks=1,
    attn_resolutions=[8],
    label_dim=10,
    augment_dim=9,
    use_fp16=True,
    dropout=0.13,
)
NCSNPP_EDM = DDPMPP | dict(
    label_dim=0, channel_mult_noise=2, embedding_type="fourier", encoder_type="residual", resample_filter=[1, 3, 3, 1]
)
DHARIWAL = DDPMPP | dict(model_type="DhariwalUNet", model_channels=64, channel_mult=[1, 2], label_dim=7, label_dropout=0.1)
EDM = {
    "ddpmpp": DDPMPP,
    "ncsnpp": NCSNPP_EDM,
    "residual": NCSNPP_EDM | dict(resample_filter=[1, 1], num_blocks=2),
    "skips": NCSNPP_EDM | dict(encoder_type="skip", decoder_type="skip", label_dim=3),
    "plain-skips": DDPMPP | dict(encoder_type="skip", decoder_type="skip", channel_mult_emb=2),
    "dhariwal": DHARIWAL,
    "dhariwal-unconditional": DHARIWAL | dict(label_dim=0, augment_dim=0, num_blocks=2),
}


VARIATIONS = (
    *("classes-as-time", "vectors", "learned-time", "no-mid-block", "ncsnpp-classes"),
    *("residual", "skips", "dhariwal-unconditional"),
)


def edm_state_dict(kwargs: dict) -> dict[str, np.ndarray]:
    """What EDM saves of such a network: its weights under their names, the filters, and the map of augmentations."""
    shapes = torch_shapes(EDMConfig.from_kwargs(kwargs))
    shapes = {n: (*s, 1, 1) if n.endswith(("qkv.weight", "proj.weight")) else s for n, s in shapes.items()}
    tensors = state_dict(shapes)
    if "map_noise.weight" in tensors:
        tensors["map_noise.freqs"] = tensors.pop("map_noise.weight")
    if kwargs["augment_dim"]:
        tensors["map_augment.weight"] = np.ones((4, kwargs["augment_dim"]), np.float32)
    taps = np.array(kwargs.get("resample_filter", [1, 1]), np.float32)
    for name in [n for n in shapes if n.endswith(("_down.conv0.weight", "_up.conv0.weight"))]:
        tensors[name.replace("weight", "resample_filter")] = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    return {f"model.{name}": value for name, value in tensors.items()}


def torch_shapes(spec, conv1d: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the torch state dict of a network of ours."""
    shapes = {}
    for name, shape in param_shapes(spec).items():
        stem, leaf = name.rsplit(".", 1)
        if leaf == "kernel":
            shape = shape[::-1] if len(shape) == 2 else (*shape[:1:-1], *shape[:2])
            if stem.endswith(conv1d):
                shape = (*shape, 1)
        shapes[f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"] = tuple(map(int, shape))
    return shapes


def state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 tensors of a torch state dict, each drawn by its own name."""
    tensors = {}
    for name, shape in shapes.items():
        z = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if len(shape) > 1:  # small activations, so that the eps of a norm matters
            value = 0.5 * z / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("bias"):
            value = 0.1 * z
        else:
            value = 1 + 0.3 * z
        tensors[name] = value.astype(np.float32)
    return tensors


def inputs(size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """x (3, H, W, C) and three different timesteps."""
    x = np.random.default_rng(size).normal(size=(3, size, size, channels)).astype(np.float32)
    return x, np.array([0, 371, 999], np.int32)


def told(config: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """Times and labels (3,) that go with `inputs`: a network of Fourier features is told noise levels, some are told labels."""
    t = np.array([0.5, 3.7, 20], np.float32) if config.get("time_embedding_type") == "fourier" else inputs(8, 1)[1]
    if config.get("class_embed_type") == "identity":
        dim = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]
        return t, np.random.default_rng(1).normal(size=(3, dim)).astype(np.float32)
    if config.get("class_embed_type") == "timestep":
        return t, np.array([3, 1, 2], np.int32)  # a log is taken of them
    return t, np.array([2, 0, 1], np.int32) if "num_class_embeds" in config or config.get("class_cond") else None


def edm_told(kwargs: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """c_noise of three levels, and labels, the last of them none."""
    labels = np.array([1, 0, kwargs["label_dim"]], np.int32) if kwargs["label_dim"] else None
    return np.array([-1.5, -0.1, 1.09], np.float32), labels


def error(a, b) -> float:
    """Largest difference, relative to the largest value of b."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
