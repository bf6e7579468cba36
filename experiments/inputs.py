"""What a sweep is asked for: its flags, and everything they name, loaded and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

import gdiff_jax as gd
from experiments import attackers, mechanism_specs, victim_files
from experiments.cli import ConfigError, option
from experiments.methods import DEFAULT, DISTANCES, METHODS, applies, hindrances
from gdiff_jax import images as image_files
from gdiff_jax import modules
from gdiff_jax.priors import BUNDLED
from gdiff_jax.samplers.ensemble import CHAINS
from gdiff_jax.signal import CALIBRATED_RATE

DEFAULT_SIGMAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
PROXY_SAMPLES = 16  # of the prior, for the statistics of BatchNorms


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    sigma_grid: tuple[float, ...] = option(
        DEFAULT_SIGMAS, "standard deviations of the noise on the gradient; without a value the default grid", bare=True
    )
    epsilon_grid: tuple[float, ...] = option(
        (),
        "epsilons at --delta of one release, each giving a sigma; needs --mechanisms=clip:NORM+gaussian. Beside "
        "--sigma_grid where both are given",
    )
    delta: float = option(1e-5, "delta of every (epsilon, delta) that is asked for or reported")
    mechanisms: tuple[str, ...] = option(("gaussian",), mechanism_specs.HELP)
    attacker: str = option("informed", f"threat model: {', '.join(attackers.ATTACKERS)}; it sets the next four flags")
    labels: str = option("known", f"labels are {', '.join(attackers.LABELS)} (with the image, by dlg; inferred for the others)")
    adaptive: bool = option(True, "the attacker knows the mechanism and matches through it")
    local_rate: str = option("known", "learning rate of the local steps: known, or guessed from the last bias")
    statistics: str = option("known", "of BatchNorms: known, batch (the candidate's own) or replaced (of the prior's samples)")
    methods: tuple[str, ...] = option(
        DEFAULT, f"attacks: {', '.join(METHODS)}, or all; prior-only always runs, analytic ones need an mlp"
    )
    victims: tuple[str, ...] = option(
        ("mlp", "lenet", "cnn"),
        f"attacked networks: {', '.join(victim_files.VICTIMS)}; or MODULE:FUNCTION or FILE.py:FUNCTION, which returns your own "
        "loss(params, x, y) and params",
    )
    training_steps: tuple[int, ...] = option((0,), "training states of each victim, in steps; 0 is untrained")
    checkpoints: str = option("", "folder of experiments/train_victim.py, for training states other than 0")
    images: str = option(image_files.BUNDLED, "private images: the bundled set, a folder, a .npz or CIFAR-10's archive")
    num_images: int = option(4, "the first so many images of the set")
    group: int = option(1, "images whose mean gradient is one leak, reconstructed together")
    local_steps: int = option(1, "local steps of a FedAvg client; 1 releases the gradient, more the mean gradient on their way")
    local_learning_rate: float = option(0.01, "of the local steps")
    local_batch: int = option(0, "images a local step, a divisor of --group; 0 is all of the group")
    label: int = option(-1, "label of every image; -1 takes the set's own, and 0 where it has none, as the paper does")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")
    seeds: int = option(1, "trials an image, each with noise, start and steps of its own")
    seed: int = option(0, "of the victims' initial weights and of all random numbers of the trials")
    steps: int = option(100, "reverse steps, at most as many as the prior was trained with")
    spacing: str = option(
        "quadratic", "of the steps over the prior's: quadratic (denser where there is little noise) or uniform"
    )
    zeta: float = option(8.0, "step size of dps, on the un-squared gradient distance")
    guidance_rate: float = option(0.2, "guidance rate of dsg, 0 to 1")
    calibrated_rate: float = option(CALIBRATED_RATE, "guidance rate of calibrated-dsg where all is signal, 0 to 1")
    chains: int = option(CHAINS, "reconstructions of a leak that dsg-mean and calibrated-mean combine, 2 or more")
    interval: int = option(1, "dsg guides every so many steps")
    through_prior: bool = option(
        True,
        "dsg and dps guide by the gradient in x_t; --nothrough_prior: in x0hat, without the prior's backward pass",
    )
    red_diff_weight: float = option(0.5, "weight of red-diff's regulariser")
    distance: str = option("l2", f"between gradients, for the guided samplers: {', '.join(DISTANCES)}")
    layer_weights: str = option("none", "none, or equal: every array of the gradient counts the same")
    dlg_steps: int = option(2000, "L-BFGS steps of dlg")
    inverting_steps: int = option(4000, "Adam steps of inverting")
    tv: float = option(1e-2, "weight of inverting's total variation; the best is 1e-3 for a clean cnn, 0.2 under much noise")
    restarts: int = option(1, "of dlg and inverting; the one of least objective counts")
    clip: str = option("prior", "clip x0hat to [-1, 1] in every step: yes, no, or what the prior's scheduler says")
    prior: str = option("cifar10-32", f"diffusion prior: {', '.join(BUNDLED)}, a folder, OWNER/NAME on the hub, or an ADM file")
    prior_dtype: str = option("float32", "arithmetic of the prior: float32 or bfloat16; the victim is always float32")
    prior_remat: bool = option(False, "compute the prior's inner values twice, keep only its blocks' inputs")
    batch: int = option(8, "trials computed at a time, over all devices; fewer where --memory_gib is too little for so many")
    memory_gib: float = option(
        0.0, "memory of a device, or of all of a CPU, for trials and weights, in GiB; 0: what it has, 3/4 of it on a CPU"
    )
    out: str = option("runs/sweep", "output folder")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that a configuration names, loaded and checked; nothing has been compiled or written."""

    prior: gd.Prior
    schedule: gd.Schedule
    images: np.ndarray  # (N, H, W, C) in [-1, 1]
    labels: np.ndarray
    names: tuple[str, ...]
    mechanisms: dict[str, mechanism_specs.Spec]
    sigmas: dict[str, tuple[float, ...]]  # by mechanism, ascending
    victims: dict[str, gd.Victim | victim_files.OwnVictim]
    params: dict[tuple[str, int], Any]  # by victim and training steps
    proxy: np.ndarray  # (N, H, W, C) images that every attacker has: the prior's mean image, or samples of it
    hashes: dict[str, Any]
    leak: Any = None  # a gradient from elsewhere, shaped as the params, in place of those of the images


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def check_numbers(c: SweepConfig) -> None:
    """What can be said against a configuration without loading what it names."""
    _need(len(c.sigma_grid + c.epsilon_grid) > 0, "--sigma_grid is empty; give standard deviations such as 0,1e-3,1e-2")
    for sigma in c.sigma_grid:
        _need(math.isfinite(sigma) and sigma >= 0, f"--sigma_grid holds {sigma}; a standard deviation is finite and >= 0")
    for epsilon in c.epsilon_grid:
        _need(math.isfinite(epsilon) and epsilon > 0, f"--epsilon_grid holds {epsilon}; an epsilon is finite and above 0")
    _need(0 < c.delta < 1, f"--delta {c.delta} must lie in (0, 1), and be well below 1 over the number of examples")
    for name in ("sigma_grid", "epsilon_grid", "mechanisms", "methods", "victims", "training_steps"):
        values = getattr(c, name)
        ok = len(set(values)) == len(values) and (len(values) > 0 or name.endswith("grid"))
        _need(ok, f"--{name} {','.join(map(str, values))!r} must be non-empty, without repeats")
    for method in c.methods:
        _need(method in METHODS, f"method {method!r} is not known; known: {', '.join(METHODS)}; or all, on its own")
    _check_choice("attacker", c.attacker, tuple(attackers.ATTACKERS))
    _check_choice("labels", c.labels, attackers.LABELS)
    _check_choice("local_rate", c.local_rate, attackers.RATES)
    _check_choice("statistics", c.statistics, attackers.STATISTICS)
    _check_choice("distance", c.distance, tuple(DISTANCES))
    _check_choice("layer_weights", c.layer_weights, ("none", "equal"))
    counts = ("num_images", "seeds", "steps", "interval", "batch", "num_classes", "group", "local_steps", "restarts")
    for name in (*counts, "dlg_steps", "inverting_steps"):
        _need(getattr(c, name) >= 1, f"--{name} {getattr(c, name)} must be at least 1")
    _need(min(c.training_steps) >= 0, f"--training_steps {min(c.training_steps)} must not be negative; 0 is untrained")
    _need(math.isfinite(c.zeta) and c.zeta >= 0, f"--zeta {c.zeta} must be finite and >= 0; 0 is unguided")
    for name in ("guidance_rate", "calibrated_rate"):
        _need(0 <= getattr(c, name) <= 1, f"--{name} {getattr(c, name)} must lie in 0..1")
    _need(c.chains >= 2, f"--chains {c.chains} must be at least 2: how far they agree is what is used")
    for method in c.methods:
        against = " ".join(hindrances(method, c))
        _need(
            not against,
            f"--methods {method} cannot be run with {against}: it draws from the noise"
            + (", and compares one gradient, all of it known, by l2" if METHODS[method].calibrated else "")
            + "; leave one of them away",
        )
    for name in ("red_diff_weight", "tv"):
        _need(math.isfinite(getattr(c, name)) and getattr(c, name) >= 0, f"--{name} {getattr(c, name)} must be finite and >= 0")
    _check_choice("spacing", c.spacing, ("uniform", "quadratic"))
    _check_choice("clip", c.clip, ("prior", "yes", "no"))
    _need(math.isfinite(c.memory_gib) and c.memory_gib >= 0, f"--memory_gib {c.memory_gib} must be finite and >= 0")
    _check_choice("prior_dtype", c.prior_dtype, ("float32", "bfloat16"))
    _check_clients(c)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    _need(value in known, f"--{name} {value!r} is not known; known: {', '.join(known)}")


def _check_clients(c: SweepConfig) -> None:
    """What is released, and what an attacker is asked to do with it."""
    rate = c.local_learning_rate
    _need(math.isfinite(rate) and rate > 0, f"--local_learning_rate {rate} must be finite and above 0")
    _need(
        c.num_images % c.group == 0,
        f"--num_images {c.num_images} is not a multiple of --group {c.group}; ask for {-(-c.num_images // c.group) * c.group}",
    )
    ok = c.local_batch >= 0 and (c.local_batch == 0 or c.group % c.local_batch == 0)
    _need(ok, f"--local_batch {c.local_batch} does not divide --group {c.group}; 0 takes all of the group in each step")
    _need(
        c.local_batch == 0 or c.local_steps > 1,
        f"--local_batch {c.local_batch} with --local_steps {c.local_steps}: one gradient is of the whole group; "
        "ask for more --local_steps, or leave --local_batch at 0",
    )
    normed = list(filter(victim_files.has_batch_norm, c.victims))
    if normed:
        _need(
            c.statistics != "known" or c.local_steps == 1,
            f"--statistics=known with --local_steps {c.local_steps}: {normed[0]} has other statistics in each step; "
            "use --statistics=batch or replaced",
        )
        _need(
            c.labels != "joint" or c.statistics == "batch" or "dlg" not in c.methods,
            f"--labels=joint with --statistics={c.statistics}: dlg on {normed[0]} can optimise labels only "
            "with the candidate's own statistics; use --statistics=batch",
        )
    clips = [text for text in c.mechanisms if "clip" in text]
    guessed = c.local_steps > 1 and c.local_rate == "guessed"
    _need(
        not (clips and guessed and c.adaptive),
        f"--local_rate=guessed with --mechanisms={clips and clips[0]}: the norm that it clips to is in units of the rate; "
        "use --local_rate=known, or --noadaptive",
    )


def _sigmas(c: SweepConfig, spec: mechanism_specs.Spec) -> tuple[float, ...]:
    """The standard deviations that a mechanism is run at: of both grids, or 0 alone where it adds no noise."""
    if not spec.noisy:
        _need(not c.epsilon_grid or len(c.mechanisms) > 1, f"--epsilon_grid: --mechanisms {spec.text} adds no noise")
        return (0.0,)
    norm = spec.clip_norm
    _need(
        norm is not None or not c.epsilon_grid,
        f"--epsilon_grid with --mechanisms {spec.text}: an epsilon gives a sigma only where "
        "gradients are clipped and the noise is Gaussian; use --mechanisms=clip:1+gaussian, or --sigma_grid",
    )
    if norm is None or not c.epsilon_grid:
        return tuple(sorted(set(c.sigma_grid)))
    from gdiff_jax.theory import privacy  # not at the start, which need not wait a second for dp_accounting

    found = [privacy.gaussian_noise_multiplier(e, c.delta) * norm for e in c.epsilon_grid]
    return tuple(sorted({*c.sigma_grid, *found}))


def read_images(
    flag: str, source: str, split: image_files.Split, prior: str, shape: tuple[int, int, int]
) -> image_files.ImageSet:
    """The images that a flag names, of the shape that the prior takes; ConfigError where they cannot be had."""
    try:
        data = image_files.load_images(source, split, size=shape[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{flag}: {error}") from None
    _need(
        data.images.shape[1:] == shape,
        f"--{flag} {source}: images are {data.images.shape[1:]}, prior {prior} takes {shape}; "
        "use images of that shape or another --prior",
    )
    return data


def _load_images(c: SweepConfig, shape: tuple[int, int, int]) -> image_files.ImageSet:
    data = read_images("images", c.images, "test", c.prior, shape)
    _need(c.num_images <= len(data), f"--num_images {c.num_images}: {c.images} holds {len(data)}; ask for fewer")
    data = data.take(slice(0, c.num_images))
    if c.label >= 0:
        data = dataclasses.replace(data, labels=np.full(len(data), c.label, np.int32))
    if data.labels is None:
        print(f"{c.images} has no labels; every image gets label 0 (--label gives another, sub-folders give classes)")
        data = dataclasses.replace(data, labels=np.zeros(len(data), np.int32))
    for name, label in zip(data.names, data.labels.tolist(), strict=True):
        ok = 0 <= label < c.num_classes
        _need(ok, f"label {label} of {name} is outside 0..{c.num_classes - 1}; change --label or --num_classes")
    return data


def _unknown_image(c: SweepConfig, shape: tuple[int, int, int]) -> image_files.ImageSet:
    """Grey, to check a loss with."""
    _need(0 <= c.label < c.num_classes, f"--label {c.label} is outside 0..{c.num_classes - 1}; change it or --num_classes")
    return image_files.ImageSet(np.full((1, *shape), 128, np.uint8), np.array([c.label], np.int32), ("unknown",))


def load_inputs(c: SweepConfig, images_known: bool = True) -> Inputs:
    """Loads and checks what `c` names; without `images_known` one image of unknown pixels, nan, takes the place of --images.

    Raises:
      ConfigError: with the value and the remedy, for the first thing that cannot be used.
    """
    check_numbers(c)
    mechanisms = {text: mechanism_specs.parse(text) for text in c.mechanisms}
    sigmas = {text: _sigmas(c, spec) for text, spec in mechanisms.items()}
    try:
        prior = gd.load_prior(c.prior, c.prior_dtype, remat=c.prior_remat)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prior: {error}") from None
    _need(c.steps <= len(prior.betas), f"--steps {c.steps}: prior {c.prior} was trained with {len(prior.betas)}; ask for fewer")
    data = _load_images(c, prior.image_shape) if images_known else _unknown_image(c, prior.image_shape)
    victims, params, trained = {}, {}, {}
    for name in c.victims:
        if victim_files.is_own(name):
            _check_own(c, name)
            victims[name], params[name, 0] = victim_files.load_own(name, c.num_classes)
            first = image_files.to_model(data.images[0]), data.labels[0]
            victim_files.check_own(name, victims[name], params[name, 0], *first)
            victims[name] = victim_files.find_first_dense(victims[name], params[name, 0], first[0].shape, first[1])
            trained[f"{name}/0"] = modules.digest(params[name, 0])
        else:
            victims[name] = victim_files.make_victim(name, prior.image_shape, c.num_classes)
    for method in c.methods:
        _need(
            any(applies(method, victim, c.group) for victim in victims.values()),
            f"--methods {method} needs a victim whose first layer is dense, such as mlp, and --group=1; "
            f"there are {','.join(c.victims)} and --group={c.group}",
        )
    for name, victim in victims.items():
        for steps in c.training_steps:
            if (name, steps) in params:
                continue
            if steps:
                params[name, steps], _ = victim_files.load(c.checkpoints, name, steps, victim)
                trained[f"{name}/{steps}"] = modules.digest(params[name, steps])
            else:
                params[name, steps] = victim_files.init_params(name, victim, c.seed)
    if c.clip != "prior":
        prior = dataclasses.replace(prior, clip=c.clip == "yes")
    hashes = {
        "prior": prior.sha256,
        "prior_settings": prior.settings_sha256,
        "prior_revision": prior.revision,
        "images": data.sha256,
        "trained_victims": trained,
    }
    images = image_files.to_model(data.images)
    if not images_known:
        images = np.full_like(images, np.nan)
    schedule = prior.schedule(c.steps, c.spacing)
    proxy = _proxy(c, prior, any(victim.has_batch_norm for victim in victims.values()))
    return Inputs(prior, schedule, images, data.labels, data.names, mechanisms, sigmas, victims, params, proxy, hashes)


def _check_own(c: SweepConfig, name: str) -> None:
    """What is known of a network of the user's own is its loss: what needs more of it is refused."""
    _need(c.training_steps == (0,), f"--training_steps with --victims {name}: it has the weights that its function returns")
    _need(c.labels == "known", f"--labels={c.labels} with --victims {name}: labels are read off built-in networks only")
    pruned = [text for text in c.mechanisms if "soteria" in text]
    _need(not pruned, f"--mechanisms {pruned and pruned[0]} with --victims {name}: soteria prunes built-in networks only")


def _proxy(c: SweepConfig, prior: gd.Prior, normed: bool) -> np.ndarray:
    """Samples of the prior where BatchNorms are fed with them, else its mean image, or mid-grey where it has none."""
    if normed and c.statistics == "replaced":
        keys = jax.random.split(jax.random.fold_in(jax.random.key(c.seed), 2**17), PROXY_SAMPLES)
        sample = lambda denoise, schedule, k: gd.unguided_sample(k, denoise, schedule, prior.image_shape, clip=prior.clip)
        schedule = prior.schedule(c.steps, c.spacing)
        return np.asarray(jax.jit(jax.vmap(sample, (None, None, 0)))(prior.denoise, schedule, keys)[0])
    return prior.expected_image[None]


def for_victims(c: SweepConfig) -> SweepConfig:
    """`c` with --methods=all written out: every method that can be run against one of its victims at least."""
    if c.methods != ("all",):
        return c
    victims = [victim_files.VICTIMS[name]() for name in c.victims if name in victim_files.VICTIMS]
    dense = lambda method: not METHODS[method].dense or any(applies(method, victim, c.group) for victim in victims)
    fits = lambda method: dense(method) and not hindrances(method, c)
    return dataclasses.replace(c, methods=tuple(filter(fits, METHODS)))
