"""The images that leak most: found without an attack where one is planted, in no average, and told as they are."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import own_models
import pytest
from test_audit_summary import SIGMAS, make, row
from tiny import QUICK_AUDIT

import gdiff_jax as gd
from gdiff_jax import intervals
from gdiff_jax.auditing import figures, worst
from gdiff_jax.auditing.settings import Asked
from gdiff_jax.errors import ConfigError
from gdiff_jax.methods import Analytic
from gdiff_jax.sweeping import run as engine


def trials_of(psnr, first=0):
    """Of images with these PSNR at each of SIGMAS."""
    return [row("dsg", s, first + i, 0, p, 1.0) for i, of in enumerate(psnr) for s, p in zip(SIGMAS, of, strict=True)]


def beside(*psnr, images=3):
    """An audit's `worst`: images that were picked, with these PSNR."""
    expected = [[30.0 + i] * len(SIGMAS) for i in range(images + len(psnr))]
    places = list(range(images, images + len(psnr)))
    return dict(measured=50, total=60, expected=expected, places=places, trials=trials_of(psnr, images))


AUDITED = [(40.0, 30.0, 15.0, 10.0), (41.0, 31.0, 22.0, 11.0), (40.0, 30.0, 10.0, 10.0)]
AUDIT = make(trials_of(AUDITED), images=3, seeds=1)


@pytest.mark.parametrize(("seen", "more"), [(2, 1), (2, 3), (3, 3), (4, 2)])
def test_how_often_more_draws_hold_a_worse_one(seen, more):
    """Over all orders of so many draws, none equal."""
    orders = list(itertools.permutations(range(seen + more)))
    share = np.mean([max(order[seen:]) > max(order[:seen]) for order in orders])
    assert share == pytest.approx(more / (seen + more))
    assert intervals.more_for_worse(seen, share - 1e-6) == more
    assert intervals.more_for_worse(seen, share + 1e-6) == more + 1


def test_the_share_that_may_be_worse():
    assert (1 - intervals.share_of_worse(12)) ** 12 == pytest.approx(0.05)
    assert intervals.more_for_worse(12) == 12
    assert intervals.more_for_worse(12, 0.95) == 228
    rng = np.random.default_rng(0)
    missed = np.mean(1 - rng.uniform(size=(4000, 12)).max(1) > intervals.share_of_worse(12))
    assert missed == pytest.approx(0.05, abs=0.015)


def test_the_worst_image_needs_most_noise():
    assert [v.image for v in worst.ranked(AUDIT)] == [1, 0, 2]
    assert worst.ranked(AUDIT)[0].noise == pytest.approx(math.exp(math.log(0.1) + 2 / 11 * math.log(10)))
    even = make(trials_of([(40.0, 30.0, 21.0, 10.0), (190.0, 30.0, 21.0, 10.0), (60.0, 30.0, 21.0, 10.0)]), images=3, seeds=1)
    assert [v.image for v in worst.ranked(even)] == [1, 2, 0]  # and of equal noise, without what is rounding alone
    failed = trials_of(AUDITED[:1]) + [{**r, "failed": True, "psnr": None} for r in trials_of(AUDITED[:1], 1)]
    assert worst.ranked(make(failed, images=2, seeds=1))[-1].psnr == (-math.inf,) * len(SIGMAS)


def test_images_that_were_picked_are_in_no_average():
    picked = dataclasses.replace(AUDIT, worst=beside((60.0, 50.0, 40.0, 30.0)))
    assert [(v.image, v.picked) for v in worst.ranked(picked)] == [(3, True), (1, False), (0, False), (2, False)]
    assert picked.levels() == AUDIT.levels()
    assert picked.smallest_noise() == AUDIT.smallest_noise()
    assert picked.warnings() == AUDIT.warnings()


def test_what_is_said_of_the_worst():
    said = lambda audit: " ".join(worst.sentences(audit))
    assert (
        "most of the 3 audited (1) is recovered up to sigma 0.15; another like the 3 leaks more than all of them with"
        in said(AUDIT)
    )
    assert "a probability of 1/4." in said(AUDIT)
    assert worst.note(AUDIT) == (
        "3 more images like the 3 audited hold one that leaks more as likely as not, and at most 63% of such images do (95 %)."
    )
    more = lambda *psnr: dataclasses.replace(AUDIT, worst=beside(*psnr))
    higher = said(more((60.0, 50.0, 40.0, 30.0)))
    assert "The image that leaks most (3, picked out of 50) is recovered even at sigma 1, the most that was tried;" in higher
    assert "a probability of 1/4" in higher  # of those that were not picked
    assert ", the one picked out of 50 leaks less;" in said(more((9.0,) * 4))
    solved = [(150.0,) * 4] * 3
    alike = dataclasses.replace(make(trials_of(solved), images=3, seeds=1), worst=beside((190.0,) * 4))
    assert "The images that leak most of the 3 audited (3) are recovered even at" in said(alike)
    assert "leaks as much;" in said(alike)
    assert ", all 2 picked" in said(more((9.0,) * 4, (9.0,) * 4))
    nothing = make(trials_of([(9.0,) * 4] * 3), images=3, seeds=1)
    assert "recovered at no noise level tried" in said(nothing)
    groups = dataclasses.replace(AUDIT, about={**AUDIT.about, "group": 3})
    unknown = dataclasses.replace(AUDIT, about={**AUDIT.about, "has_truth": False})
    assert worst.sentences(groups) == worst.sentences(unknown) == []
    assert worst.note(groups) == worst.note(unknown) == ""


def test_how_far_the_picking_is_to_be_trusted():
    """Told by the images that were not picked: their expectation rises with their number."""
    rising = make(images=6, seeds=1)
    data = beside((60.0, 50.0, 40.0, 30.0), images=6)
    told = worst.note(dataclasses.replace(rising, worst=data))
    assert "of 50 images, the first of 60, those of the highest PSNR" in told
    assert "Of the 6 audited it has a rank correlation of 1.00" in told
    falling = {**data, "expected": data["expected"][::-1]}
    assert "a rank correlation of -1.00" in worst.note(dataclasses.replace(rising, worst=falling))
    unknown = {**data, "expected": [[None] * len(SIGMAS), *data["expected"][1:]]}
    assert "correlation" not in worst.note(dataclasses.replace(rising, worst=unknown))
    assert "Picked" not in worst.note(rising)


def planted():
    """An MLP whose gradient answers thirty times as much to an image of class 4."""
    loss, params = own_models.mlp()
    return lambda p, x, y: loss(p, x, y) * jnp.where(y == 4, 30.0, 1.0), params


def test_a_planted_image_is_found_and_confirmed_and_changes_no_average(plain_prior, data, attacks_alone, tmp_path, monkeypatch):
    (loss, params), (images, labels) = planted(), data
    options = dict(prior=plain_prior, sigmas=(0.03,), methods=[Analytic()], **QUICK_AUDIT)
    options |= dict(more=(images[3:], labels[3:]), worst=1, folder=tmp_path / "kept")
    audit = gd.audit(loss, params, images[:3], labels[:3], **options)
    assert (audit.worst["measured"], audit.worst["places"]) == (6, [4])
    first = worst.ranked(audit)[0]
    assert (first.image, first.name, first.picked) == (3, "4", True)
    assert first.psnr[0] > max(v.psnr[0] for v in worst.ranked(audit)[1:]) + 10
    assert {r["image"] for r in audit.trials} == {0, 1, 2}
    assert {r["image"] for r in audit.worst["trials"]} == {3}
    assert audit.about["num_images"] == 3
    assert {"worst/truth/3", "worst/0.03/3"} <= audit.pictures.keys()
    assert "worst" in figures.drawings(audit)
    again = gd.Audit.load(_written(audit, tmp_path))
    assert worst.ranked(again) == worst.ranked(audit)
    monkeypatch.setattr(engine, "compute", lambda *_: pytest.fail("computed again"))
    # What is there twice, or is audited anyway, is no other image.
    twice = {**options, "more": tuple(np.concatenate([a[:3], a[3:], a[3:]]) for a in (images, labels))}
    assert gd.audit(loss, params, images[:3], labels[:3], **twice).worst == audit.worst
    other = {**options, "more": (255 - images[3:], labels[3:])}  # under the same numbers
    with pytest.raises(ValueError, match="another"):
        gd.audit(loss, params, images[:3], labels[:3], **other)


def _written(audit, folder):
    (folder / "audit.json").write_text(audit.to_json())
    return folder / "audit.json"


def test_what_cannot_be_used_is_refused(planned, data):
    images, labels = data
    loss, params = own_models.make()
    for options, words in (
        (dict(worst=-1), "worst -1 must not be negative"),
        (dict(more=images), "more takes images and their labels, a pair; 6 were given"),
        (dict(more=(images[:, :8], labels)), "more are"),
        (dict(more=(images, [0, 1, 2, 3, 4, -5])), "more: "),
    ):
        with pytest.raises(ValueError, match=words):
            planned(loss, params, images, labels, **options)
    with pytest.raises(ConfigError, match="--worst -1 must not be negative"):
        Asked(worst=-1).check()
