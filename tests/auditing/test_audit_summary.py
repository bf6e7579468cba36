"""What an audit says of its trials: choices, intervals, crossings and warnings, on trials made by hand."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from gdiff_jax import intervals, metrics
from gdiff_jax.auditing import figures, page, sentences, summary
from gdiff_jax.auditing.record import AuditRecord, curve_key
from gdiff_jax.auditing.result import Audit
from gdiff_jax.auditing.run import Question
from gdiff_jax.auto import UNEXPLAINED

SIGMAS = (0.0, 0.01, 0.1, 1.0)


def row(method, sigma, image, seed, psnr, distance, **more):
    usual = dict(
        leak=image, failed=False, mse=0.01, ssim=0.5, rank=0 if psnr and psnr > 15 else 3, gradient_norm=10.0,
        noise_norm=sigma * 100, psnr_of_best_step=psnr, label_accuracy=1.0, leak_cosine=1.0,
    )  # fmt: skip
    return dict(method=method, sigma=sigma, image=image, seed=seed, psnr=psnr, distance=distance) | usual | more


def make(rows=None, images=12, seeds=2, **changes):
    """PSNR 40 - 10 per level of noise, plus the image's number over 10; dsg is closer to the leak than dps, and 1 dB better."""
    if rows is None:
        rows = [
            row(method, s, i, k, 40 - 10 * j + i / 10 - worse, 1.0 + worse + 100 * s)
            for method, worse in (("dsg", 0), ("dps", 1))
            for j, s in enumerate(SIGMAS)
            for i in range(images)
            for k in range(seeds)
        ]
    steps = {"distance": [5.0 * 0.8**t for t in range(20)], "psnr": [float(t) for t in range(20)]}
    about = dict(
        victim="v", threshold=20.0, share=0.25, group=1, num_images=images, seeds=seeds, delta=1e-5, clip_norm=None,
        candidates=10, has_truth=True, has_lpips=False, no_lpips="not here", recognised_by="correlation",
        mechanism="gaussian", parameters=1000,
    )  # fmt: skip
    none = [dict(sigma=s, epsilon=None, reason="no clipping", gamma=None) for s in SIGMAS]
    parts = dict(about=about, trials=rows, curves={curve_key(r): steps for r in rows}, mean_image=[], guarantees=none)
    audit = Audit(**parts, theory=None, pictures={})
    return dataclasses.replace(audit, **changes)


def test_the_attacker_chooses_without_the_truth():
    rows = make().trials
    rng = np.random.default_rng(0)
    shuffled = [{**r, "psnr": float(p), "ssim": float(p)} for r, p in zip(rows, rng.permutation(len(rows)), strict=True)]
    key = lambda r: (r["method"], r["sigma"], r["image"], r["seed"])
    assert [key(r) for r in summary.attacker_picks(rows)] == [key(r) for r in summary.attacker_picks(shuffled)]
    assert {r["method"] for r in summary.attacker_picks(rows)} == {"dsg"}


def test_what_an_attacker_takes_is_settled_by_what_it_is_for():
    """Least distance among all would take what fits the noise; what is drawn towards the mean image recognises less."""
    distances = {"dsg": 1.0, "calibrated-mean": 2.0, "analytic": 3.0, "analytic-dsg": 0.5}
    taken = lambda rows, **aim: {r["method"] for r in summary.attacker_picks(rows, **aim)}
    rows = [row(method, 0.1, 0, 0, 20.0, distance) for method, distance in distances.items()]
    assert taken(rows) == {"calibrated-mean"}
    assert taken(rows, recognise=True) == {"analytic-dsg"}
    exact = [{**r, "distance": 0.0} if r["method"] == "analytic" else r for r in rows]
    assert taken(exact) == taken(exact, recognise=True) == {"analytic"}
    assert taken(rows[:1]) == taken(rows[:1], recognise=True) == {"dsg"}
    assert taken(rows[1:2]) == taken(rows[1:2], recognise=True) == {"calibrated-mean"}
    failed = [{**r, "failed": r["method"] == "calibrated-mean"} for r in rows]
    assert taken(failed) == {"analytic-dsg"}


def test_a_level_tells_both_choices():
    ranks = {"dsg": 0, "calibrated-mean": 5}
    psnr = {"dsg": 12.0, "calibrated-mean": 21.0}
    rows = [row(m, s, i, 0, psnr[m], 1.0 + (m != "dsg"), rank=ranks[m]) for s in SIGMAS for i in range(4) for m in ranks]
    level = make(rows, images=4, seeds=1).levels()[0]
    assert (level.methods, level.methods_to_recognise) == ("calibrated-mean 4", "dsg 4")
    assert level.psnr.value == 21
    assert level.recovered.value == level.identified.value == 1


def test_methods_chosen_equally_often_stand_in_the_order_of_the_leaks():
    """And not in a set's, which is another in each process: the report of the same trials was not always the same file."""
    names = ("one", "two", "three", "four", "five")
    rows = [row(name, s, i, 0, 30.0, 1.0) for s in SIGMAS for i, name in enumerate(names)]
    assert make(rows).levels()[0].methods == ", ".join(f"{name} 1" for name in names)
    again = [*rows, row("three", 0.0, 9, 0, 30.0, 1.0)]
    assert make(again).levels()[0].methods.startswith("three 2, one 1, two 1")


def test_levels_are_computed_once(monkeypatch):
    counted = []
    median = summary.median_interval
    monkeypatch.setattr(summary, "median_interval", lambda groups: counted.append(1) or median(groups))
    audit = make()
    first = audit.levels()
    once = len(counted)
    audit.verdict(), audit.warnings(), audit._repr_html_()
    assert (len(counted), summary.levels(audit)) == (once, first)
    changed = dataclasses.replace(audit, about={**audit.about, "threshold": 5.0})  # another record, so other levels
    assert changed.levels()[-1].recovered.value > first[-1].recovered.value


def test_an_oracle_is_never_below_the_attacker():
    rng = np.random.default_rng(0)
    rows = [{**r, "psnr": float(rng.normal(20, 5)), "distance": float(rng.uniform())} for r in make().trials]
    for level in make(rows).levels():
        assert level.oracle.value >= level.psnr.value
        assert level.recovered_oracle.value >= level.recovered.value


def test_a_failed_trial_is_counted_and_recovers_nothing():
    rows = [{**r, "failed": r["image"] < 3, "psnr": None if r["image"] < 3 else r["psnr"]} for r in make().trials]
    level = make(rows).levels()[0]
    assert level.failed == 2 * 2 * 3
    assert level.recovered.value == pytest.approx(9 / 12)
    assert any("not finite" in w for w in sentences.warnings(make(rows)))


def test_shares_have_clopper_and_pearsons_interval():
    share = intervals.share_interval([[1.0]] * 3 + [[0.0]] * 9)
    exact = stats.binomtest(3, 12).proportion_ci(0.95, "exact")
    assert share == pytest.approx((0.25, exact.low, exact.high))
    assert intervals.share_interval([[0.0]] * 12)[:2] == (0, 0)
    assert intervals.share_interval([[0.0]] * 12).high == pytest.approx(1 - 0.025 ** (1 / 12))
    # Seeds are no draws of their own: doubling them changes nothing.
    assert intervals.share_interval([[1.0, 1.0]] * 3 + [[0.0, 0.0]] * 9) == pytest.approx(tuple(share))


def test_the_bootstrap_covers_the_median():
    """Of 60 draws of 12 normal images the 95 % interval misses the median 0 in about 3; 12 or more would be a fault."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(60):
        found = intervals.median_interval([[v] for v in rng.normal(size=12)])
        missed += not found.low <= 0 <= found.high
    assert missed < 12
    assert math.isnan(intervals.median_interval([[1.0], [2.0]]).low)
    assert math.isnan(intervals.median_interval([]).value)


def test_medians_of_groups_of_one_size_are_those_of_any():
    groups = list(np.random.default_rng(0).normal(size=(7, 2)))
    one_by_one = np.percentile([np.median(sample) for sample in intervals.resampled(groups)], [2.5, 97.5])
    assert intervals.median_interval(groups)[1:] == tuple(one_by_one)
    uneven = [*groups, np.array([0.3])]
    one_by_one = np.percentile([np.median(sample) for sample in intervals.resampled(uneven)], [2.5, 97.5])
    assert intervals.median_interval(uneven)[1:] == tuple(one_by_one)


def test_crossing_is_linear_in_log_sigma():
    assert summary.crossing([0.01, 0.1, 1.0], [40.0, 25.0, 15.0], 20) == pytest.approx(10**-0.5)
    assert summary.crossing([0.0, 0.1], [40.0, 0.0], 10) == pytest.approx(0.075)
    assert summary.crossing([0.01, 0.1], [15.0, 10.0], 20) == 0
    assert summary.crossing([0.01, 0.1], [40.0, 25.0], 20) == math.inf
    # Where quality rises again it is the last crossing that protects; a trial that failed is below.
    assert summary.crossing([0.01, 0.1, 1.0, 10.0], [40.0, 0.0, 25.0, 15.0], 20) == pytest.approx(10**0.5)
    assert summary.crossing([0.01, 0.1], [40.0, -math.inf], 20) == 0.1
    assert summary.crossing([0.0, 0.1], [40.0, -math.inf], 20) == 0.1  # not 0, which says that it never came back


def test_the_smallest_noise_and_its_words():
    # Image i has 20 + i / 10 dB at 0.1 and 10 dB less at 1, so it passes 20 dB at 0.1 * 10^(i / 100). Fewer than a quarter of
    # 24 are 5: those of images 11, 10 and one seed of 9.
    audit = make()
    noise = audit.smallest_noise()
    assert noise.value == pytest.approx(0.1 * 10**0.09)
    assert noise.low < noise.value < noise.high
    assert f"sigma {noise.value:.2g}" in audit.verdict()
    all_low = make([{**r, "psnr": 5.0, "psnr_of_best_step": 5.0} for r in audit.trials])
    assert all_low.smallest_noise().value == 0
    assert "at every noise level tried" in all_low.verdict()
    all_high = make([{**r, "psnr": 50.0} for r in audit.trials])
    assert math.isinf(all_high.smallest_noise().value)
    assert "try more than sigma 1" in all_high.verdict()


def test_the_verdict_says_what_so_few_images_can_show():
    rows = [{**r, "psnr": 30.0 if r["sigma"] < 0.1 else 5.0, "psnr_of_best_step": 30.0} for r in make().trials]
    assert "audit more of them" in make(rows).verdict()


def test_epsilon_of_the_smallest_noise():
    audit = make()
    clipped = dataclasses.replace(audit, about={**audit.about, "clip_norm": 1.0})
    from gdiff_jax.theory import privacy

    epsilon = privacy.gaussian_epsilon(clipped.smallest_noise().value, 1e-5)
    assert f"epsilon {epsilon:.4g} at delta 1e-05" in clipped.verdict()


def _plateau(audit):
    curve = {"distance": [5.0] * 3 + [4.0] * 17, "psnr": [1.0] * 20}
    return dataclasses.replace(audit, curves=dict.fromkeys(audit.curves, curve))


def _with_rows(change):
    def changed(audit):
        return make([{**r, **change(r)} for r in audit.trials])

    return changed


FAULTS = {
    "early plateau": _plateau,
    "ended in numbers that are not finite": _with_rows(lambda r: {"failed": r["image"] == 0}),
    "J^T J has rank 5 of 10": lambda a: dataclasses.replace(a, theory={"spectra": [{"rank": 5, "dimensions": 10}]}),
    "no better than the mean image": lambda a: dataclasses.replace(a, mean_image=[{"psnr": 60.0}]),
    "Seeds differ by 8.0 dB": _with_rows(lambda r: dict.fromkeys(("psnr", "psnr_of_best_step"), r["psnr"] - 8 * r["seed"])),
    "an oracle gains 9.0 dB": _with_rows(lambda r: {"psnr_of_best_step": r["psnr"] + 9}),
    "the attack fits the noise": _with_rows(lambda r: {"distance": 0.1 * r["noise_norm"] + 0.01}),
    "labels were right in 50%": _with_rows(lambda r: {"label_accuracy": float(r["seed"])}),
    "Only 4 leaks": lambda a: make(images=4),
}


def test_a_better_attack_is_named_where_it_did_not_run():
    warning = lambda a: next(w for w in sentences.warnings(a) if "fits the noise" in w)
    fitting = FAULTS["the attack fits the noise"](make())
    assert "calibrated-mean" in warning(fitting)
    rows = [{**r, "method": "calibrated-mean"} for r in fitting.trials]
    curves = {curve_key(r): fitting.curves[curve_key(old)] for r, old in zip(rows, fitting.trials, strict=True)}
    assert "calibrated-mean" not in warning(dataclasses.replace(fitting, trials=rows, curves=curves))


@pytest.mark.parametrize("text", FAULTS)
def test_each_fault_is_flagged_and_nothing_else(text):
    assert sentences.warnings(make()) == []
    found = sentences.warnings(FAULTS[text](make()))
    assert found
    assert all(text in warning for warning in found)  # a plateau is one of each method


def test_json_holds_all_of_it(tmp_path):
    audit = make()
    (tmp_path / "audit.json").write_text(audit.to_json())
    assert Audit.load(tmp_path / "audit.json") == audit
    data = AuditRecord.load(tmp_path / "audit.json")
    assert summary.levels(data) == audit.levels()
    assert sentences.verdict(data) == sentences.verdict(audit)
    assert len(audit.to_csv().splitlines()) == 1 + len(audit.trials)
    (tmp_path / "audit.json").write_text("[]")
    with pytest.raises(ValueError, match=r"not an audit\.json"):
        Audit.load(tmp_path / "audit.json")


def test_identification_among_candidates():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
    assert metrics.candidate_count(images, images) == 6
    found = np.stack([images[2] + np.float32(0.1), images[4], images[2]])
    ranks = metrics.identification_ranks(found, images[2], images)
    assert (ranks[0], ranks[2]) == (0, 0)
    assert ranks[1] >= 1
    # A guess that knows nothing names the right one in a sixth of all cases.
    guesses = rng.uniform(-1, 1, (600, 8, 8, 3)).astype(np.float32)
    ranks = metrics.identification_ranks(guesses, images[2], images)
    assert 0.03 < np.mean(ranks == 0) < 0.4
    assert ranks.max() == 5
    distances = np.square((guesses[:, None] - images[None]).astype(np.float64)).mean((2, 3, 4))
    np.testing.assert_array_equal(ranks, (distances <= distances[:, 2:3]).sum(1) - 1)


def test_a_candidate_counts_once_however_often_it_is_there():
    images = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
    asked = Question(np.concatenate([images[3:], images, images[:2]]))
    np.testing.assert_array_equal(asked.candidates, np.concatenate([images[3:], images[:3]]))
    assert metrics.candidate_count(asked.candidates, images[:2]) == 6


def test_correlation_recognises_whatever_the_contrast_is():
    """A reconstruction of a tenth of the contrast is nearest in pixels to a flat candidate, and correlates with the truth."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-0.9, 0.9, (6, 8, 8, 3)).astype(np.float32)
    flat = np.full((1, 8, 8, 3), 0.2, np.float32)
    candidates, found = np.concatenate([images, flat]), 0.2 + 0.1 * images[2:3]
    assert metrics.identification_ranks(found, images[2], candidates)[0] > 0
    assert metrics.identification_ranks(found, images[2], candidates, metrics.patterns)[0] == 0
    vectors = metrics.patterns(candidates)
    theirs = np.corrcoef(metrics.pixels(images).astype(np.float64))
    np.testing.assert_allclose(vectors[:6] @ vectors[:6].T, theirs, atol=1e-6)
    assert not vectors[6].any()
    assert metrics.identification_ranks(flat, flat[0], candidates, metrics.patterns)[0] == 0
    assert metrics.identification_ranks(flat, images[0], images, metrics.patterns)[0] == len(images) - 1  # as far from all
    assert metrics.identification_ranks(images[:0], images[0], candidates, metrics.patterns).shape == (0,)


def test_both_ways_to_recognise_are_told_and_audits_of_before_have_one():
    before = make()
    assert math.isnan(before.levels()[0].identified_in_pixels.value)
    both = make([{**r, "rank_in_pixels": int(r["image"] < 3)} for r in before.trials])
    level = both.levels()[-1]
    assert (level.identified.value, level.identified_in_pixels.value) == (0, 0.75)
    lost = make([{**r, "failed": True, "psnr": None} for r in both.trials])
    assert lost.levels()[0].identified_in_pixels.value == 0
    head = page._levels(both)["head"]
    assert page._levels(both)["rows"][-1][head.index("by distance")].startswith("75%")


def test_images_without_a_gradient_are_named():
    rows = [{**r, "gradient_norm": 0.0 if r["image"] == 1 else 10.0} for r in make().trials]
    (said,) = [w for w in sentences.warnings(make(rows)) if "gradient is zero" in w]
    assert "at 1 of the images (1, counted from 0)" in said


@pytest.mark.parametrize("known", [False, True])
def test_that_what_was_solved_does_not_have_the_gradient_is_a_warning(known):
    """Of a gradient whose image nobody knows: then weights or layout may be wrong. Of one's own there is none to mend."""
    audit = make()
    trials = [{**r, "how": f"{UNEXPLAINED}: the input of fc; residual 1.5e+00"} for r in audit.trials]
    about = {**audit.about, "has_truth": known}
    said = sentences.warnings(dataclasses.replace(audit, trials=trials, about=about))
    assert any("that image does not have this gradient" in text for text in said) == (not known)


def test_a_doubt_about_a_gradient_is_a_warning():
    audit = make()
    doubted = dataclasses.replace(audit, about={**audit.about, "doubt": "It is not the model's own."})
    assert sentences.warnings(doubted)[0] == "It is not the model's own."


def test_nothing_is_said_of_recognition_where_there_is_no_other_image():
    """Among one candidate each is the nearest: 100 % would be no finding."""
    guarantees = [dict(sigma=s, epsilon=9.0 - k, reason="", gamma=0.5) for k, s in enumerate(SIGMAS)]
    usual = make(guarantees=guarantees)
    alone = dataclasses.replace(usual, about={**usual.about, "candidates": 1})
    assert "recognised among 10 candidates" in usual.verdict()
    assert "recognised" not in alone.verdict()
    assert alone.verdict().startswith(usual.verdict().partition(", and")[0])
    assert any("no other image was there" in text for text in alone.warnings())
    assert not any("no other image was there" in text for text in usual.warnings())
    assert "recognised" in usual._repr_html_()
    assert "recognised" not in alone._repr_html_()
    assert {"epsilon"} == figures.drawings(usual).keys() - figures.drawings(alone).keys()
    labels = lambda audit: " ".join(audit.plot().axes[1].get_legend_handles_labels()[1])
    assert "recognised" in labels(usual)
    assert "recognised" not in labels(alone)


def test_images_whose_trials_failed_are_named():
    rows = [{**r, "name": f"{r['image']}.png", "failed": r["image"] in (3, 7)} for r in make().trials]
    (line,) = [text for text in make(rows).warnings() if "not finite" in text]
    assert "of image 3.png, 7.png;" in line


def test_any_figure_is_plotted_by_name_and_shown_by_a_notebook():
    audit = make()
    assert set(audit.plot("recovered")._repr_png_()[:4]) == set(b"\x89PNG")
    with pytest.raises(ValueError, match=r"plot\('pictures'\): this audit has no such figure; it has overview, .*recovered"):
        audit.plot("pictures")


def test_images_of_one_class_alone_are_told():
    labelled = lambda labels: make([{**r, "label": labels[r["image"] % 2]} for r in make().trials])
    of = lambda audit, classes: dataclasses.replace(audit, about={**audit.about, "images_classes": classes})
    (said,) = sentences.warnings(of(labelled((1, 1)), {"cat": 0, "dog": 1}))
    assert "are of class dog, of 2 that the set has" in said
    assert not sentences.warnings(of(labelled((0, 1)), {"cat": 0, "dog": 1}))
    assert not sentences.warnings(of(labelled((1, 1)), {"dog": 1}))


def test_shares_that_are_not_all_or_nothing_are_not_rounded_to_it():
    assert intervals.Interval(0.999, 0.994, 1.0).percent() == "99.9% [99, 100]"
    assert intervals.Interval(0.5, 0.001, 0.9996).percent() == "50% [0.1, 99.96]"
    assert intervals.Interval(0.0, 0.0, 0.26).percent() == "0% [0, 26]"
