"""What a conditional prior is told in a trial, and what it is told when nobody knows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PATCHED, QUICK_COMPILE
from objectives import random_weights
from tiny import plan_of

from gdiff_jax.auditing.film import film_steps
from gdiff_jax.auditing.pick import expectations
from gdiff_jax.errors import ConfigError
from gdiff_jax.parametrisation import EDM
from gdiff_jax.priors import Denoiser
from gdiff_jax.sweeping import inputs, trials, words
from gdiff_jax.sweeping.conditioning import check_classes, told
from gdiff_jax.victims.own import OwnVictim


def conditional(prior, classes=10, **changes):
    config = dataclasses.replace(PATCHED, num_class_embeds=classes)
    return dataclasses.replace(prior, denoise=Denoiser(random_weights(config), config, **changes))


@pytest.fixture
def plan(tiny_prior):
    """Of images labelled 0, 1, 2 and a victim of ten classes."""
    plan = plan_of(tiny_prior, steps=2)
    return dataclasses.replace(plan, prior=conditional(plan.prior))


def denoisers(plan, labels=None):
    """x0hat's network at noise of one kind, in each trial as its attacker has it."""
    group = trials.Group("dsg", "mlp-narrow", 0, "gaussian")
    shared = trials.shared_arguments(plan, group)
    own = trials.own_arguments(
        plan, [trials.Trial(group, 0.0, i, 0) for i in range(0, 4 - plan.client.group, plan.client.group)]
    )
    x = jnp.ones((16, 16, 3)) if plan.client.group == 1 else jnp.ones((plan.client.group, 16, 16, 3))

    def one(own):
        _, _, _, problem = trials.leaked(plan, group, shared, own)
        return problem.denoise(x, jnp.asarray(7))[0]

    return jax.jit(jax.vmap(one), compiler_options=QUICK_COMPILE)(own)


def expected(plan, labels):
    at = lambda label: plan.prior.denoise.given(label)(jnp.ones((16, 16, 3)), jnp.asarray(7))[0]
    return jax.jit(jax.vmap(at), compiler_options=QUICK_COMPILE)(jnp.asarray(labels))


def test_each_trial_tells_the_prior_the_label_that_its_attacker_goes_by(plan):
    """Inferred, without noise for sure; the labels that are known are those of the test below."""
    np.testing.assert_array_equal(plan.labels[:3], [0, 1, 2])
    of_label = expected(plan, [0, 1, 2])
    assert np.abs(of_label[0] - of_label[1]).max() > 1e-3
    inferred = dataclasses.replace(plan, attacker=dataclasses.replace(plan.attacker, labels="inferred"))
    np.testing.assert_allclose(denoisers(inferred), of_label, atol=1e-5)
    assert words.settings(plan).endswith("the prior is told the label that the attacker goes by")


def test_of_a_leak_of_several_images_each_has_its_own_label(plan):
    pair = dataclasses.replace(plan, client=dataclasses.replace(plan.client, group=2))
    np.testing.assert_allclose(denoisers(pair)[0], expected(plan, [0, 1]), atol=1e-5)


def test_a_last_row_that_stands_for_none_is_no_class(plan):
    own = dataclasses.replace(plan, prior=conditional(plan.prior, 11, null_label=10))
    assert words.settings(own).endswith("told the label that the attacker goes by")
    first = dataclasses.replace(plan, prior=conditional(plan.prior, 11, null_label=0))  # which row is class 0 is not known
    assert words.settings(first).endswith("told no class, for the victim has others")


def test_a_prior_of_other_classes_is_told_none_where_a_label_stands_for_none_and_else_refused(plan):
    victims = plan.victims
    with pytest.raises(ConfigError, match=r"conditional on 7 classes.* victim mlp-narrow has 10; give a prior"):
        check_classes(conditional(plan.prior, 7), victims, plan.labels)
    other = dataclasses.replace(plan, prior=conditional(plan.prior, 7, null_label=6))
    check_classes(other.prior, victims, plan.labels)
    np.testing.assert_allclose(denoisers(other), expected(other, [6, 6, 6]), atol=1e-5)
    assert words.settings(other).endswith("the prior is told no class, for the victim has others")


def test_where_only_labels_tell_a_loss_s_classes_the_prior_s_are_assumed_to_be_them(plan):
    of = lambda classes: OwnVictim(plan.victims["mlp-narrow"].loss, classes, classes_guessed=True)
    own = dataclasses.replace(plan, victims={"mine": of(3)})
    check_classes(own.prior, own.victims, own.labels)
    assert words.settings(own).endswith("the label that the attacker goes by, taken to count the prior's classes")
    for classes, message in ((11, "mine is given label 10; give"), (0, "mine is given labels below 0; give")):
        with pytest.raises(ConfigError, match=message):
            check_classes(own.prior, {"mine": of(classes)}, own.labels)
    for prior in (own.prior, conditional(plan.prior, 11, null_label=10)):
        assert told(prior.denoise, jnp.asarray(2), of(3), several=False).label == 2


def test_labels_that_are_no_whole_numbers_are_none_to_a_prior(plan):
    soft = np.full((3, 10), 0.1, np.float32)
    with pytest.raises(ConfigError, match=r"no single array \(N,\) of such; give class numbers"):
        check_classes(plan.prior, plan.victims, soft)
    own = dataclasses.replace(plan, labels=soft, prior=conditional(plan.prior, 11, null_label=10))
    check_classes(own.prior, own.victims, soft)
    assert told(own.prior.denoise, jnp.asarray(soft[0]), plan.victims["mlp-narrow"], several=False) is own.prior.denoise
    assert words.settings(own).endswith("the prior is told no class, for the labels are none")


def test_who_ignores_the_leak_ignores_the_label_and_draws_a_class(plan):
    assert np.isfinite(inputs.prior_samples(plan)).all()


def test_which_images_leak_most_is_asked_of_a_prior_that_is_told_their_labels(plan):
    own = dataclasses.replace(plan, images=plan.images[:1], labels=plan.labels[:1], sigmas={"gaussian": (0.1,)})
    right, wrong = (expectations(own, plan.images[:2], labels, False) for labels in (np.array([0, 1]), np.array([0, 3])))
    assert np.isfinite(right).all()
    assert right[1] != wrong[1]


def test_frames_of_a_prior_with_a_time_of_its_own_are_told_by_their_steps(plan):
    of_edm = plan.prior.schedule(5)
    assert film_steps(of_edm)[-1] == 0
    continuous = dataclasses.replace(of_edm, t=EDM().time(jnp.sqrt(of_edm.abar), of_edm.noise))
    assert film_steps(continuous) == [4, 3, 2, 1, 0]
