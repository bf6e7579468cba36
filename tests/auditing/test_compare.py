"""Audits beside each other: which trials make a pair, paired differences that are known, and what is refused."""

import csv
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_audit_summary import SIGMAS, make, row
from tiny import ended
from written import COMPARISON, faults_of_json, faults_of_page

import gdiff_jax as gd
from gdiff_jax.auditing import pictures
from gdiff_jax.auditing.comparing import apart, figures, page, pairs, words
from gdiff_jax.auditing.own_mechanism import OwnMechanism
from gdiff_jax.commands import audit as command
from gdiff_jax.mechanisms import text as mechanism_text


def known_by(number):
    return f"{number:016x}"


def audit_of(psnr, images=range(12), seeds=2, sigmas=SIGMAS, ranks=None, **about):
    """PSNR psnr(image, seed, level) of the images of these numbers, which are its pixels' hash too, in this order."""
    rows = [
        row("dsg", s, place, k, psnr(i, k, j), 1.0, image_sha256=known_by(i), label=i % 10)
        for j, s in enumerate(sigmas)
        for place, i in enumerate(images)
        for k in range(seeds)
    ]
    rows = [{**r, "rank": ranks(int(r["image_sha256"], 16))} for r in rows] if ranks else rows
    record = make(rows, len(images), seeds)
    kept = {f"truth/{k}": pictures.png(np.full((8, 8, 3), 0.1 * k)) for k in range(min(4, len(images)))}
    kept |= {f"found/{s!r}/{k}": kept[f"truth/{k}"] for s in sigmas for k in range(min(4, len(images)))}
    usual = dict(threat_model="Known.", film_steps=[], attacks="dsg", methods=["dsg"], command="audit.py")
    return dataclasses.replace(record, pictures=kept, about={**record.about, **usual, **about})


def spread(image, seed, level):
    """Images differ by 20 dB, more than any shift below: only pairs tell it."""
    return 40 - 10 * level + 7 * (image % 4) + 0.3 * seed


def shifted(by, noise=0.0):
    rng = np.random.default_rng(0)
    return lambda image, seed, level: spread(image, seed, level) + by + noise * rng.normal()


def test_a_shift_is_found_with_its_sign_though_images_differ_by_more():
    found = gd.compare(audit_of(spread), audit_of(shifted(-1.5, noise=0.3)), audit_of(shifted(+2.0)), names=["a", "b", "c"])
    assert [(d.audit, d.sigma, d.images, d.pairs) for d in found.differences] == [
        (k, s, 12, 24) for k in (1, 2) for s in SIGMAS
    ]  # fmt: skip
    for d in found.of(1):
        assert d.psnr.low <= d.psnr.value <= d.psnr.high
        assert d.psnr.low <= -1.5 <= d.psnr.high < 0
    for d in found.of(2):
        assert d.psnr == pytest.approx((2.0, 2.0, 2.0)) or d.sigma == 0  # some of 40 + 21 are cut at 60 dB
    assert "Of b, beside a: less comes back at sigma 0 (-1." in found.text
    assert "Of c, beside a: more comes back at sigma 0 (+2.0" in found.text


def test_equal_audits_differ_by_nothing_and_are_not_told_apart():
    found = gd.compare(audit_of(spread), audit_of(spread))
    for d in found.differences:
        for interval in (d.psnr, d.recovered, d.recognised):
            assert interval == (0, 0, 0)
            assert words.told_apart(interval) is False
    assert found.text.count("not told apart by these 12 images") == 1
    assert "No setting that may make a difference" in found.text
    assert words.judged(found.differences[0].psnr, 12) == "0.0 [0.0, 0.0]: not told apart"


def test_what_only_noise_tells_is_not_told_apart():
    found = gd.compare(audit_of(spread), audit_of(shifted(0.0, noise=3.0)))
    assert sum(words.told_apart(d.psnr) is False for d in found.differences) >= 3


def test_an_interval_covers_a_planted_shift():
    """Of 40 the 95 % interval misses the median in about 2; 9 or more would be a fault."""
    missed = 0
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(size=12)
        b = audit_of(lambda i, k, j, noise=noise: spread(i, k, j) - 1 + noise[i], sigmas=(1.0,), seeds=1)
        a = audit_of(spread, sigmas=(1.0,), seeds=1)
        (d,) = pairs.pair([a, b], ["a", "b"]).differences
        missed += not d.psnr.low <= -1 <= d.psnr.high
    assert missed < 9


def test_the_order_of_trials_does_not_matter():
    a, b = audit_of(spread), audit_of(shifted(-1.5, noise=1.0))
    first = gd.compare(a, b).differences
    mixed = [b.trials[i] for i in np.random.default_rng(1).permutation(len(b.trials))]
    assert gd.compare(a, dataclasses.replace(b, trials=mixed)).differences == first


def test_images_are_paired_by_their_pixels_and_not_by_their_place():
    """`b` holds six of the images, in another order; by place each would be another image, 7 dB and more apart."""
    a, b = audit_of(spread), audit_of(shifted(-1.0), images=[7, 3, 20, 11, 0, 5, 2])
    found = gd.compare(a, b)
    assert found.places == ((0, 4), (2, 6), (3, 1), (5, 5), (7, 0), (11, 3))
    assert all(d.psnr == pytest.approx((-1, -1, -1)) for d in found.of(1)[1:])
    said = " ".join(found.warnings())
    assert "5 of 6 images have another place" in said
    assert "left out: 6 of audit 1, 1 of audit 2" in said
    assert found.shared[1].about["num_images"] == 6
    assert {r["image"] for r in found.shared[1].trials} == {0, 1, 3, 4, 5, 6}


def test_images_of_the_same_pixels_are_told_apart_by_their_order():
    a, b = audit_of(spread, images=[4, 4, 5]), audit_of(spread, images=[5, 4, 4])
    assert gd.compare(a, b).places == ((0, 1), (1, 2), (2, 0))


def without_hashes(audit, images="abc"):
    rows = [{k: v for k, v in r.items() if k != "image_sha256"} for r in audit.trials]
    return dataclasses.replace(audit, trials=rows, about={**audit.about, "hashes": {"images": images} if images else {}})


def test_audits_of_before_are_paired_by_place_in_the_same_set():
    a, b = without_hashes(audit_of(spread)), without_hashes(audit_of(shifted(-1.0)))
    found = gd.compare(a, b)
    assert all(d.psnr == pytest.approx((-1, -1, -1)) for d in found.differences[1:])
    assert "in sets of the same hash, abc" in " ".join(found.warnings())
    assert gd.compare(dataclasses.replace(audit_of(spread), about=a.about), b).by_pixels is False
    for other in ("abd", None):
        with pytest.raises(ValueError, match=r"cannot be told which images .* audit both again with the same --images"):
            gd.compare(a, without_hashes(b, other))


def test_shares_are_differences_of_pairs_by_one_threshold():
    """`b` loses three of twelve images, and recognises the first half alone."""
    above = lambda image, seed, level: 30.0
    below = lambda image, seed, level: 30.0 if image >= 3 else 19.0
    a = audit_of(above, ranks=lambda i: 0)
    b = audit_of(below, ranks=lambda i: int(i >= 6), threshold=35.0, share=0.5)
    found = gd.compare(a, b)
    for d in found.differences:
        assert d.recovered.value == pytest.approx(-0.25)
        assert d.recovered.low < -0.25 < d.recovered.high <= 0
        assert d.recognised.value == pytest.approx(-0.5)
        assert d.recognised.low < -0.5 < d.recognised.high < 0
    assert [audit.about["threshold"] for audit in found.shared] == [20.0, 20.0]
    assert "has a threshold of 35 dB; all are compared by the 20 dB of audit 1" in " ".join(found.warnings())
    assert found.shared[1].levels()[0].recovered.value == pytest.approx(0.75)
    fewer = dataclasses.replace(b, about={**b.about, "candidates": 5})
    apart_ = gd.compare(a, fewer)
    assert all(math.isnan(d.recognised.value) for d in apart_.differences)
    assert "what is recognised is not compared" in " ".join(apart_.warnings())
    before = dataclasses.replace(b, about={k: v for k, v in b.about.items() if k != "recognised_by"})
    apart_ = gd.compare(a, before)
    assert all(math.isnan(d.recognised.value) for d in apart_.differences)
    assert "recognises by distance: that is not compared" in " ".join(apart_.warnings())


def test_a_failed_attack_recovers_nothing_and_has_no_psnr():
    a, b = audit_of(lambda *_: 30.0), audit_of(lambda *_: 30.0)
    lost = lambda r: {**r, "failed": True, "psnr": None, "distance": None, "rank": None} if r["image"] < 2 else r
    found = gd.compare(a, dataclasses.replace(b, trials=[lost(r) for r in b.trials]))
    d = found.differences[0]
    assert (d.without_psnr, d.psnr.value) == (4, 0)
    assert d.recovered.value == pytest.approx(-2 / 12)
    assert "4 of 24 at sigma 0" in " ".join(found.warnings())


def test_two_images_have_no_interval():
    found = gd.compare(audit_of(spread, images=range(2)), audit_of(shifted(-1.0), images=range(2)))
    for d in found.differences:
        assert d.psnr.value == pytest.approx(-1)
        assert math.isnan(d.psnr.low)
        assert math.isnan(d.recovered.low)
        assert words.judged(d.psnr, d.images) == "-1.0 (no interval from 2 images)"
    assert "there is no interval" in found.text


def test_a_leak_of_several_images_is_one_draw():
    """In groups of four in one audit alone, too: what shares a leak anywhere is resampled together."""
    a, b = audit_of(spread), audit_of(shifted(-1.0), group=4)
    b = dataclasses.replace(b, trials=[{**r, "leak": r["image"] - r["image"] % 4} for r in b.trials])
    assert {d.images for d in gd.compare(a, b).differences} == {3}
    crossed = dataclasses.replace(a, trials=[{**r, "leak": r["image"] - r["image"] % 3} for r in a.trials])
    assert {d.images for d in gd.compare(crossed, b).differences} == {1}


def test_what_is_exact_in_both_differs_by_nothing():
    found = gd.compare(audit_of(lambda *_: 200.0), audit_of(lambda *_: 147.0))
    assert found.differences[0].psnr == (0, 0, 0)
    assert "come back exactly in both" in " ".join(found.warnings())


def guaranteed(audit, clip_norm, epsilon_of, delta=1e-5):
    rows = [dict(sigma=s, epsilon=epsilon_of(s) if s else None, reason="", gamma=None) for s in audit.sigmas]
    return dataclasses.replace(audit, guarantees=rows, about={**audit.about, "clip_norm": clip_norm, "delta": delta})


def test_levels_are_those_in_common_by_sigma_and_by_epsilon():
    a = guaranteed(audit_of(spread, sigmas=(0.0, 0.1, 1.0)), 1.0, lambda s: 5 / s)
    b = guaranteed(audit_of(spread, sigmas=(0.0, 0.01, 0.1 * (1 + 1e-9))), 0.1, lambda s: 0.502 / s)
    assert pairs.levels_in_common(a, b) == [
        ("sigma", 0.0, 0.0), ("sigma", 0.1, b.sigmas[-1]), ("epsilon", 0.1, 0.01), ("epsilon", 1.0, b.sigmas[-1]),
    ]  # fmt: skip
    no_epsilon = lambda first, other: {at for at, *_ in pairs.levels_in_common(first, other)} == {"sigma"}
    assert no_epsilon(a, guaranteed(b, 0.1, lambda s: 0.52 / s))  # 4 % apart
    assert no_epsilon(a, guaranteed(b, 0.1, lambda s: 0.5 / s, delta=1e-6))
    assert no_epsilon(a, guaranteed(b, 1.0, lambda s: 0.5 / s))
    assert no_epsilon(a, guaranteed(b, None, lambda s: 0.5 / s))
    found = gd.compare(a, b)
    assert words.level_text(found.differences[-1]) == "epsilon 5.02 (sigma 0.1 for 1)"
    assert [row[:2] for row in page.differences(found)["rows"][-2:]] == [["ε ≈ 5, σ = 1", "audit 1"], ["σ = 0.1", "audit 2"]]


def test_settings_that_differ_are_listed_by_what_they_are_of():
    hashes = lambda weights: dict(images="abc", trained_victims={"v/0": weights * 20, "v loss": "f" * 20})
    a = audit_of(spread, mechanism="gaussian", hashes=hashes("a"), versions={"jax": "1"}, threat_model="the noise")
    b = {**a.about, "mechanism": "topk:0.1", "threat_model": "the mechanism", "versions": {"jax": "2"}, "threshold": 25.0}
    found = apart.settings_apart([a, dataclasses.replace(a, about=b)])
    assert [(s.topic, s.name, s.values) for s in found] == [
        ("defence", "mechanism", ("gaussian", "topk:0.1")),
        ("measure", "threshold", ("20.0", "25.0")),
        ("made with", "jax, version", ("1", "2")),
    ]
    assert apart.topics_apart(found) == ["defence"]
    # A file of the same name with other weights is another victim.
    b["hashes"] = hashes("b")
    both = gd.compare(a, dataclasses.replace(a, about=b))
    assert "differ in 2 things, victim and defence" in both.text


def test_what_misleads_is_said():
    a = audit_of(spread)
    b = dataclasses.replace(a, about={**a.about, "unfinished": True, "prior": "other"})
    b = dataclasses.replace(b, trials=[{**r, "label": 0} for r in b.trials])
    said = " ".join(gd.compare(a, b).warnings())
    for text in ("audit 2 is not finished", "with different priors", "10 of the images have another label"):
        assert text in said


@pytest.mark.parametrize(
    ("first", "other", "same"),
    [
        (dict(mechanism="clip:1+gaussian"), dict(mechanism="topk:0.1+gaussian"), True),
        (dict(mechanism="gaussian"), dict(mechanism="gaussian"), True),
        (dict(mechanism="gaussian"), dict(mechanism="clip:1+gaussian"), False),
        (dict(mechanism="clip:1+gaussian"), dict(mechanism="clip:1+laplace"), False),
        (dict(mechanism="clip:1+gaussian"), dict(mechanism="topk:0.1+clip:1+gaussian"), False),
        (dict(mechanism="topk:0.1"), dict(mechanism="rsparse:0.1"), False),
        (dict(parameters=1000), dict(parameters=2000), False),
        (dict(seed=0), dict(seed=1), False),
    ],
)
def test_whether_a_pair_has_the_same_noise_is_said(first, other, same):
    said = " ".join(gd.compare(audit_of(spread, **first), audit_of(spread, **other)).warnings())
    assert ("pairs share their image" in said) == (not same)


def test_the_noise_of_a_pair_is_as_it_is_said():
    """By the mechanisms themselves: the noise is what is left of a gradient of zeros."""
    named = ["gaussian", "clip:1+gaussian", "topk:0.5+gaussian", "topk:0.5+clip:1+gaussian", "clip:1+laplace", "laplace"]
    made = [
        gd.GaussianNoise,
        lambda s: gd.Chain((gd.Clip(2.0), gd.GaussianNoise(s))),
        lambda s: gd.Chain((gd.GaussianNoise(s),)),
    ]
    every = [(text, mechanism_text.parse(text).without_image(0.5)) for text in named]
    every += [(OwnMechanism(make).text, make(0.5)) for make in made]
    noise = lambda mechanism: mechanism(jax.random.key(3), {"w": jnp.zeros((4, 5)), "b": jnp.zeros(3)})["w"]
    for one, first in every:
        for other, second in every:
            same = np.allclose(noise(first), noise(second))
            assert (words._noise_of(one) == words._noise_of(other)) == same, (one, other)


def test_an_unfinished_audit_is_compared_at_the_levels_it_has():
    a = audit_of(spread)
    b = dataclasses.replace(a, trials=[r for r in a.trials if r["sigma"] < 1 and (r["sigma"] < 0.1 or r["image"] < 5)])
    assert [(d.sigma, d.images) for d in gd.compare(a, b).differences] == [(0.0, 12), (0.01, 12), (0.1, 5)]


def unknown(audit):
    return dataclasses.replace(audit, about={**audit.about, "has_truth": False})


@pytest.mark.parametrize(
    ("audits", "words_"),
    [
        (lambda a: [a], "1 audits to compare; give two or more"),
        (lambda a: [a, unknown(a)], "audit 2 is of a gradient whose image is not known"),
        (lambda a: [a, dataclasses.replace(a, trials=[])], "audit 2 holds no attack yet"),
        (lambda a: [a, audit_of(spread, images=range(20, 25))], "no image and seed is in all of audit 1, audit 2"),
        (lambda a: [a, audit_of(spread, sigmas=(0.5,))], "no level of noise in common; audit both with the same --sigma_grid"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_remedy(audits, words_):
    with pytest.raises(ValueError, match=re.escape(words_)):
        gd.compare(*audits(audit_of(spread)))


def test_each_audit_has_a_name_of_its_own():
    a = audit_of(spread)
    with pytest.raises(ValueError, match="give each one of its own"):
        gd.compare(a, a, names=["x", "x"])
    assert gd.compare(a, a, a).names == ("audit 1", "audit 2", "audit 3")


def put(folder, audit):
    folder.mkdir(parents=True)
    (folder / "audit.json").write_text(audit.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def folders(tmp_path):
    hostile = audit_of(shifted(-1.5, noise=0.3), victim="<script>alert(1)</script>")
    return put(tmp_path / "x" / "plain", audit_of(spread)), put(tmp_path / "x" / "a_b", hostile)


def test_the_command_writes_a_page_that_is_whole(folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert ended(command, monkeypatch, "compare", *map(str, folders), f"--out={out}") is None
    assert f"comparison: {out / 'compare.html'}" in capsys.readouterr().out
    text = (out / "compare.html").read_text(encoding="utf-8")
    assert faults_of_page(text) == []
    assert "default-src 'none'" in text
    assert "<script>" not in text
    assert text.count("<img ") == 2
    assert {p.name for p in (out / "figures").iterdir()} == {
        f"compare_{name}.{kind}" for name in ("quality", "reconstructions") for kind in ("png", "svg")
    }
    data = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert faults_of_json(json.dumps(data), COMPARISON) == []
    for broken in ({"format": 2}, {"differences": [{**data["differences"][0], "recovered": 12}]}, {"mood": "good"}):
        assert faults_of_json(json.dumps({**data, **broken}), COMPARISON)
    lines = list(csv.DictReader((out / "compare.csv").open(encoding="utf-8")))
    found = gd.compare(*(gd.Audit.load(folder / "audit.json") for folder in folders), names=["plain", "a_b"])
    assert data["names"] == list(found.names)
    for shown, line, d in zip(data["differences"], lines, found.differences, strict=True):
        assert (shown["psnr"], shown["psnr_low"], shown["psnr_high"]) == d.psnr
        assert float(line["psnr"]) == d.psnr.value
        assert (line["epsilon"], shown["epsilon"]) == ("", None)
    summary = (out / "compare.md").read_text(encoding="utf-8")
    assert "a\\_b" in summary
    for table in re.split(r"\n\n", summary):
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
    assert found._repr_html_().count("<tr>") == 1 + 2 * len(SIGMAS)
    assert repr(found).startswith("<Comparison: plain and a_b on the same 12 images x 2 seeds")


def test_figures_answer_to_the_data():
    a, b, c = audit_of(spread), audit_of(shifted(-1.5)), audit_of(shifted(-2.5))
    first, other = (figures.files(gd.compare(a, x)) for x in (b, c))
    assert first["compare_quality.svg"] != other["compare_quality.svg"]
    assert figures.shown_sigmas(gd.compare(a, b)) == [(0.0, 0.0), (1.0, 1.0)]
    assert figures.files(gd.compare(a, b)) == first


def test_pictures_are_of_the_image_and_not_of_its_place():
    """Each image is of a shade of its own."""
    shade = lambda image: pictures.png(np.full((8, 8, 1), image / 10))

    def shaded(images):
        audit = audit_of(lambda *_: 30.0, images=images)
        kept = {
            f"{kind}/{k}": shade(i) for k, i in enumerate(images[:4]) for kind in ("truth", *(f"found/{s!r}" for s in SIGMAS))
        }
        return dataclasses.replace(audit, pictures=kept)

    found = gd.compare(shaded([0, 1, 2, 3]), shaded([3, 9, 1, 8, 0]))
    assert found.places == ((0, 4), (1, 2), (3, 0))
    drawn = [ax.images[0].get_array() for ax in figures.reconstructions(found).axes]
    of_both = [np.array_equal(drawn[3 * line], drawn[3 * line + k]) for line in range(len(drawn) // 3) for k in (1, 2)]
    assert len(drawn) == 3 * 2 * 1  # at one level, since all are as far from the threshold; of place 4 no picture is kept
    assert all(of_both)


def test_each_aim_has_its_own_pick():
    """What comes closest recognises nobody in `b`, the other attack everybody; in `a` the other way round."""

    def of_two(ranks):
        rows = [
            row(method, 0.1, i, 0, psnr, 1.0, rank=rank, image_sha256=known_by(i))
            for i in range(4)
            for (method, psnr), rank in zip((("calibrated-mean", 25.0), ("dsg", 15.0)), ranks, strict=True)
        ]
        return make(rows, 4, 1)

    (d,) = gd.compare(of_two((0, 5)), of_two((5, 0))).differences
    assert (d.psnr, d.recovered, d.recognised) == ((0, 0, 0), (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "compare: 0 audits to compare; name two or more folders"),
        (["compare", "{a}"], "compare: 1 audits to compare"),
        (["compare", "{a}", "nowhere"], "compare: nowhere cannot be read: No such file"),
        (["compare", "{a}", "{a}"], "the same audit twice"),
        (["compare", "{a}", "{begun}"], "the audit there has not finished its first attacks"),
        (["compare", "{a}", "{a}/.."], "holds no audit.json; name the folder of an audit"),
        (["compare", "{a}", "{b}", "--seeds=3"], "takes folders and --out alone"),
        (["compare", "{a}", "{b}", "--no_such"], "no_such"),
        (["compared", "{a}", "{b}"], "'compared' is not a flag; flags are written --name=value"),
        (["out=x"], "'out=x' is not a flag"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(arguments, said, folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "begun" / "sweep").mkdir(parents=True)
    named = {"a": folders[0], "b": folders[1], "begun": tmp_path / "begun"}
    given = [argument.format(**named) for argument in arguments]
    assert ended(command, monkeypatch, *given, f"--out={tmp_path / 'o'}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "o").exists()


def test_folders_of_one_name_are_told_apart(tmp_path):
    from gdiff_jax.auditing.comparing.result import compare_named

    folders = [put(tmp_path / name / "audit", audit_of(spread)) for name in ("a", "b")]
    assert compare_named(folders).names == ("a/audit", "b/audit")
    assert compare_named([folders[0] / "audit.json", folders[1]]).names == ("a/audit", "b/audit")
