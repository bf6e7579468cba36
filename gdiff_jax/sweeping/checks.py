"""What the parts of a sweep must know of each other, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gdiff_jax.errors import need
from gdiff_jax.mechanisms.text import Spec
from gdiff_jax.methods import METHODS, Method
from gdiff_jax.options import replace
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.config import Client, SweepConfig, check_list
from gdiff_jax.sweeping.plan import NoisyMechanism
from gdiff_jax.victims import zoo
from gdiff_jax.victims.own import is_own


def check(config: SweepConfig, mechanisms: Mapping[str, Spec]) -> None:
    """All that can be said against a configuration without loading what it names.

    Raises:
      ConfigError: with the value and the remedy, for the first thing that cannot be used.
    """
    config.noise.check()
    config.victims.check()
    config.private.check()
    config.attacker.check()
    config.attacks.check()
    config.prior.check()
    config.run.check()
    config.client.check(config.private.num_images)
    check_list("mechanisms", config.mechanisms)
    for method in config.attacks.methods:
        against = " ".join(_hindrances(method, config, mechanisms))
        need(
            not against,
            f"--methods {method} cannot be run with {against}: it draws from the noise"
            + (", and compares one gradient, all of it known, by l2" if METHODS[method].calibrated else "")
            + "; leave one of them away",
        )
    _check_statistics(config)
    knows = config.attacker.knowledge
    clips = [text for text in mechanisms if "clip" in text]
    need(
        not (clips and knows.guesses_rate(config.client.local_steps) and knows.adaptive),
        f"--local_rate=guessed with --mechanisms={clips and clips[0]}: the norm that it clips to is in units of the rate; "
        "use --local_rate=known, or --noadaptive",
    )
    for name in filter(is_own, config.victims.victims):
        check_own(config, name)


def _check_statistics(config: SweepConfig) -> None:
    """What an attacker is asked to do with BatchNorms."""
    normed = list(filter(zoo.has_batch_norm, config.victims.victims))
    if not normed:
        return
    knows, steps = config.attacker.knowledge, config.client.local_steps
    need(
        knows.statistics != "known" or steps == 1,
        f"--statistics=known with --local_steps {steps}: {normed[0]} has other statistics in each step; "
        "use --statistics=batch or replaced",
    )
    need(
        knows.statistics == "batch" or not config.client.splits_images,
        f"--statistics={knows.statistics} with --local_batch {config.client.local_batch}: {normed[0]} has other "
        "statistics in each local batch; use --statistics=batch, or leave --local_batch at 0",
    )
    need(
        knows.labels != "joint" or knows.statistics == "batch" or "dlg" not in config.attacks.methods,
        f"--labels=joint with --statistics={knows.statistics}: dlg on {normed[0]} can optimise labels only "
        "with the candidate's own statistics; use --statistics=batch",
    )


def check_own(config: SweepConfig, name: str) -> None:
    """What is known of a network of the user's own is its loss: what needs more of it is refused."""
    labels, steps = config.attacker.knowledge.labels, config.victims.training_steps
    need(steps == (0,), f"--training_steps with --victims {name}: it has the weights that its function returns")
    need(labels == "known", f"--labels={labels} with --victims {name}: labels are read off built-in networks only")
    pruned = [text for text in config.mechanisms if "soteria" in text]
    need(not pruned, f"--mechanisms {pruned and pruned[0]} with --victims {name}: soteria prunes built-in networks only")


def hindrances(
    method: Method,
    attacker: Attacker,
    client: Client,
    distance: str = "l2",
    mechanisms: Mapping[str, NoisyMechanism] = MappingProxyType({}),
) -> list[str]:
    """The flags under which the method cannot be run, for what it needs to know or to compare."""
    unknown = "--attacker=eavesdropper" if attacker.attacker == "eavesdropper" else "--noadaptive"
    masks = [f"--mechanisms={text}" for text, mechanism in mechanisms.items() if mechanism.hides_mask]
    flags = {
        unknown: method.needs_noise and not attacker.knowledge.adaptive,
        f"--distance={distance}": method.calibrated and distance != "l2",
        f"--local_steps={client.local_steps}": method.calibrated and client.local_steps > 1,
        **dict.fromkeys(masks, method.calibrated),
    }
    return [flag for flag, hinders in flags.items() if hinders]


def _hindrances(name: str, config: SweepConfig, mechanisms: Mapping[str, Spec]) -> list[str]:
    return hindrances(METHODS[name], config.attacker, config.client, config.attacks.distance, mechanisms)


def write_out_all(config: SweepConfig, mechanisms: Mapping[str, Spec]) -> SweepConfig:
    """`config` with --methods=all written out: every method that can be run against one of its victims at least."""
    if config.attacks.methods != ("all",):
        return config
    built_in = [zoo.VICTIMS[name]() for name in config.victims.victims if name in zoo.VICTIMS]

    def fits(name: str) -> bool:
        method, group = METHODS[name], config.client.group
        somewhere = not method.needs_first_dense or any(method.fits(victim.first_dense, group) for victim in built_in)
        return somewhere and not _hindrances(name, config, mechanisms)

    return replace(config, methods=tuple(filter(fits, METHODS)))
