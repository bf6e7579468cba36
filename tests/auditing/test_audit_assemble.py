"""From trials to an audit, made by hand: what is scored and kept."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from test_audit_summary import make, row

from gdiff_jax.auditing import figures, pictures
from gdiff_jax.auditing.about import gaussian_release, guarantee_row
from gdiff_jax.auditing.assemble import Trials, assemble
from gdiff_jax.auditing.worst import ranked
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise, Sign
from gdiff_jax.theory import privacy


def trials_of(images, **signal):
    """A trial of DSG at each image, which gives back the image itself, but for the last, which failed."""
    rows = [row("dsg", 0.1, i, 0, 30.0, 1.0, failed=i == len(images) - 1) for i in range(len(images))]
    for r in rows:
        del r["rank"]
    trace = {"distance": np.array([2.0, 1.0, np.nan]), "x0_error": np.array([4.0, 0.4, np.nan]), **signal}
    return Trials(rows, list(images), [trace] * len(rows), [None] * len(rows))


def assembled(images, trials, truth):
    about = {k: v for k, v in make().about.items() if k not in ("candidates", "has_truth", "has_lpips", "no_lpips")}
    named = dict(candidates=images, mean_image=images.mean(0), guarantees=[], theory=None, film=list(images[:2]))
    return assemble(about, trials, truth, **named)


def test_an_audit_is_assembled_from_its_trials():
    images = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    trials = trials_of(images)
    audit = assembled(images, trials, images)
    assert audit.about.keys() == make().about.keys()
    assert [r.get("rank") for r in audit.trials] == [0] * 5 + [None]
    assert "rank" not in trials.rows[0]  # what was handed in is left as it was
    assert (audit.candidates, audit.has_truth, len(audit.mean_image)) == (6, True, 6)
    assert audit.curve(audit.trials[0])["psnr"] == pytest.approx([0, 10, np.nan], nan_ok=True)
    shown = [f"{kind}/{i}" for kind in ("truth", "found/0.1") for i in range(4)]
    worst = [f"worst/{kind}/{leaking.image}" for kind in ("truth", 0.1) for leaking in ranked(audit)[:3]]
    assert sorted(audit.pictures) == sorted([*shown, "film/0", "film/1", *worst])
    unknown = assembled(images, trials, None)
    assert (unknown.candidates, unknown.has_truth, unknown.mean_image, unknown.blind) == (0, False, [], None)
    assert len(audit.blind["questions"]) == 5  # and none of what failed
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        assembled(images, dataclasses.replace(trials, images=trials.images[1:]), images)


def test_an_image_is_known_by_its_pixels_whatever_its_place():
    images = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    known_by = lambda order: [r["image_sha256"] for r in assembled(images, trials_of(images), images[order]).trials]
    first = known_by([0, 1, 2, 3, 4, 5])
    assert len(set(first)) == 6
    assert known_by([5, 0, 1, 2, 3, 4]) == [first[5], *first[:5]]


def test_what_the_attacker_expects_is_shown_where_a_method_says_it():
    images = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    trials = trials_of(images)
    assert "deviation" not in figures.drawings(assembled(images, trials, images))
    deviations = [np.full((16, 16, 3), e) if e else None for e in (0.0, 0.25, 0.5, 1.0, 0.0, 0.0)]
    rows = [{**row, "expected_psnr": 20.0} if d is not None else row for row, d in zip(trials.rows, deviations, strict=True)]
    audit = assembled(images, dataclasses.replace(trials, rows=rows, deviations=deviations), images)
    shown = {name: pictures.decode(png) for name, png in audit.pictures.items() if name.startswith("deviation/")}
    assert {name: int(np.unique(picture).item()) for name, picture in shown.items()} == {
        "deviation/0.1/1": 128, "deviation/0.1/2": 255, "deviation/0.1/3": 255,
    }  # fmt: skip
    assert "deviation" in figures.drawings(audit)
    axes = figures.drawings(audit)["deviation"](audit).axes
    assert [ax.get_xlabel() for ax in axes[1::2]] == ["not told", "20.0", "20.0", "20.0"]
    assert [int(ax.images[0].get_array().max()) for ax in axes[3::2]] == [128, 255, 255]


def test_of_an_image_that_is_not_known_what_is_expected_stands_below():
    images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    rows = [{**row("auto", 0.1, 0, seed, 30.0, 1.0 + seed), "gradient_norm": 10.0, "expected_psnr": 20.0} for seed in range(3)]
    del rows[2]["expected_psnr"]
    trace = {"distance": np.array([1.0]), "x0_error": np.array([np.nan])}
    deviations = [np.full((16, 16, 3), 0.5), np.full((16, 16, 3), 0.25), None]
    audit = assembled(images, Trials(rows, list(images), [trace] * 3, deviations), None)
    assert "deviation" not in figures.drawings(audit)
    axes = figures.drawings(audit)["attempts"](audit).axes
    assert [ax.get_xlabel() for ax in axes[3:]] == ["expects 20.0 dB", "expects 20.0 dB", "not told"]
    assert [int(ax.images[0].get_array().max()) for ax in axes[3:5]] == [255, 128]


def test_the_share_of_signal_is_kept_where_it_was_measured():
    images = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    absent = assembled(images, trials_of(images), images)
    assert assembled(images, trials_of(images, signal=np.full(3, np.nan)), images) == absent
    measured = assembled(images, trials_of(images, signal=np.array([1.0, 0.123456, np.nan])), images)
    assert all("signal" not in curve for curve in absent.curves.values())
    assert measured.curve(measured.trials[0])["signal"] == pytest.approx([1, 0.1235, np.nan], nan_ok=True)


def test_a_guarantee_is_a_row_of_numbers():
    clipped = Chain((Clip(2.0), GaussianNoise(3.0)))
    row = guarantee_row(3.0, privacy.guarantee(clipped, 100, 1e-5), 0.1)
    assert row["epsilon"] == pytest.approx(privacy.gaussian_epsilon(1.5, 1e-5))
    assert (row["sigma"], row["delta"], row["reason"], row["pure"]) == (3.0, 1e-5, "", False)
    assert row["gamma"] == pytest.approx(privacy.gdp_tpr(1 / 1.5, 0.1))
    none = guarantee_row(3.0, privacy.guarantee(GaussianNoise(3.0), 100, 1e-5), 0.1)
    assert none.keys() == row.keys()
    assert (none["epsilon"], none["gamma"], none["reason"]) == (None, None, "no clipping")


def test_what_a_gaussian_release_is_is_read_off_its_stages():
    twice = Chain((Clip(2.0), Clip(1.5), GaussianNoise(3.0)))
    assert gaussian_release(twice) == (1.5, 3.0)
    assert gaussian_release(GaussianNoise(3.0)) == (np.inf, 3.0)
    for other in (Chain((Clip(2.0),)), Chain(()), Chain((GaussianNoise(3.0), Clip(2.0))), Chain((Sign(), GaussianNoise(3.0)))):
        assert gaussian_release(other) is None


def test_who_draws_nothing_waits_for_no_plots_and_pages():
    code = "import sys, gdiff_jax.auditing.result; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
