"""How much noise is enough: by closed forms, and as measured on trials made by hand; and what it costs."""

import dataclasses
import math

import numpy as np
import pytest
from test_audit_summary import SIGMAS, make, row

from gdiff_jax.auditing.enough import RARE, SELDOM, _cosine, enough, robust_noise_multiplier
from gdiff_jax.auditing.summary import smallest_noise_to_hide
from gdiff_jax.theory import privacy


@pytest.mark.parametrize(("gamma", "kappa"), [(0.01, 1e-4), (0.1, 0.01), (0.9, 0.5), (0.5, 1e-9)])
def test_the_noise_for_a_robustness_gives_just_that(gamma, kappa):
    z = robust_noise_multiplier(gamma, kappa)
    assert privacy.gaussian_guarantee(z, 1e-5).reconstruction_bound(kappa) == pytest.approx(gamma, rel=1e-6)
    assert privacy.gaussian_guarantee(1.01 * z, 1e-5).reconstruction_bound(kappa) < gamma


@pytest.mark.parametrize(("gamma", "kappa"), [(0.01, 0.01), (0.01, 0.1), (1.0, 0.1), (0.1, 0.0)])
def test_no_noise_makes_an_attack_worse_than_a_guess(gamma, kappa):
    with pytest.raises(ValueError, match="must lie between kappa"):
        robust_noise_multiplier(gamma, kappa)


def test_the_cosine_is_that_of_drawn_noise():
    p, sigma, rng = 1000, 0.1, np.random.default_rng(0)
    rows = [row("dsg", s, i, 0, 10.0, 1.0, gradient_norm=2.0) for s in (0.0, sigma) for i in range(3)]
    rows = [{**r, "psnr": 30.0 if r["sigma"] == 0 else 10.0, "rank": 3} for r in rows]
    record = make(rows)
    (measured,) = [e for e in enough(record) if "recover" in e.wanted]
    assert measured.measured
    assert 0 < measured.noise.value < sigma
    g = np.full(p, 2.0 / math.sqrt(p))
    noisy = g + measured.noise.value * rng.standard_normal((400, p))
    drawn = noisy @ g / (np.linalg.norm(noisy, axis=1) * np.linalg.norm(g))
    assert measured.cosine == pytest.approx(drawn.mean(), rel=0.01)


def test_the_square_of_the_cosine_is_what_is_left_of_the_decrease():
    """Of a quadratic loss of curvature L in every direction, in the mean over noise, by the best of all step lengths."""
    p, sigma, curvature, rng = 200, 0.3, 5.0, np.random.default_rng(0)
    g = rng.standard_normal(p)
    d = g + sigma * rng.standard_normal((20_000, p))
    lengths = np.linspace(0, 1 / curvature, 400)[1:]
    decrease = lengths * (d @ g).mean() - curvature * lengths**2 * np.square(d).sum(1).mean() / 2
    rows = [row("dsg", 0.0, 0, 0, 10.0, 1.0, gradient_norm=float(np.linalg.norm(g)))]
    cosine = _cosine(make(rows, about={**make().about, "parameters": p}), sigma)
    assert cosine**2 == pytest.approx(decrease.max() / (g @ g / (2 * curvature)), rel=5e-3)


def test_of_less_noise_than_was_tried_no_price_is_told():
    rows = [row("dsg", s, i, 0, 5.0, 1.0, rank=3) for s in (0.1, 1.0) for i in range(3)]
    assert all(e.noise.value == 0 and math.isnan(e.cosine) for e in enough(make(rows)))
    rows = [{**r, "sigma": r["sigma"] - 0.1} for r in rows]
    assert all(e.noise.value == 0 and e.cosine == 1 for e in enough(make(rows)))


def test_clipping_counts_and_guarantees():
    about = {**make().about, "mechanism": "clip:0.5+gaussian", "clip_norm": 0.5, "candidates": 100}
    first, among, *measured = enough(make(about=about))
    assert first.noise.value == pytest.approx(0.5 * robust_noise_multiplier(SELDOM, RARE))
    assert first.epsilon == pytest.approx(privacy.gaussian_epsilon(first.noise.value / 0.5, 1e-5))
    assert among.noise.value == pytest.approx(0.5 * robust_noise_multiplier(0.25, 0.01))
    assert first.cosine == pytest.approx(0.5 / math.sqrt(0.25 + 1000 * first.noise.value**2))  # of gradients of norm 10
    assert [e.measured for e in measured] == [True, True, True]
    assert not any(e.measured for e in (first, among))


def test_the_noise_that_hides_an_image_is_the_first_from_which_on_it_is_never_recognised():
    assert smallest_noise_to_hide(make())[:] == (1.0, 1.0, 1.0)  # at 40, 30 and 20 dB, not at 10
    always = [row("dsg", s, i, 0, 30.0, 1.0) for s in SIGMAS for i in range(4)]
    assert smallest_noise_to_hide(make(always)).value == math.inf
    assert smallest_noise_to_hide(make([{**r, "rank": 1} for r in always])).value == 0.0
    again = [{**r, "rank": int(r["sigma"] in (0.0, 0.1))} for r in always]
    assert smallest_noise_to_hide(make(again)).value == math.inf
    once = [{**r, "rank": int(r["sigma"] != 0.01)} for r in always]
    assert smallest_noise_to_hide(make(once)).value == 0.1


def test_what_else_changes_a_gradient_has_no_cosine_in_closed_form():
    for mechanism in ("topk:0.1+gaussian", "clip:1+sign"):
        record = make(about={**make().about, "mechanism": mechanism})
        assert all(math.isnan(e.cosine) for e in enough(record))


def test_of_a_gradient_without_its_image_nothing_is_said():
    assert enough(dataclasses.replace(make(), about={**make().about, "has_truth": False})) == []
