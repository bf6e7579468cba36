"""A plan in words: who attacks, what is released, with which settings."""

import pytest
from test_clients import CLIENTS, client_plan
from tiny import plan_of

from gdiff_jax.methods import METHODS
from gdiff_jax.sweeping import words


def every_word(plan):
    return f"{words.threat_model(plan)} {words.released(plan)} {words.settings(plan)}"


@pytest.mark.parametrize(("changes", "told"), CLIENTS, ids=lambda x: str(x)[:50])
def test_every_client_and_attacker_is_told(tiny_prior, changes, told):
    assert told in every_word(client_plan(tiny_prior, changes))


def test_every_attack_is_told_with_its_settings(tiny_prior):
    settings = dict(chains=3, calibrated_rate=0.35, guidance_rate=0.15)
    told = words.settings(plan_of(tiny_prior, methods=tuple(METHODS), **settings))
    assert told.count(", ") >= len(METHODS)
    for part in ("3 chains of calibrated DSG guidance rate 0.35", "3 chains of DSG guidance rate 0.15", "analytic"):
        assert part in told
    alone = words.settings(plan_of(tiny_prior, methods=("calibrated-mean",), **settings))
    assert alone == "the mean of 3 chains of calibrated DSG guidance rate 0.35 at most, guided by l2"


def test_guidance_at_x0hat_is_told(tiny_prior):
    told = words.settings(plan_of(tiny_prior, through_prior=False, methods=("dsg",)))
    assert "guided by l2 at x0hat, without a derivative of the prior" in told


def test_who_knows_the_noise_is_told_to(tiny_prior):
    told = lambda **changes: words.threat_model(plan_of(tiny_prior, num_images=1, **changes))
    assert "knows the victim's weights and loss, the label, the prior and the noise's distribution." in told()
    assert "that noise of mean zero was added" in told(adaptive=False)
    assert "the mechanism, which it matches through" in told(mechanisms=("clip:0.1", "gaussian"))
    assert "The mechanism is not known: the leak is taken for the gradient" in told(
        mechanisms=("clip:0.1",), sigma_grid=(), adaptive=False
    )


def test_labels_of_a_group_are_known_or_told_to_be_inferred(tiny_prior):
    told = lambda **changes: words.threat_model(plan_of(tiny_prior, num_images=2, group=2, **changes))
    assert "loss, the labels, the prior, that the gradient is the mean of 2 images and" in told()
    assert "the labels" not in told(labels="inferred")


def test_an_attacker_is_told_to_be_changed_where_it_is(tiny_prior):
    told = lambda **changes: words.threat_model(plan_of(tiny_prior, num_images=1, **changes))
    assert "Attacker 'eavesdropper', changed by flags" in told(attacker="eavesdropper", labels="known")
    server = told(attacker="server")
    assert "changed" not in server
    assert "Labels are inferred" in server
    assert "changed" not in told(attacker="server", labels="inferred")  # which it is anyway
