"""What is asked of a sweep, in small parts, each checked by itself. A function takes the part that it needs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar, cast, get_args

from gdiff_jax import images as image_files
from gdiff_jax.errors import need
from gdiff_jax.files import need_folder
from gdiff_jax.mechanisms import text as mechanism_text
from gdiff_jax.methods import (
    DLG,
    DPS,
    DSG,
    METHODS,
    Analytic,
    AnalyticDSG,
    AnalyticMean,
    CalibratedDSG,
    InvertingGradients,
    MeanOfChains,
    Method,
    RedDiff,
    strongest,
)
from gdiff_jax.options import option
from gdiff_jax.priors import BUNDLED, Prior
from gdiff_jax.schedule import Schedule, Spacing
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.victims.zoo import VICTIMS

DEFAULT_SIGMAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
DISTANCES = ("l2", "cosine", "l1")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    need(value in known, f"--{name} {value!r} is not known; known: {', '.join(known)}")


def check_list(name: str, values: tuple[object, ...]) -> None:
    ok = 0 < len(values) == len(set(values))
    need(ok, f"--{name} {','.join(map(str, values))!r} must be non-empty, without repeats")


def check_least(config: object, least: float, *names: str) -> None:
    """That these numbers of a part are finite, and at least so large."""
    for name in names:
        value = getattr(config, name)
        need(math.isfinite(value), f"--{name} {value} must be finite")
        need(value >= least, f"--{name} {value} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class Noise:
    """Noise levels. One rule says which: those that are named, of both grids; the default grid where none is."""

    subject: ClassVar[str] = "Noise levels"
    sigma_grid: tuple[float, ...] = option(
        (), "standard deviations of the noise on the gradient; without a value, or without any grid, "
        f"{','.join(f'{s:g}' for s in DEFAULT_SIGMAS)}", bare=DEFAULT_SIGMAS,
    )  # fmt: skip
    epsilon_grid: tuple[float, ...] = option(
        (), "epsilons at --delta of one release, each giving a sigma, beside those of --sigma_grid where both are given; "
        "needs the mechanism clip:NORM+gaussian",
    )  # fmt: skip
    delta: float = option(1e-5, "delta of every (epsilon, delta) that is asked for or reported")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The standard deviations that are asked for as such."""
        return self.sigma_grid or (() if self.epsilon_grid else DEFAULT_SIGMAS)

    def check(self) -> None:
        for sigma in self.sigma_grid:
            need(math.isfinite(sigma) and sigma >= 0, f"--sigma_grid holds {sigma}; a standard deviation is finite and >= 0")
        for epsilon in self.epsilon_grid:
            need(math.isfinite(epsilon) and epsilon > 0, f"--epsilon_grid holds {epsilon}; an epsilon is finite and above 0")
        for name in ("sigma_grid", "epsilon_grid"):
            if getattr(self, name):
                check_list(name, getattr(self, name))
        need(0 < self.delta < 1, f"--delta {self.delta} must lie in (0, 1), and be well below 1 over the number of examples")

    def levels(self, spec: mechanism_text.Spec, alone: bool = True) -> tuple[float, ...]:
        """Standard deviations that a mechanism is run at, ascending; 0 where it adds none: one `alone` is refused others."""
        if not spec.noisy:
            grid = "--epsilon_grid" if self.epsilon_grid else "--sigma_grid" if any(self.sigma_grid) else ""
            remedy = f"say {spec.text}+gaussian, or leave {grid} out".replace("none+", "")
            need(not (grid and alone), f"{grid}: mechanism {spec.text} adds no noise; {remedy}")
            return (0.0,)
        norm = spec.clip_norm
        need(
            norm is not None or not self.epsilon_grid,
            f"--epsilon_grid with mechanism {spec.text}: an epsilon gives a sigma only where gradients are clipped and the "
            "noise is Gaussian; use clip:1+gaussian, or --sigma_grid",
        )
        if norm is None or not self.epsilon_grid:
            return tuple(sorted(set(self.sigmas)))
        from gdiff_jax.theory import privacy  # not at the start, which need not wait a second for dp_accounting

        of_epsilons = [privacy.gaussian_noise_multiplier(e, self.delta) * norm for e in self.epsilon_grid]
        return tuple(sorted({*self.sigmas, *of_epsilons}))


@dataclasses.dataclass(frozen=True)
class PrivateImages:
    subject: ClassVar[str] = "Private images"
    images: str = option(image_files.BUNDLED, "private images: the bundled set, a folder, a .npz or CIFAR-10's archive")
    num_images: int = option(4, "the first so many images of the set")
    label: int = option(-1, "label of every image; -1 takes the set's own, and 0 where it has none, as the paper does")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")

    def check(self) -> None:
        check_least(self, 1, "num_images", "num_classes")
        check_least(self, -1, "label")


@dataclasses.dataclass(frozen=True)
class Client:
    """What a client releases of its images."""

    subject: ClassVar[str] = "What a client releases"
    group: int = option(1, "images whose mean gradient is one leak, reconstructed together")
    local_steps: int = option(1, "local steps of a FedAvg client; 1 releases the gradient, more the mean gradient on their way")
    local_learning_rate: float = option(0.01, "of the local steps")
    local_batch: int = option(0, "images a local step, a divisor of --group; 0 is all of the group")

    @property
    def splits_images(self) -> bool:
        """Whether a local step takes a part of the images."""
        return self.local_batch not in (0, self.group)

    def check(self, num_images: int) -> None:
        check_least(self, 1, "group", "local_steps")
        rate, group, batch = self.local_learning_rate, self.group, self.local_batch
        need(math.isfinite(rate) and rate > 0, f"--local_learning_rate {rate} must be finite and above 0")
        whole = -(-num_images // group) * group
        need(num_images % group == 0, f"--num_images {num_images} is not a multiple of --group {group}; ask for {whole}")
        ok = batch >= 0 and (batch == 0 or group % batch == 0)
        need(ok, f"--local_batch {batch} does not divide --group {group}; 0 takes all of the group in each step")
        need(
            batch == 0 or self.local_steps > 1,
            f"--local_batch {batch} with --local_steps {self.local_steps}: one gradient is of the whole group; "
            "ask for more --local_steps, or leave --local_batch at 0",
        )


@dataclasses.dataclass(frozen=True)
class Attacks:
    """Which attacks, and their options."""

    subject: ClassVar[str] = "Attacks and their options"
    methods: tuple[str, ...] = option(
        ("dsg", "dps", "auto"),
        f"attacks: {', '.join(METHODS)}, or all; prior-only always runs, analytic ones need a first layer that is dense",
    )
    guidance_rate: float = option(DSG().guidance_rate, "guidance rate of dsg, 0 to 1")
    calibrated_rate: float = option(CalibratedDSG().guidance_rate, "of calibrated-dsg where all is signal, 0 to 1")
    chains: int = option(
        MeanOfChains().chains,
        "reconstructions of a leak that dsg-mean, calibrated-mean and the search of auto combine, 2 or more; auto half as many "
        "where it refines what they find",
    )
    interval: int = option(DSG().interval, "dsg guides every so many steps")
    through_prior: bool = option(
        True, "dsg and dps guide by the gradient in x_t; --nothrough_prior: in x0hat, without the prior's backward pass"
    )
    zeta: float = option(DPS().zeta, "step size of dps, on the un-squared gradient distance")
    red_diff_weight: float = option(RedDiff().weight, "weight of red-diff's regulariser")
    dlg_steps: int = option(DLG().steps, "L-BFGS steps of dlg")
    inverting_steps: int = option(InvertingGradients().steps, "Adam steps of inverting")
    tv: float = option(
        InvertingGradients().tv, "weight of inverting's total variation; best is 1e-3 for a clean cnn, 0.2 under much noise"
    )
    restarts: int = option(1, "of dlg and inverting; the one of least objective counts")
    distance: str = option("l2", f"between gradients, for the guided samplers: {', '.join(DISTANCES)}")
    layer_weights: str = option("none", "none, or equal: every array of the gradient counts the same")

    def check(self) -> None:
        if self.methods != ("all",):
            check_list("methods", self.methods)
            for name in self.methods:
                need(name in METHODS, f"method {name!r} is not known; known: {', '.join(METHODS)}; or all, on its own")
        check_choice("distance", self.distance, DISTANCES)
        check_choice("layer_weights", self.layer_weights, ("none", "equal"))
        check_least(self, 1, "interval", "restarts", "dlg_steps", "inverting_steps")
        need(math.isfinite(self.zeta) and self.zeta >= 0, f"--zeta {self.zeta} must be finite and >= 0; 0 is unguided")
        for name in ("guidance_rate", "calibrated_rate"):
            need(0 <= getattr(self, name) <= 1, f"--{name} {getattr(self, name)} must lie in 0..1")
        need(self.chains >= 2, f"--chains {self.chains} must be at least 2: how far they agree is what is used")
        for name in ("red_diff_weight", "tv"):
            value = getattr(self, name)
            need(math.isfinite(value) and value >= 0, f"--{name} {value} must be finite and >= 0")

    def make(self, joint_labels: bool = False, calibrated: bool = True) -> dict[str, Method]:
        """The methods with their options bound, by name.

        `joint_labels` lets dlg look for the labels too; without `calibrated` auto searches without it, as where the noise is
        not known.
        """
        dsg = DSG(self.guidance_rate, self.interval, self.through_prior)
        by_noise = CalibratedDSG(self.calibrated_rate, self.interval, self.through_prior)
        bound: tuple[Method, ...] = (
            dsg,
            by_noise,
            MeanOfChains(dsg, self.chains),
            MeanOfChains(by_noise, self.chains),
            DPS(self.zeta, self.through_prior),
            RedDiff(self.red_diff_weight),
            DLG(self.dlg_steps, self.restarts, joint_labels),
            InvertingGradients(self.tv, self.inverting_steps, self.restarts),
            Analytic(),
            AnalyticDSG(self.guidance_rate, self.interval, self.through_prior),
            AnalyticMean(),
            strongest(dsg, by_noise if calibrated else None, self.chains),
        )
        by_name = {method.name: method for method in bound}
        return {name: by_name[name] for name in self.methods}


@dataclasses.dataclass(frozen=True)
class PriorOptions:
    subject: ClassVar[str] = "Diffusion prior"
    prior: str = option(
        "cifar10-32", f"diffusion prior: {', '.join(BUNDLED)}, a folder, OWNER/NAME on the hub, an ADM or EDM file"
    )
    prior_dtype: str = option("float32", "arithmetic of the prior: float32 or bfloat16; the victim is always float32")
    prior_remat: bool = option(False, "compute the prior's inner values twice, keep only its blocks' inputs")
    clip: str = option("prior", "clip x0hat to [-1, 1] in every step: yes, no, or what the prior's scheduler says")
    steps: int = option(100, "reverse steps, at most as many as the prior was trained with")
    spacing: str = option("quadratic", "of the prior's steps: quadratic (denser at little noise), uniform or trailing")

    def schedule_of(self, prior: Prior) -> Schedule:
        return prior.schedule(self.steps, cast(Spacing, self.spacing))  # one of them, by `check`

    def check(self) -> None:
        check_choice("prior_dtype", self.prior_dtype, ("float32", "bfloat16"))
        check_choice("clip", self.clip, ("prior", "yes", "no"))
        check_choice("spacing", self.spacing, get_args(Spacing))
        check_least(self, 1, "steps")


@dataclasses.dataclass(frozen=True)
class Run:
    subject: ClassVar[str] = "The run"
    seeds: int = option(1, "trials an image, each with noise, start and steps of its own")
    seed: int = option(0, "of the victims' initial weights and of all random numbers of the trials")
    batch: int = option(8, "trials computed at a time, over all devices; fewer where --memory_gib is too little for so many")
    memory_gib: float = option(
        0.0, "memory of a device, or of all of a CPU, for trials and weights, in GiB; 0: what it has, 3/4 of it on a CPU"
    )
    out: str = option("runs/sweep", "output folder")

    def check(self) -> None:
        check_least(self, 1, "seeds", "batch")
        check_least(self, 0, "memory_gib")
        need_folder(Path(self.out), "--out")


@dataclasses.dataclass(frozen=True)
class Victims:
    subject: ClassVar[str] = "Attacked networks"
    victims: tuple[str, ...] = option(
        ("mlp", "lenet", "cnn"),
        f"attacked networks: {', '.join(VICTIMS)}; or MODULE:FUNCTION or FILE.py:FUNCTION, which returns your own "
        "loss(params, x, y) and params",
    )
    training_steps: tuple[int, ...] = option((0,), "training states of each victim, in steps; 0 is untrained")
    checkpoints: str = option("", "folder of gdiff-train-victim, for training states other than 0")

    def check(self) -> None:
        check_list("victims", self.victims)
        check_list("training_steps", self.training_steps)
        least = min(self.training_steps)
        need(least >= 0, f"--training_steps {least} must not be negative; 0 is untrained")


@dataclasses.dataclass(frozen=True)
class Common:
    """The parts that are asked of a sweep and of an audit."""

    noise: Noise = Noise()
    private: PrivateImages = PrivateImages()
    client: Client = Client()
    attacker: Attacker = Attacker()
    attacks: Attacks = Attacks()
    prior: PriorOptions = PriorOptions()
    run: Run = Run()


@dataclasses.dataclass(frozen=True)
class SweepConfig(Common):
    """All that is asked of a sweep; what the parts must know of each other is checked in `sweeping.checks`."""

    subject: ClassVar[str] = "Mechanisms"
    mechanisms: tuple[str, ...] = option(("gaussian",), mechanism_text.HELP)
    victims: Victims = Victims()
