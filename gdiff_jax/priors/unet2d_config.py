"""The config of diffusers' `UNet2DModel`: which fields and values are implemented; the others are refused by name and value,
because a network that silently differs gives plausible, wrong reconstructions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from gdiff_jax.priors.unet2d import UNet2D
from gdiff_jax.priors.unet2d_fields import UNet2DFields

# Fields that diffusers' config may hold and that only one value of is implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "num_train_timesteps": (None,),
}
# What diffusers' `EMAModel.save_pretrained` puts beside the network's fields: how its weights were averaged.
_OF_AVERAGING = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(UNet2DFields):
    """The config fields of `UNet2DModel` that change the network; defaults are the class defaults of diffusers 0.42.

    `sample_size` counts the network's own pixels. `patch_size` p is ours: the image is folded by space-to-depth before
    the network (H, W, C) -> (H/p, W/p, C p p) and unfolded after, so that a small network sees a large image at the cost of a
    small one; `in_channels` is then C p p.
    """

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNet2DConfig:
        """Config from the dict of a diffusers `config.json`.

        Raises:
          ValueError: naming each field whose value is not implemented, and each unknown field.
        """
        own = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        bad = []
        for name, value in config.items():
            if name.startswith("_") or name in _OF_AVERAGING:
                continue
            if name in own:
                values[name] = tuple(value) if isinstance(value, list) else value
                if name == "sample_size" and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
                    values[name] = value[0]
            elif name not in _ONLY:
                bad.append(f"{name}={value!r} (unknown field)")
            elif value not in _ONLY[name]:
                bad.append(f"{name}={value!r} (implemented: {_ONLY[name][0]!r})")
        if type(values.get("sample_size")) is not int:
            bad.append(f"sample_size={config.get('sample_size')!r} (implemented: one integer)")
        if bad:
            raise ValueError("this UNet2DModel config cannot be loaded: " + "; ".join(bad))
        # Files older than the field mean one head; today's default of 8 would apply silently.
        if "attention_head_dim" not in config and str(config.get("_diffusers_version", "")).startswith("0.0."):
            values["attention_head_dim"] = None
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The dict that `from_diffusers` reads back."""
        return {"_class_name": "UNet2DModel", **dataclasses.asdict(self)}

    def build(self, rngs: nnx.Rngs) -> UNet2D:
        """The network, freshly initialised."""
        return UNet2D(self, rngs)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the network denoises."""
        size = self.sample_size * self.patch_size
        return size, size, self.in_channels // self.patch_size**2

    @property
    def learns_variance(self) -> bool:
        """Whether half of the output is v."""
        return self.out_channels == 2 * self.in_channels
