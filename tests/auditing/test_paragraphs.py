"""What an audit says to those who decide and to those who build: right in every case, and nothing twice."""

import dataclasses

import pytest
from test_audit_summary import SIGMAS, make, row

from gdiff_jax.auditing import advice, markdown, sentences, templates

MODEL = "Attacker 'informed', who knows the label and the prior."


def audit_of(*psnr, about=None, **changes):
    """Of twelve images, all with these PSNR at SIGMAS."""
    rows = [row("dsg", s, i, 0, p, 1.0) for i in range(12) for s, p in zip(SIGMAS, psnr, strict=True)]
    record = make(rows, seeds=1, **changes)
    return dataclasses.replace(record, about={**record.about, "threat_model": MODEL, **(about or {})})


NOTHING = audit_of(5.0, 5.0, 5.0, 5.0)
SOME = audit_of(40.0, 30.0, 10.0, 5.0)
ALL = audit_of(40.0, 30.0, 25.0, 22.0)
UNKNOWN = audit_of(None, None, None, None, about={"has_truth": False, "assumed": []})
CLIPPED = audit_of(
    40.0, 30.0, 10.0, 5.0, about={"clip_norm": 1.0},
    guarantees=[dict(sigma=s, epsilon=None if s == 0 else 1 / s, reason="" if s else "no noise", gamma=0.1) for s in SIGMAS],
)  # fmt: skip
TOO_OFTEN = [dict(sigma=0.1, epsilon=10.0, mu=1.0, counts=[dict(count=10, hits=990, expected=5000, bound=0.5, worst=0.5)])]
FAULTY = dataclasses.replace(
    CLIPPED,
    identification=dict(
        reason="", repetitions=1000, draws=10_000, clip_norm=1.0, norm=1.0, nearest=1.0, levels=TOO_OFTEN, pool=10, notes=[]
    ),
)
CASES = dict(nothing=NOTHING, some=SOME, all=ALL, unknown=UNKNOWN, clipped=CLIPPED, faulty=FAULTY)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nothing", "0% [0, 26] of images are recovered at 20 dB PSNR or better"),
        ("nothing", "The median is 5.0"),
        ("nothing", "Fewer than 25% are recovered at every noise level tried, from sigma 0 on."),
        ("nothing", "are recovered at no noise level tried"),
        ("some", "100% [74, 100] of images are recovered"),
        ("some", "from noise of sigma 0.032"),
        ("some", ", interpolated between 0.01 and 0.1"),
        ("some", "There is no differential-privacy guarantee: no clipping"),
        ("all", "No noise level tried, up to sigma 1, leaves fewer than 25% recovered"),
        ("all", "are recovered even at sigma 1, the most that was tried"),
        ("clipped", "the guarantees below hold against every attack"),
        ("unknown", "The private image is not known here"),
        ("unknown", "Assumed is attacker 'informed', who"),
        *[(case, "images like these, and attacker 'informed', who") for case in CASES if case != "unknown"],
    ],
)  # fmt: skip
def test_those_who_decide_are_told(case, words):
    assert words in " ".join(sentences.decision(CASES[case]))


CHANGES = {
    "ask for no change": {"nothing"},
    "More noise is needed: try more than sigma 1.": {"all"},
    "Release with noise of at least sigma 0.1.": {"some", "clipped"},  # the next that was tried
    "First mend the mechanism": {"faulty"},
    "with images of your own": {"unknown"},
    "for instance to the gradients' median norm, by Chain((Clip(10), GaussianNoise(sigma)))": {
        "nothing",
        "some",
        "all",
    },
    "see what changed by gd.compare(before, after)": {"nothing", "some", "all", "clipped", "faulty"},
}


@pytest.mark.parametrize(("words", "cases"), CHANGES.items())
def test_those_who_build_are_told_what_follows_and_nothing_else(words, cases):
    assert {name for name, record in CASES.items() if words in " ".join(advice.advice(record))} == cases


def test_a_command_is_checked_by_the_command():
    by_command = dataclasses.replace(SOME, about={**SOME.about, "victim_given": "cnn"})
    said = " ".join(advice.advice(by_command))
    assert "by audit.py compare BEFORE AFTER; --fail_if='recovered > 0.25' keeps a pipeline to it" in said
    assert "gd.compare" not in said
    assert "median norm, by clip:10+gaussian." in said


def test_an_audit_that_is_not_finished_gives_no_advice():
    assert advice.advice(dataclasses.replace(SOME, about={**SOME.about, "unfinished": True})) == []


def test_what_who_has_no_gradient_comes_to():
    told = " ".join(sentences.decision(dataclasses.replace(SOME, mean_image=[{"psnr": 12.0}, {"psnr": 13.0}])))
    assert "dB; without the leak the mean image has 12.5 dB." in told
    assert "without the leak" not in " ".join(sentences.decision(SOME))


def test_the_layer_that_answers_most_is_named():
    theory = {"shares": {"conv.kernel": 0.7, "out.kernel": 0.3}, "spectra": []}
    told = lambda shares: " ".join(advice.advice(dataclasses.replace(SOME, theory={**theory, "shares": shares})))
    assert "70% is in conv.kernel" in told(theory["shares"])
    assert " is in " not in told({"conv.kernel": 0.0})


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_said_twice_and_nothing_is_left_to_be_filled_in(case):
    record = CASES[case]
    said = [*sentences.verdict(record), *sentences.warnings(record)]
    assert len(said) == len(set(said))
    assert markdown.render(record).count(MODEL[1:]) == 1
    for word in ("nan", "None", " inf", "{", "  "):
        assert word not in " ".join(said).replace("informed", ""), word
    shown = record.verdict().replace("For those who decide: ", "").replace("For those who build: ", "")
    assert " ".join(shown.split("\n\n")) == " ".join(sentences.verdict(record))


def test_the_page_holds_both_paragraphs_and_findings_first():
    source = templates.jinja2.PackageLoader("gdiff_jax.auditing", "").get_source(templates.jinja2.Environment(), "page.html")[0]
    places = [source.index(words) for words in ("in findings", "For those who decide", "For those who build", 'id="worst"')]
    assert places == sorted(places)
    assert "about.threat_model" not in source


def test_one_that_goes_on_counts_what_was_attacked():
    begun = dataclasses.replace(SOME, trials=[r for r in SOME.trials if r["image"] < 2])
    assert "(2 images x 1 seeds" in " ".join(sentences.decision(begun))
