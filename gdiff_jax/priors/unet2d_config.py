"""The config of diffusers' `UNet2DModel`: which fields and values are implemented; the others are refused by name and value,
because a network that silently differs gives plausible, wrong reconstructions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from gdiff_jax.parametrisation import Epsilon, Flow, Parametrisation, Sample, Score, V
from gdiff_jax.priors.unet2d import UNet2D
from gdiff_jax.priors.unet2d_fields import UNet2DFields

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
                if name in ("down_block_types", "up_block_types") and isinstance(value, list):
                    values[name] = tuple(v.removeprefix("UNetRes") if isinstance(v, str) else v for v in value)
                if name in ("downsample_type", "upsample_type") and value is None:
                    values[name] = "conv"  # as diffusers has it
                if name == "sample_size" and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
                    values[name] = value[0]
            else:
                bad.append(f"{name}={value!r} (unknown field)")
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

    def check_time(self, parametrisation: Parametrisation, levels: int) -> None:
        """Raises a ValueError where the network cannot be told the times of a prior of so many levels."""
        if self.time_embedding_type == "fourier" and not isinstance(parametrisation, Score | Flow):
            raise ValueError(
                "time_embedding_type 'fourier' takes the logarithm of a noise level, as a ScoreSdeVeScheduler tells it; its "
                f"scheduler's is {parametrisation}"
            )
        if self.time_embedding_type != "learned":
            return
        if not isinstance(parametrisation, Epsilon | Sample | V) or levels > (self.num_train_timesteps or 0):
            raise ValueError(
                f"time_embedding_type 'learned' has a row for each of num_train_timesteps {self.num_train_timesteps}; its "
                f"scheduler has {levels} levels of {parametrisation}"
            )

    @property
    def label_ndim(self) -> int | None:
        """0 where it is told a label, 1 where a vector that is added to the time's, None where it is not conditional."""
        if self.class_embed_type == "identity":
            return 1
        return None if self.class_embed_type is None and self.num_class_embeds is None else 0

    @property
    def null_label(self) -> int | None:
        return None  # whether a row stands for no class is not said

    @property
    def num_classes(self) -> int | None:
        """Of a network with a row for each; None where it is told none, any number, or a vector."""
        return self.num_class_embeds if self.class_embed_type is None else None

    @property
    def learns_variance(self) -> bool:
        """Whether half of the output is v."""
        return self.out_channels == 2 * self.in_channels
