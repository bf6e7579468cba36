"""The blind test: what is asked and what its key says, that places and wrong answers are drawn, and how it is scored."""

import collections
import dataclasses
import re

import numpy as np
import pytest
from scipy import stats
from test_audit_summary import SIGMAS, make

from gdiff_jax.auditing import blind_page, pictures
from gdiff_jax.auditing.blind import CHOICES, LARGEST, QUESTIONS, blind_test

rng = np.random.default_rng(0)
IMAGES = rng.uniform(-1, 1, (12, 4, 4, 3)).astype(np.float32)
OTHERS = rng.uniform(-1, 1, (20, 4, 4, 3)).astype(np.float32)
CANDIDATES = np.concatenate([IMAGES, OTHERS])


def record(**changes):
    """20 dB is lost at 0.1 * 10^0.09: the level to ask at is 1, the last one."""
    audit = make(**changes)
    about = dict(command="audit.py", candidates=len(CANDIDATES))
    return dataclasses.replace(audit, about={**audit.about, **about})


def shade(row):
    """A reconstruction that tells its trial: a grey of its own."""
    return np.full((4, 4, 3), row["image"] / 12 + 0.02 * (row["method"] == "dps") + 0.04 * row["seed"] - 0.9 + row["sigma"] / 2)


def asked_of(audit, shift=0.0):
    return blind_test(audit, [shade(row) + shift for row in audit.trials], IMAGES, CANDIDATES)


def test_each_question_holds_the_truth_once_and_the_pick_of_its_leak():
    audit = record()
    test = asked_of(audit)
    assert (test["sigma"], test["choices"], len(test["questions"])) == (1.0, CHOICES, 12)
    assert sorted(q["image"] for q in test["questions"]) == list(range(12))
    assert [q["image"] for q in test["questions"]] != list(range(12))
    known = {pictures.png(image): k for k, image in enumerate(CANDIDATES)}
    for q in test["questions"]:
        shown = [known[picture] for picture in q["candidates"]]
        assert shown[q["answer"]] == q["image"]
        assert len(set(shown)) == CHOICES
        assert q["method"] == "dsg"
        assert q["found"] == pictures.png(shade(dict(image=q["image"], method="dsg", seed=0, sigma=1.0)))
    assert asked_of(audit) == test


def test_places_and_wrong_answers_are_drawn_from_all_alike():
    """Over 12 tests of other pictures: counts of 144 answers within five standard deviations, every candidate shown."""
    audit = record()
    tests = [asked_of(audit, shift=k / 100) for k in range(12)]
    assert len({test["seed"] for test in tests}) == 12
    places = collections.Counter(q["answer"] for test in tests for q in test["questions"])
    mean, deviation = stats.binom(144, 1 / CHOICES).stats()
    assert set(places) == set(range(CHOICES))
    assert all(abs(count - mean) < 5 * np.sqrt(deviation) for count in places.values())
    shown = collections.Counter(picture for test in tests for q in test["questions"] for picture in q["candidates"])
    assert len(shown) == len(CANDIDATES)


@pytest.mark.parametrize(("threshold", "sigma"), [(-50.0, SIGMAS[-1]), (90.0, SIGMAS[0]), (25.0, 0.1)])
def test_it_asks_at_the_least_noise_at_which_few_are_recovered(threshold, sigma):
    audit = record()
    assert asked_of(dataclasses.replace(audit, about={**audit.about, "threshold": threshold}))["sigma"] == sigma


def test_what_luck_explains_in_any_case_is_not_asked():
    """All of two right among six happens by guessing in one of 36 cases: no test. So does all of any among one."""
    assert asked_of(record(images=2)) is None
    assert asked_of(record(images=3)) is not None
    alone = record()
    assert asked_of(dataclasses.replace(alone, about={**alone.about, "candidates": 1})) is None
    failed = record()
    assert asked_of(dataclasses.replace(failed, trials=[{**r, "failed": True, "psnr": None} for r in failed.trials])) is None


@pytest.mark.parametrize(("questions", "choices"), [(12, 6), (4, 6), (12, 2), (9, 3)])
def test_recognised_is_what_guessing_gives_in_one_of_forty_tests_at_most(questions, choices):
    said = [row[2] == "recognised" for row in blind_page.scoring(questions, choices)["rows"]]
    assert said == [stats.binom.sf(right - 1, questions, 1 / choices) <= 0.025 for right in range(questions + 1)]


def test_the_key_of_the_page_is_that_of_its_pictures():
    audit = record()
    audit = dataclasses.replace(audit, blind=asked_of(audit))
    text = blind_page.render(audit)
    questions, key = text.split('<section class="key">')
    truth = [pictures.png(image) for image in IMAGES]
    parts = questions.split('<section class="question">')[1:]
    answers = re.findall(r"<tr><td>(\d+)</td><td>([A-F])</td><td>(\d+)</td>", key)
    assert len(parts) == len(answers) == 12
    for k, (part, (number, letter, name)) in enumerate(zip(parts, answers, strict=True), 1):
        assert int(number) == k
        assert f'<img src="data:image/png;base64,{truth[int(name)]}" alt="{letter}">' in part
    assert f"seed {audit.blind['seed']}" in key
    assert re.search(r"recovered|answer", questions.split("<body")[1].replace("needs an answer", "")) is None


def test_a_page_of_large_pictures_stays_below_its_size():
    noise = pictures.png(rng.uniform(-1, 1, (LARGEST, LARGEST, 3)), LARGEST)  # which cannot be packed
    assert QUESTIONS * (CHOICES + 1) * len(noise) < 1.5e6
    assert pictures.decode(pictures.png(np.zeros((256, 256, 3)), LARGEST)).shape == (LARGEST, LARGEST, 3)
