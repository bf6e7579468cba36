"""What EDM's code (Karras et al. 2022) is told when it makes a network, and what of its state dict are the weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from gdiff_jax.tensor_files import Tensors

# Of Python, where that code is installed, for a pickle cannot be read safely.
EXPORT = (
    "net = pickle.load(open('{name}.pkl', 'rb'))['ema']; torch.save(net.state_dict(), '{name}.pt')\n"
    "json.dump({{'class_name': type(net).__name__, **net.init_kwargs}}, open('{name}.json', 'w'))"
)

# Of training, of its arithmetic, or of a sampler: they change neither the weights' names nor what is computed.
_IGNORED = {"dropout", "use_fp16", "sigma_min", "sigma_max"}
_OF_SONG = dict(model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4, attn_resolutions=(16,))
_OF_DHARIWAL = dict(model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8))
_ONLY_SONG = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
# Of a convolution that resamples, or of what does nothing else; a filter of any other name belongs to no EDM network.
_FILTER = re.compile(r"(enc|dec)\.\d+x\d+_((up|down)\.(conv0|skip)|aux_(up|down|residual))\.resample_filter")
FILTERS = ((1, 1), (1, 3, 3, 1))


@dataclasses.dataclass(frozen=True)
class EDMFields:
    """Keyword arguments of `EDMPrecond` and of its network, `SongUNet` (DDPM++, NCSN++) or `DhariwalUNet` (ADM).

    Raises:
      ValueError: naming each value that cannot be used.
    """

    img_resolution: int
    img_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_type: Literal["SongUNet", "DhariwalUNet"] = "DhariwalUNet"
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    label_dropout: float = 0.0
    sigma_data: float = 0.5
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[int, ...] = (1, 1)

    def __post_init__(self) -> None:
        bad = []
        least = dict(img_resolution=1, img_channels=1, model_channels=8, channel_mult_emb=1, num_blocks=1, channel_mult_noise=1)
        for name, smallest in {**least, "label_dim": 0, "augment_dim": 0}.items():
            greatest = 64 if name == "num_blocks" else 2**16
            if type(value := getattr(self, name)) is not int or not smallest <= value <= greatest:
                bad.append(f"{name}={value!r} (needed: an integer in {smallest}..{greatest})")
        for name in ("channel_mult", "attn_resolutions"):
            value = getattr(self, name)
            if type(value) is not tuple or len(value) > 12 or not all(type(n) is int and 1 <= n <= 4096 for n in value):
                bad.append(f"{name}={value!r} (needed: a list of integers in 1..4096)")
        for name, most in (("label_dropout", 1.0), ("sigma_data", 1e3)):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value <= most:
                bad.append(f"{name}={value!r} (needed: a number in 0..{most:g})")
        for name, known in (
            ("model_type", ("SongUNet", "DhariwalUNet")),
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "skip", "residual")),
            ("decoder_type", ("standard", "skip")),
            ("resample_filter", FILTERS),
        ):
            if (value := getattr(self, name)) not in known:
                bad.append(f"{name}={value!r} (implemented: {' or '.join(map(repr, known))})")
        if not bad:
            bad = self._apart()
        if bad:
            raise ValueError("this EDM network cannot be used: " + "; ".join(bad))

    def _apart(self) -> list[str]:
        """What does not go together, of values that are well by themselves."""
        bad = []
        if not self.channel_mult or self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            bad.append(f"img_resolution {self.img_resolution} cannot be halved for each of channel_mult {self.channel_mult}")
        if self.model_channels % 4 or not self.sigma_data:
            bad.append(f"model_channels {self.model_channels} must be a multiple of 4, sigma_data {self.sigma_data} above 0")
        if self.model_type == "DhariwalUNet":
            usual = {f.name: f.default for f in dataclasses.fields(EDMFields)}
            other = [name for name in _ONLY_SONG if getattr(self, name) != usual[name]]
            bad += [f"{name}={getattr(self, name)!r} is of a SongUNet" for name in other]
        for width in {self.model_channels, *(m * self.model_channels for m in self.channel_mult)}:
            if width % min(32, width // 4):
                bad.append(f"{width} channels cannot have {min(32, width // 4)} groups; see model_channels")
            if self.model_type == "DhariwalUNet" and width >= 64 and width % 64:
                bad.append(f"{width} channels cannot have heads of 64; see model_channels")
        return bad

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> Self:
        """Of the JSON that the two lines of `EXPORT` write.

        Raises:
          ValueError: naming each argument that is unknown, and each value that is not implemented.
        """
        kind = kwargs.get("class_name", "EDMPrecond")
        if kind != "EDMPrecond":
            raise ValueError(f"class_name {kind!r} is not implemented; implemented: 'EDMPrecond', of the models named edm-*")
        own = {f.name for f in dataclasses.fields(cls)}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items() if k not in _IGNORED | {"class_name"}}
        if unknown := sorted(given.keys() - own):
            raise ValueError(f"{', '.join(unknown)}: unknown arguments of an EDM network")
        if "img_resolution" not in given:
            raise ValueError("img_resolution is missing among the arguments of an EDM network")
        usual = _OF_SONG if given.get("model_type") == "SongUNet" else _OF_DHARIWAL
        return cls(**{**usual, **given})  # type: ignore[arg-type]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the network denoises."""
        return self.img_resolution, self.img_resolution, self.img_channels

    @property
    def learns_variance(self) -> bool:
        return False

    @property
    def label_ndim(self) -> int | None:
        """0 where it is told a label, None where it is not conditional."""
        return 0 if self.label_dim else None

    @property
    def num_classes(self) -> int | None:
        return self.label_dim or None

    @property
    def null_label(self) -> int | None:
        """The number after the last class, a vector of zeros, where it was trained with labels left out."""
        return self.label_dim if self.label_dim and self.label_dropout else None

    def weights_of(self, tensors: Tensors) -> Tensors:
        """The tensors that the network computes with: without `model.`, the filters, and what maps an augmentation's label.

        Raises:
          ValueError: where a filter in the file is another one than the arguments say, or a tensor is there twice.
        """
        filters = np.outer(self.resample_filter, self.resample_filter) / sum(self.resample_filter) ** 2
        found: dict[str, np.ndarray] = {}
        origin: dict[str, str] = {}
        for name, value in tensors.items():
            short = name.removeprefix("model.")
            if _FILTER.fullmatch(short):
                if value.shape != (1, 1, *filters.shape) or not np.allclose(value.astype(np.float64)[0, 0], filters, atol=1e-3):
                    raise ValueError(f"{name} is not the resample_filter {self.resample_filter} of its arguments")
            elif not (self.augment_dim and short == "map_augment.weight"):  # at the augmentation "none" it maps zeros
                short = "map_noise.weight" if short == "map_noise.freqs" else short
                if short in found:
                    raise ValueError(f"{origin[short]} and {name} are the same tensor; leave one of them out")
                found[short], origin[short] = value, name
        return found
