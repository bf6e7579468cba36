"""What an audit is asked at the command line: the parts of a sweep with an audit's defaults, and what is its own."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from gdiff_jax import images as image_files
from gdiff_jax.errors import need
from gdiff_jax.mechanisms import text as mechanism_text
from gdiff_jax.options import option
from gdiff_jax.sweeping.config import Attacks, Common, Noise, PrivateImages, Run, SweepConfig, Victims
from gdiff_jax.victims.zoo import VICTIMS


@dataclasses.dataclass(frozen=True)
class Model:
    """What is audited."""

    subject: ClassVar[str] = "The model and its gradient"
    victim: str = option("cnn", f"the model: FILE.py:FUNCTION or MODULE:FUNCTION of your own, or {', '.join(VICTIMS)}")
    weights: str = option(
        "", "its weights, a .npz, .safetensors, .msgpack, torch .pt or orbax tree by parameter name; without, its own"
    )
    training_steps: int = option(0, "training state of a built-in model, from --checkpoints; 0 is untrained")
    checkpoints: str = option("", "folder of gdiff-train-victim")
    gradient: str = option("", "a saved gradient to attack, a file as for --weights; with --images its image is known")
    update: bool = option(
        False,
        "the file of --gradient holds the weights after a client's --local_steps, at --local_learning_rate, from --weights on",
    )
    flattened: tuple[str, ...] = option(
        (), "how a torch model flattened the input of a dense layer: NAME:CxHxW, such as fc1.kernel:16x8x8, or NAME:as-is"
    )
    mechanism: str = option("gaussian", mechanism_text.HELP)

    def check(self) -> None:
        need(not self.flattened or self.weights or self.gradient, "--flattened speaks of a file: give --weights or --gradient")
        both = self.gradient and self.weights
        need(both or not self.update, "--update speaks of two files: --weights before the steps, and by --gradient those after")
        steps = self.training_steps
        need(not (self.weights and steps), f"--weights and --training_steps={steps} both name weights; leave one away")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of the trials."""

    subject: ClassVar[str] = "What is reported"
    candidates: str = option("", "images among which the private ones are looked for; without, all of --images")
    threshold: float = option(20.0, "PSNR in dB from which on an image counts as recovered")
    share: float = option(0.1, "look for the noise from which on fewer than this share of the images is recovered")
    more_levels: int = option(
        0,
        "so many noise levels at most are tried beside the grid, where what is recovered or recognised crosses --share",
    )
    data: str = option("", "images like the private ones, whose covariance the van Trees limit takes; without, it is left out")
    spectra: int = option(1, "images whose spectrum of J^T J is computed")
    worst: int = option(
        2,
        "so many of all of --images, told without an attack, that seem to leak most: those beyond --num_images are attacked "
        "besides, outside of all averages; 0 leaves them out",
    )
    fail_if: str = option(
        "",
        "end with exit code 3 where this holds at a noise level: recovered, recognised, psnr or ssim, then >, >=, < or <= and "
        "a number, such as 'recovered > 0.1'",
    )

    def check(self) -> None:
        need(math.isfinite(self.threshold), f"--threshold {self.threshold} must be a finite PSNR in dB, such as 20")
        need(0 < self.share < 1, f"--share {self.share} must lie in (0, 1), such as 0.1 for 10 %")
        need(self.more_levels >= 0, f"--more_levels {self.more_levels} must not be negative; 0 tries the grid alone")
        need(self.worst >= 0, f"--worst {self.worst} must not be negative; 0 leaves the images that leak most out")
        need(self.spectra >= 0, f"--spectra {self.spectra} must not be negative; 0 leaves the spectrum out")


@dataclasses.dataclass(frozen=True)
class AuditPrivateImages(PrivateImages):
    """As of a sweep; which images are meant where none are named depends on --gradient."""

    images: str = option(
        "",
        "private images: a folder, a .zip, a .npz or CIFAR-10's archive; without, "
        f"{image_files.BUNDLED}, or none with --gradient",
    )
    num_images: int = option(12, "the first so many images of the set; all, of a set that has not even as many as by default")


@dataclasses.dataclass(frozen=True)
class AuditAttacks(Attacks):
    methods: tuple[str, ...] = option(
        (),
        "attacks, as for the sweep, or all; without, auto, and, where a first layer is dense, analytic and analytic-dsg",
    )


@dataclasses.dataclass(frozen=True)
class AuditConfig(Common):
    subject: ClassVar[str] = "What is reported"
    private: AuditPrivateImages = AuditPrivateImages()
    attacks: AuditAttacks = AuditAttacks()
    run: Run = Run(seeds=1, out="runs/audit")
    model: Model = Model()
    asked: Asked = Asked()
    from_json: str = option("", "make the report of this audit.json again; nothing is computed, only --out counts")

    @property
    def images_known(self) -> bool:
        """Whether the private images are; those of a saved gradient only where they are named."""
        return bool(self.private.images) or not self.model.gradient

    def completed(self) -> AuditConfig:
        """With what is assumed of a saved gradient where it is not said: that it holds no noise."""
        unsaid = self.model.gradient and self.noise == Noise()
        return dataclasses.replace(self, noise=dataclasses.replace(self.noise, sigma_grid=(0.0,))) if unsaid else self

    @property
    def assumed(self) -> list[str]:
        """What was not said of a saved gradient, and is taken for granted."""
        if not self.model.gradient:
            return []
        label = "its label is the one that its last layer betrays" if self.reads_label else ""
        client = self.client
        steps = f"{client.local_steps} local step{'s' * (client.local_steps > 1)}"
        update = f"it is of {steps} at the learning rate {client.local_learning_rate:g}" if self.model.update else ""
        clean = f"it holds noise of sigma {self.noise.sigmas[0]:g}, and the mechanism is {self.model.mechanism}"
        return [text for text in (label, update, clean) if text]

    @property
    def reads_label(self) -> bool:
        """Whether a saved gradient's label is to be read off it."""
        return bool(self.model.gradient) and not self.images_known and self.private.label < 0

    def check(self) -> None:
        """What the parts must know of each other."""
        self.model.check()
        self.asked.check()
        if not self.model.gradient:
            return
        group, levels = self.client.group, len(self.noise.sigmas)
        need(group == 1, f"--group {group} with --gradient: a saved gradient is attacked as that of one image")
        need(
            not self.noise.epsilon_grid,
            "--gradient holds one noise level: say it by --sigma_grid, not by --epsilon_grid; --sigma_grid=0 if it holds none",
        )
        need(
            levels == 1,
            f"--gradient holds one noise level, --sigma_grid names {levels}: say --sigma_grid=0 if it holds none",
        )
        if self.images_known:
            return
        mechanism = self.model.mechanism
        need(
            "soteria" not in mechanism,
            f"--mechanism {mechanism} with --gradient: what soteria prunes depends on the image; give --images",
        )

    def sweep(self) -> SweepConfig:
        """The sweep that the audit rests on, in the folder OUT/sweep."""
        images = self.private.images or image_files.BUNDLED
        count = 1 if self.model.gradient else self.private.num_images
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(Common)}
        parts["private"] = dataclasses.replace(self.private, images=images, num_images=count)
        parts["run"] = dataclasses.replace(self.run, out=f"{self.run.out}/sweep")
        victims = Victims((self.model.victim,), (self.model.training_steps,), self.model.checkpoints)
        return SweepConfig(**parts, mechanisms=(self.model.mechanism,), victims=victims)
