"""From what is asked for, by name, to a plan: everything loaded and checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gdiff_jax import images as image_files
from gdiff_jax import modules, numerics
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import say, shown
from gdiff_jax.matching import Distance, cosine, l1, l2
from gdiff_jax.mechanisms import text as mechanism_text
from gdiff_jax.methods import METHODS, Method
from gdiff_jax.options import flat
from gdiff_jax.priors import Prior, load_prior
from gdiff_jax.sweeping import checks, processes
from gdiff_jax.sweeping.conditioning import check_classes, sample_unguided
from gdiff_jax.sweeping.config import PriorOptions, PrivateImages, SweepConfig
from gdiff_jax.sweeping.plan import Plan, VictimState, first_leak
from gdiff_jax.victims import Victim, checkpoints, own, zoo
from gdiff_jax.victims.checks import check_loss, of_one_image
from gdiff_jax.victims.label_range import check_label_range

PROXY_SAMPLES = 16  # of the prior, for the statistics of BatchNorms
DISTANCES: dict[str, Distance] = {"l2": l2, "cosine": cosine, "l1": l1}
# What does not change the results: where they go, and where weights come from that are known by their hash.
WITHOUT_EFFECT = ("out", "checkpoints", "memory_gib")


def parse_mechanisms(texts: tuple[str, ...]) -> dict[str, mechanism_text.Spec]:
    try:
        return {text: mechanism_text.parse(text) for text in texts}
    except ValueError as error:
        raise ConfigError(f"--mechanisms: {error}") from None


Weighted = Callable[[own.OwnVictim, Any], tuple[own.OwnVictim, Any]]


def load(config: SweepConfig, images_known: bool = True, weighted: Weighted = lambda victim, params: (victim, params)) -> Plan:
    """Loads and checks what `config` names.

    Without `images_known` one image of unknown pixels, nan, stands for the private ones. A victim of the user's own and its
    weights are what `weighted` makes of them.

    Raises:
      ConfigError: with the value and the remedy, for the first thing that cannot be used.
    """
    mechanisms = parse_mechanisms(config.mechanisms)
    config = checks.write_out_all(config, mechanisms)
    checks.check(config, mechanisms)
    numerics.check_seed(config.run.seed)
    sigmas = {text: config.noise.levels(spec, len(mechanisms) == 1) for text, spec in mechanisms.items()}
    prior = load_prior_of(config.prior)
    shape, classes = prior.image_shape, config.private.num_classes
    data = load_private(config.private, config.prior.prior, shape) if images_known else _unknown_image(config.private, shape)
    images, labels = image_files.to_model(data.images), np.asarray(data.labels)
    group = config.client.group
    if images_known:
        whole = len(images) // group * group  # a small set may have fewer than are taken by default
        few = f"{config.private.images} holds {len(images)} images, no whole number of groups of {group}"
        need(whole == len(images), f"{few}; " + (f"ask for --num_images={whole}" if whole else "give a smaller --group"))
    victims, own_params, hashes = _load_victims(config.victims.victims, classes, group, images, labels, weighted)
    calibrated = not checks.hindrances(
        METHODS["calibrated-mean"], config.attacker, config.client, config.attacks.distance, mechanisms
    )
    methods = config.attacks.make(config.attacker.knowledge.labels == "joint", calibrated)
    _check_fits(methods, victims, group)
    check_classes(prior, victims, labels)
    params, trained = _load_params(config, victims, own_params, data)
    normed = any(victim.has_batch_norm for victim in victims.values())
    plan = Plan(
        prior=prior,
        schedule=config.prior.schedule_of(prior),
        images=images if images_known else np.full_like(images, np.nan),
        labels=labels,
        names=data.names,
        reading=data.reading,
        victims=victims,
        params=params,
        mechanisms=dict(mechanisms),
        sigmas=sigmas,
        methods=methods,
        attacker=config.attacker,
        client=config.client,
        proxy=prior.expected_image[None],
        delta=config.noise.delta,
        seeds=config.run.seeds,
        seed=config.run.seed,
        distance=DISTANCES[config.attacks.distance],
        equal_layers=config.attacks.layer_weights == "equal",
        identity=identity(config, prior, sigmas, images=data.sha256, trained_victims={**trained, **hashes}),
    )
    if normed and config.attacker.knowledge.statistics == "replaced":
        plan = dataclasses.replace(plan, proxy=prior_samples(plan))
    return plan


def identity(config: SweepConfig, prior: Prior, sigmas: dict[str, Any], **hashes: Any) -> dict[str, Any]:
    """Everything that decides the results of a sweep."""
    asked = {name: value for name, value in flat(config).items() if name not in WITHOUT_EFFECT}
    asked |= {"sigmas": sigmas, **dataclasses.asdict(config.attacker.knowledge)}
    of_prior = {"prior": prior.sha256, "prior_settings": prior.settings_sha256, "prior_revision": prior.revision}
    return {**asked, "sha256": {**of_prior, **hashes}}


def load_prior_of(options: PriorOptions) -> Prior:
    try:
        prior = load_prior(options.prior, options.prior_dtype, remat=options.prior_remat)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prior: {error}") from None
    trained = len(prior.betas)
    need(options.steps <= trained, f"--steps {options.steps}: prior {options.prior} was trained with {trained}; ask for fewer")
    return prior if options.clip == "prior" else dataclasses.replace(prior, clip=options.clip == "yes")


def read_images(
    flag: str, source: str, split: image_files.Split, prior: str, shape: tuple[int, int, int], count: int | None = None
) -> image_files.ImageSet:
    """The images that a flag names, at most the first `count`, of the shape that the prior takes.

    Raises:
      ConfigError: where they cannot be had.
    """
    try:
        data = image_files.load_images(source, split, size=shape[0], channels=shape[-1], count=count)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{flag}: {error}") from None
    need(
        data.images.shape[1:] == shape,
        f"--{flag} {source}: images are {data.images.shape[1:]}, prior {prior} takes {shape}; "
        "use images of that shape or another --prior",
    )
    return data


def load_private(private: PrivateImages, prior: str, shape: tuple[int, int, int]) -> image_files.ImageSet:
    """The private images, each with a label; tells which class has which, and how the files were read."""
    source, count, label = private.images, private.num_images, private.label
    data = read_images("images", source, "test", prior, shape, count)
    if len(data) < count == type(private)().num_images:  # which nobody need have asked for
        say(f"{source} holds {len(data)} images, fewer than the {count} that are taken unless told otherwise: all are taken")
    else:
        need(count <= len(data), f"--num_images {count}: {source} holds {len(data)}; ask for fewer")
    if label >= 0:
        data = dataclasses.replace(data, labels=np.full(len(data), label, np.int32), classes=())
    need(
        data.labels is not None or not data.classes,
        f"--images {source}: pictures lie beside the folders of classes ({', '.join(data.classes[:5])}), and have no label; "
        "move them into one, or give --label",
    )
    tell(source, data)
    if data.labels is None:
        say(f"{source} has no labels; every image gets label 0 (--label gives another, sub-folders give classes)")
        data = dataclasses.replace(data, labels=np.zeros(len(data), np.int32))
    last = private.num_classes - 1
    for name, value in zip(data.names, np.asarray(data.labels).tolist(), strict=True):
        need(0 <= value <= last, f"label {value} of {name} is outside 0..{last}; change --label or --num_classes")
    return data


def tell(source: str, data: image_files.ImageSet) -> None:
    """Prints, once of several processes, which label each class has and how the files were read."""
    for line in data.told(source) if processes.is_first() else ():
        say(line)


def _unknown_image(private: PrivateImages, shape: tuple[int, int, int]) -> image_files.ImageSet:
    """Grey, to check a loss with."""
    label, last = max(private.label, 0), private.num_classes - 1  # below 0: to be read off the leak
    need(0 <= label <= last, f"--label {label} is outside 0..{last}; change it or --num_classes")
    return image_files.ImageSet(np.full((1, *shape), 128, np.uint8), np.array([label], np.int32), ("unknown",))


def _load_victims(
    names: tuple[str, ...], num_classes: int, group: int, images: np.ndarray, labels: np.ndarray, weighted: Weighted
) -> tuple[dict[str, Victim | own.OwnVictim], dict[str, Any], dict[str, str]]:
    """Victims by name; the weights of those of the user's own, checked at an image or a group; hashes of their losses."""
    victims: dict[str, Victim | own.OwnVictim] = {}
    params, hashes = {}, {}
    shape = images.shape[1:]
    for given in names:
        name = shown(given)  # in records; only the file itself is found by bytes that are not UTF-8
        try:
            if own.is_own(name):
                victim, params[name] = weighted(*own.load_own(given, num_classes))
                victim, hashes[f"{name} loss"] = checked_own(name, victim, params[name], images, labels, group)
                for line in victim.said if processes.is_first() else ():
                    say(f"victim {name}: {line}")
                victims[name] = victim
            else:
                victims[name] = zoo.make_victim(name, shape, num_classes)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return victims, params, hashes


def checked_own(
    name: str, victim: own.OwnVictim, params: Any, images: np.ndarray, labels: np.ndarray, group: int
) -> tuple[own.OwnVictim, str]:
    """A victim of the user's own as it is attacked, with its first dense layer, and its loss's hash.

    Raises:
      ValueError: where it cannot be attacked with these images (N, H, W, C) and labels.
    """
    image, label = first_leak((images, labels), group)
    if group == 1:
        victim = dataclasses.replace(victim, loss=of_one_image(victim.loss, params, image, label))
    check_own_labels(name, victim, params, image, labels)
    try:
        victim = own.checked_module(victim, image.shape, label)
    except ValueError as error:
        raise ConfigError(f"victim {name!r}: {error}") from error
    check_own_loss(name, victim, params, image, label)
    hash_of = own.fingerprint if victim.module is not None else own.check_repeats  # a module was asked before
    try:
        hashed = hash_of(victim.loss, params, image, label)
    except ValueError as error:
        raise ConfigError(f"victim {name!r}: {error}") from None
    return own.find_first_dense(victim, params, image.shape, label), hashed


def check_own_labels(name: str, victim: own.OwnVictim, params: Any, image: np.ndarray, labels: np.ndarray) -> None:
    """ConfigError where a label is none of the loss's classes."""
    try:
        check_label_range(victim.loss, params, image, labels)
    except ValueError as error:
        raise ConfigError(f"victim {name!r}: {error}; --label gives another") from None


def check_own_loss(name: str, victim: own.OwnVictim, params: Any, image: np.ndarray, label: Any) -> None:
    """ConfigError where the loss cannot be attacked at an image in [-1, 1]."""
    try:
        check_loss(victim.loss, params, image, label)
    except ValueError as error:
        raise ConfigError(f"victim {name!r}: {error}") from error


def _load_params(
    config: SweepConfig, victims: dict[str, Any], own_params: dict[str, Any], data: image_files.ImageSet
) -> tuple[dict[VictimState, Any], dict[str, str]]:
    """Weights of each victim in each training state, and hashes of those that do not follow from the seed."""
    params, hashes = {}, {}
    for name, victim in victims.items():
        for steps in config.victims.training_steps:
            state = VictimState(name, steps)
            if name in own_params:
                params[state] = own_params[name]
            elif steps:
                try:
                    params[state], about = checkpoints.load(config.victims.checkpoints, name, steps, victim)
                except ValueError as error:
                    raise ConfigError(str(error)) from None
                _check_classes(f"{name} after {steps} steps", about.get("classes", []), data.classes)
            else:
                params[state] = zoo.init_params(name, victim, config.run.seed)
            if steps or name in own_params:
                hashes[f"{name}/{steps}"] = modules.digest(params[state])
    return params, hashes


def _check_classes(victim: str, trained: list[str], given: tuple[str, ...]) -> None:
    """That folders which the victim was trained on have the labels that they had there."""
    at_training = {name: label for label, name in enumerate(trained)}
    for label, name in enumerate(given):
        need(
            at_training.get(name, label) == label,
            f"--images: folder {name} has label {label}, {victim} was trained with {at_training.get(name)} for it; "
            f"give a folder with a picture of each of its classes ({', '.join(trained[:10])}), or --label",
        )


def _check_fits(methods: dict[str, Method], victims: dict[str, Any], group: int) -> None:
    """That each method can be run against one victim at least."""
    for name, method in methods.items():
        need(
            any(method.fits(victim.first_dense, group) for victim in victims.values()),
            f"--methods {name} needs a victim whose first layer is dense, such as mlp, and --group=1; "
            f"there are {','.join(victims)} and --group={group}",
        )


def prior_samples(plan: Plan) -> np.ndarray:
    """(K, H, W, C) samples of the prior: images that everybody has, for the statistics of BatchNorms."""
    keys = jax.random.split(jax.random.fold_in(numerics.key(plan.seed), 2**17), PROXY_SAMPLES)
    shape, clip = plan.prior.image_shape, plan.prior.clip
    sample = lambda denoise, schedule, key: sample_unguided(key, denoise, schedule, shape, clip=clip)
    return np.asarray(jax.jit(jax.vmap(sample, (None, None, 0)))(plan.prior.denoise, plan.schedule, keys)[0])
