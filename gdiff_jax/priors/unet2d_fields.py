"""The fields of a `UNet2DModel` and what they may hold, below both the network and the config that builds it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

DOWN_BLOCKS: tuple[str, ...] = (
    *("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("SkipDownBlock2D", "AttnSkipDownBlock2D"),
)
UP_BLOCKS: tuple[str, ...] = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


def _number(least: float, most: float, kind: type = int, none: bool = False) -> tuple[str, Any]:
    def ok(config: Any, field: str) -> bool:
        value = getattr(config, field)
        if value is None:
            return none
        # bool is an int for Python; a whole number may stand for a float.
        return type(value) in {int, kind} and least <= value <= most

    return f"{kind.__name__} in {least}..{most}{' or null' * none}", ok


def _each(kind: type, most: int) -> tuple[str, Any]:
    def ok(config: Any, field: str) -> bool:
        values = getattr(config, field)
        return type(values) is tuple and 1 <= len(values) <= most and all(type(v) is kind for v in values)

    return f"a list of 1..{most} {kind.__name__}", ok


def _one_of(*known: str | None) -> tuple[str, Any]:
    return " or ".join(
        "null" if name is None else name for name in known
    ), lambda config, field: getattr(config, field) in known


def _boolean(config: Any, field: str) -> bool:
    return type(getattr(config, field)) is bool


_WIDE = 2**16
_NEEDED: dict[str, tuple[str, Any]] = {
    "sample_size": _number(1, _WIDE),
    "in_channels": _number(1, _WIDE),
    "out_channels": _number(1, _WIDE),
    "center_input_sample": ("true or false", _boolean),
    "time_embedding_dim": _number(1, _WIDE, none=True),
    "freq_shift": _number(0, 1, float),
    "flip_sin_to_cos": ("true or false", _boolean),
    "down_block_types": _each(str, 12),
    "up_block_types": _each(str, 12),
    "block_out_channels": _each(int, 12),
    "layers_per_block": _number(1, 64),
    "mid_block_scale_factor": _number(1e-3, 1e3, float),
    "downsample_padding": _number(0, 1),
    "downsample_type": _one_of("conv", "resnet"),
    "upsample_type": _one_of("conv", "resnet"),
    "dropout": _number(0, 1, float),
    "act_fn": _one_of(*ACTIVATIONS),
    "attention_head_dim": _number(1, _WIDE, none=True),
    "norm_num_groups": _number(1, _WIDE, none=True),
    "attn_norm_num_groups": _number(1, _WIDE, none=True),
    "norm_eps": _number(0, 1, float),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
    "add_attention": ("true or false", _boolean),
    "patch_size": _number(1, 64),
    "time_embedding_type": _one_of("positional", "fourier", "learned"),
    "mid_block_type": _one_of("UNetMidBlock2D", None),
    "class_embed_type": _one_of(None, "timestep", "identity"),
    "num_class_embeds": _number(1, _WIDE, none=True),
    "num_train_timesteps": _number(1, 10**5, none=True),
}


@dataclasses.dataclass(frozen=True)
class UNet2DFields:
    """What a `UNet2D` is made of; see `UNet2DConfig`.

    Raises:
      ValueError: naming each field whose value cannot be used.
    """

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    patch_size: int = 1
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        bad = [
            f"{field}={getattr(self, field)!r} (needed: {need})" for field, (need, ok) in _NEEDED.items() if not ok(self, field)
        ]
        if bad:
            raise ValueError("this UNet2DModel config cannot be used: " + "; ".join(bad))
        blocks = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == blocks:
            raise ValueError(
                f"down_block_types {self.down_block_types}, up_block_types {self.up_block_types} and block_out_channels "
                f"{self.block_out_channels} must have the same length"
            )
        for types, blocks_known in ((self.down_block_types, DOWN_BLOCKS), (self.up_block_types, UP_BLOCKS)):
            for name in types:
                if name not in blocks_known:
                    raise ValueError(f"block type {name!r} is not implemented here; implemented: {', '.join(blocks_known)}")
        for name, divisor in (
            ("norm_num_groups", self.norm_num_groups),
            ("attn_norm_num_groups", self.attn_norm_num_groups),
            ("attention_head_dim", self.attention_head_dim),
        ):
            if divisor is not None and any(width % divisor for width in self.block_out_channels):
                raise ValueError(f"{name} {divisor} does not divide all of block_out_channels {self.block_out_channels}")
        self._check_skip_blocks()
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ValueError("time_embedding_type 'learned' needs num_train_timesteps, of which it has a row each")
        factor = 2 ** (blocks - 1)
        if self.sample_size % factor:
            raise ValueError(f"sample_size {self.sample_size} cannot be halved {blocks - 1} times; use a multiple of {factor}")
        if self.block_out_channels[0] % 2 or min(self.block_out_channels) < 2:
            raise ValueError(f"block_out_channels {self.block_out_channels}: the first must be even, all at least 2")
        if self.in_channels % self.patch_size**2:
            raise ValueError(f"in_channels {self.in_channels} must be a multiple of patch_size {self.patch_size} squared")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels {self.out_channels} must be in_channels {self.in_channels} (eps) or twice as many (eps and v)"
            )

    def _check_skip_blocks(self) -> None:
        """Those of NCSN++ hand the image on, so that all levels of a way must do so, and it has three channels in diffusers."""
        skips = [["Skip" in kind for kind in kinds] for kinds in (self.down_block_types, self.up_block_types)]
        for name, way in zip(("down_block_types", "up_block_types"), skips, strict=True):
            if any(way) and not all(way):
                raise ValueError(
                    f"{name} {getattr(self, name)}: Skip blocks hand the image on, so all must be of that kind, or none"
                )
        if any(map(any, skips)) and (self.in_channels, self.out_channels) != (3, 3):
            raise ValueError(
                f"in_channels {self.in_channels}, out_channels {self.out_channels}: with Skip blocks both must be 3"
            )
        if self.norm_num_groups is None and not all(map(all, skips)):
            raise ValueError("norm_num_groups None is for networks of Skip blocks alone")
