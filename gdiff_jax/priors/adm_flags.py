"""The flags of ADM's code (guided-diffusion): which of them, and which values, are implemented; others are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from gdiff_jax.schedule import VarianceType, make_betas

# What an empty `channel_mult` means, by image size.
_MULTIPLIERS = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4"}

# Flags of training and sampling that change neither the weights' names nor what they compute.
_IGNORED = {
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
    "rescale_learned_sigmas",
    "timestep_respacing",
    "model_path",
}
_CLASSES = 1000  # of a conditional network: of ImageNet, in the order of its folders' names
_ONLY = {"predict_xstart": False, "rescale_timesteps": False, "num_heads_upsample": -1}


@dataclasses.dataclass(frozen=True)
class ADMFlags:
    """What `ADMConfig` says, but for the network that it builds."""

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: str = ""  # comma-separated multiples of num_channels, a level each; empty means by image_size
    attention_resolutions: str = "16,8"  # comma-separated sizes in pixels
    num_heads: int = 4
    num_head_channels: int = -1  # wins over num_heads unless -1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    sigma_small: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    class_cond: bool = False

    def __post_init__(self) -> None:
        for name, most in (("image_size", 4096), ("num_channels", 4096), ("num_res_blocks", 64), ("diffusion_steps", 10**5)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} {value!r} must be an integer in 1..{most}")
        if self.num_heads < 1 or (self.num_head_channels < 1 and self.num_head_channels != -1):
            raise ValueError(
                f"num_heads {self.num_heads} must be at least 1, num_head_channels {self.num_head_channels} at least 1 or -1"
            )
        if not self.channel_mult and self.image_size not in _MULTIPLIERS:
            raise ValueError(f"channel_mult is needed for image_size {self.image_size}, such as '1,2,2'")
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"image_size {self.image_size} cannot be halved {len(self.widths) - 1} times; see channel_mult")
        for width in self.widths:
            if width % 32 or width < 1:
                raise ValueError(f"channels {width} of a level must be a multiple of 32, the groups of its norms")
        sizes = [self.image_size // 2**level for level in range(len(self.widths))]
        attended = [width for width, size in zip(self.widths, sizes, strict=True) if size in self.attention_sizes]
        for width in [*attended, self.widths[-1]]:
            divisor = self.num_heads if self.num_head_channels == -1 else self.num_head_channels
            if width % divisor:
                raise ValueError(f"attention: {width} channels are no multiple of num_head_channels or num_heads {divisor}")
        if self.noise_schedule not in ("linear", "cosine"):
            raise ValueError(f"noise_schedule {self.noise_schedule!r} is not implemented; implemented: linear, cosine")
        if not np.all((self.betas > 0) & (self.betas < 1)):
            raise ValueError(f"diffusion_steps {self.diffusion_steps} are too few: betas reach {self.betas.max()}")

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Self:
        """Config from guided-diffusion's flags, as a dict of values or of their text.

        Raises:
          ValueError: naming each flag that is unknown, and each value that is not implemented.
        """
        types = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        bad = []
        for name, value in flags.items():
            if name in types:
                try:
                    values[name] = _parse(value, types[name])
                except (ValueError, TypeError, OverflowError):
                    bad.append(f"{name}={value!r} (a {types[name].__name__} is needed)")
            elif name in _ONLY:
                if value not in (_ONLY[name], str(_ONLY[name])):
                    bad.append(f"{name}={value!r} (implemented: {_ONLY[name]!r})")
            elif name not in _IGNORED:
                bad.append(f"{name}={value!r} (unknown flag)")
        if bad:
            raise ValueError("these ADM flags cannot be used: " + "; ".join(bad))
        return cls(**values)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the network denoises."""
        return self.image_size, self.image_size, 3

    @property
    def learns_variance(self) -> bool:
        """Whether half of the output is v."""
        return self.learn_sigma

    @property
    def label_ndim(self) -> int | None:
        """0 where it is told a label, None where it is not conditional."""
        return 0 if self.class_cond else None

    @property
    def null_label(self) -> int | None:
        return None  # whether a row stands for no class is not said

    @property
    def num_classes(self) -> int | None:
        return _CLASSES if self.class_cond else None

    @property
    def betas(self) -> np.ndarray:
        """(T,) float64. The linear ones keep their integral when T is not 1000."""
        if self.noise_schedule == "cosine":
            return make_betas("squaredcos_cap_v2", self.diffusion_steps)
        scale = 1000 / self.diffusion_steps
        return make_betas("linear", self.diffusion_steps, scale * 1e-4, scale * 0.02)

    @property
    def variance(self) -> VarianceType:
        if self.learn_sigma:
            return "learned_range"
        return "fixed_small" if self.sigma_small else "fixed_large"

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        text = self.channel_mult or _MULTIPLIERS[self.image_size]
        try:
            return [int(float(m) * self.num_channels) for m in text.split(",")]
        except (ValueError, OverflowError):
            raise ValueError(f"channel_mult {text!r} must be numbers with commas between, such as '1,2,2'") from None

    @property
    def attention_sizes(self) -> set[int]:
        try:
            return {int(size) for size in self.attention_resolutions.split(",") if size}
        except ValueError:
            raise ValueError(
                f"attention_resolutions {self.attention_resolutions!r} must be sizes in pixels with commas between"
            ) from None

    def heads(self, channels: int) -> int:
        return self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels


def _parse(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError
        return str(value).lower() == "true"
    if kind is str:
        if isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError
        return str(value)
    if isinstance(value, (bool, float)):
        raise ValueError
    return int(value)
