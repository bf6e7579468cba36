"""Measured against bound: a sound mechanism gives what theory says of it, and each fault that is planted in one is found."""

import dataclasses
import functools

import jax
import numpy as np
import own_models
import pytest
from scipy import stats
from test_audit_summary import make
from tiny import Still, audit_config
from written import faults_of_json

import gdiff_jax as gd
from gdiff_jax import intervals
from gdiff_jax.auditing import against_bound, call, identify, run
from gdiff_jax.auditing.about import clip_norm
from gdiff_jax.auditing.enough import enough
from gdiff_jax.commands import audit as command
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise, LaplaceNoise
from gdiff_jax.sweeping.config import Client
from gdiff_jax.theory.privacy import gaussian_guarantee

NORM = 0.25  # below the norm of every gradient here
SIGMAS = (0.0, 0.1, 0.25, 0.6)


def clipped(sigma):
    return Chain((Clip(NORM), GaussianNoise(sigma)))


@pytest.fixture
def plan(planned, data):
    """Of a model whose six images are labelled 0 .. 5."""
    return planned(*own_models.make(), *data, sigmas=SIGMAS, mechanism=clipped)


def with_(found):
    return make(identification=found)


def measure(plan, share=0.1):
    """By default a share below a blind guess's: no noise is looked for."""
    return identify.measured(plan, plan.images, None, share)


def test_a_sound_release_gives_what_is_expected_and_no_more_than_the_bound(plan):
    found = measure(plan)
    assert (found["reason"], found["pool"], found["repetitions"], found["clip_norm"]) == ("", 6, 1000, NORM)
    assert found["norm"] == pytest.approx(NORM)
    assert 0 < found["nearest"] < 2 * NORM
    rows = against_bound.identified(with_(found))
    assert [(r.sigma, r.count) for r in rows] == [(0.1, 6), (0.25, 6), (0.6, 6)]
    for r in rows:
        bound = gaussian_guarantee(r.sigma / NORM, 1e-5).reconstruction_bound(1 / 6)
        assert r.bound == pytest.approx(bound)
        assert r.expected < r.bound
        assert r.worst < r.bound
        sure = intervals.clopper_pearson(round(1000 * r.success.value), 1000, 1e-4)
        assert sure.low < r.expected < sure.high
    assert [r.success.value for r in rows] == sorted((r.success.value for r in rows), reverse=True)
    record = with_(found)
    assert against_bound.findings(record) == against_bound.warnings(record) == []
    assert "gamma(1/6)" in against_bound.sentences(record)[0]


def test_what_is_expected_is_that_of_the_gradients_themselves(plan):
    """By draws of whole releases, with gradients, clipping and noise in NumPy."""
    loss, params = own_models.make()
    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, plan.images, plan.labels)
    g = np.concatenate([np.asarray(leaf, np.float64).reshape(6, -1) for leaf in jax.tree.leaves(gradient)], 1)
    g *= np.minimum(1, NORM / np.linalg.norm(g, axis=1))[:, None]
    rng, hits, sigma = np.random.default_rng(0), 0, 0.25
    for _ in range(4000):
        i = rng.integers(6)
        leak = g[i] + sigma * rng.normal(size=g.shape[1])
        hits += np.argmin(np.square(leak - g).sum(1)) == i
    (row,) = next(level for level in measure(plan)["levels"] if level["sigma"] == sigma)["counts"]
    sure = intervals.clopper_pearson(hits, 4000, 1e-4)
    assert sure.low < row["expected"] / identify.DRAWS < sure.high


def forgotten_noise(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "__call__", lambda self, key, gradient: gradient)


def halved_noise(monkeypatch):
    sound = GaussianNoise.__call__
    monkeypatch.setattr(GaussianNoise, "__call__", lambda self, key, g: sound(GaussianNoise(self.sigma / 2), key, g))


def forgotten_clip(monkeypatch):
    monkeypatch.setattr(Clip, "__call__", lambda self, key, gradient: gradient)
    monkeypatch.setattr(Clip, "simulate", lambda self, gradient, leak: gradient)


@pytest.mark.parametrize("fault", [forgotten_noise, halved_noise, forgotten_clip])
def test_a_planted_fault_is_found(plan, monkeypatch, fault):
    """In the measured success, above the bound of the mechanism as it says it is, with a power above 0.99."""
    fault(monkeypatch)
    found = measure(plan)
    record = with_(found)
    (said,) = against_bound.findings(record)
    assert said.startswith("FINDING: among 6 candidates")
    assert "above gamma(1/6)" in said
    assert record.verdict().startswith(said)
    rows = against_bound.identified(record)
    assert max(power(r) for r in rows) > 0.99
    assert any(r.above_bound and r.above_expected for r in rows)


def power(row, releases=1000):
    """How often as many releases of this success would be found above the bound."""
    above = (h for h in range(releases + 1) if intervals.clopper_pearson(h, releases, 2 * against_bound.ERROR).low > row.bound)
    least = next(above, releases + 1)
    return stats.binom.sf(least - 1, releases, row.success.value)


def test_more_noise_than_is_said_is_warned_of(plan, monkeypatch):
    sound = GaussianNoise.__call__
    monkeypatch.setattr(GaussianNoise, "__call__", lambda self, key, g: sound(GaussianNoise(self.sigma * 3), key, g))
    record = with_(measure(plan))
    assert against_bound.findings(record) == []
    (said,) = against_bound.warnings(record)
    assert "Do not rely on what is measured" in said
    assert said in record.warnings()


def test_a_fault_below_the_bound_is_found_by_what_is_expected():
    """Gradients that are alike give little away: less noise shows against that, long before the bound is passed."""
    row = dict(count=10, hits=300, expected=20_000, bound=0.7, worst=0.65)
    level = dict(sigma=0.5, epsilon=10.0, mu=2.0, counts=[row])
    data = dict(reason="", pool=10, notes=[], repetitions=1000, draws=100_000, clip_norm=1.0, norm=1.0, nearest=0.4)
    (said,) = against_bound.findings(with_({**data, "levels": [level]}))
    assert "where clipping to 1 and noise of sigma 0.5 leave 20%" in said
    fine = {**level, "counts": [{**row, "hits": 205}]}
    assert against_bound.findings(with_({**data, "levels": [fine]})) == []
    as_said = with_({**data, "levels": [fine]})
    (told,) = against_bound.sentences(as_said)
    assert "20% [18, 23] of 1000 releases" in told
    assert "each 1.49 from the others, would give 65% at sigma 0.5" in against_bound.why_below(as_said)


def test_at_the_bound_itself_chance_is_no_finding():
    """Of a worst-case pair success is the bound: once in ten thousand audits it may be found above."""
    bound = gaussian_guarantee(1.0, 1e-5).reconstruction_bound(0.5)
    rng = np.random.default_rng(0)
    lows = [intervals.clopper_pearson(h, 1000, 2 * against_bound.ERROR).low for h in rng.binomial(1000, bound, 3000)]
    assert sum(low > bound for low in lows) <= 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(mechanism=LaplaceNoise), "not Gaussian noise, clipped before or not"),
        (dict(mechanism=lambda s: Chain((Clip(1.0), LaplaceNoise(s)))), "not Gaussian noise, clipped before or not"),
        (dict(mechanism=lambda s: Chain((GaussianNoise(s), Clip(1.0)))), "not Gaussian noise, clipped before or not"),
        (dict(mechanism=lambda s: Chain((Clip(s + 1.0), GaussianNoise(s)))), "another norm at each noise level"),
        (dict(sigmas=(0,)), "no noise level has any noise"),
    ],
)
def test_nothing_is_measured_where_the_best_attacker_is_not_known(planned, data, changes, reason):
    plan = planned(*own_models.make(), *data, **{**dict(sigmas=SIGMAS, mechanism=clipped), **changes})
    found = measure(plan)
    assert found.keys() == {"reason"}
    assert reason in found["reason"]
    assert against_bound.identified(with_(found)) == against_bound.sentences(with_(found)) == []
    assert against_bound.why_below(with_(found)) == ""


def test_nothing_is_measured_of_several_images(plan):
    assert "2 images" in measure(dataclasses.replace(plan, client=Client(group=2)))["reason"]


@pytest.mark.parametrize("mechanism", [clipped, GaussianNoise, lambda s: GaussianNoise(2 * s)])
def test_the_noise_is_found_where_success_crosses_the_share(planned, data, mechanism):
    """Not on the grid; and what the mechanism itself does there is counted."""
    plan = planned(*own_models.make(), *data, sigmas=SIGMAS, mechanism=mechanism)
    found = measure(plan, 0.4)
    sigma, low, high = found["enough"]["sigma"]
    assert (found["enough"]["count"], found["enough"]["share"]) == (6, 0.4)
    assert low < sigma < high < 1.05 * low
    record = with_(found)
    rows = against_bound.identified(record)
    assert [r.sigma for r in rows] == sorted({*SIGMAS[1:], sigma})
    (at,) = (r for r in rows if r.sigma == sigma)
    assert at.expected == pytest.approx(0.4, abs=1e-3)
    assert [r.expected >= 0.4 for r in rows] == [r.sigma <= sigma for r in rows]
    assert against_bound.findings(record) == against_bound.warnings(record) == []
    (best,) = (e for e in enough(record) if "the best attacker names an image drawn from 6" in e.wanted)
    assert best.noise == (sigma, low, high)
    assert f"fewer than 40% take noise of sigma {sigma:.3g} [" in " ".join(against_bound.sentences(record))
    if mechanism is not clipped:
        assert (at.epsilon, at.bound, at.worst, found["clip_norm"]) == (None,) * 4
        assert "gamma" not in against_bound.sentences(record)[0]


def test_noise_is_found_to_be_too_little_without_a_bound(planned, data, monkeypatch):
    halved_noise(monkeypatch)
    found = measure(planned(*own_models.make(), *data, sigmas=(0.0, 0.3, 1.0), mechanism=GaussianNoise), 0.4)
    (said,) = against_bound.findings(with_(found))
    assert "is noise too small?" in said
    (row,) = next(level for level in found["levels"] if level["sigma"] == found["enough"]["sigma"][0])["counts"]
    sure = intervals.clopper_pearson(row["hits"], found["repetitions"], 1e-4)
    assert sure.low > row["expected"] / found["draws"] == pytest.approx(0.4, abs=1e-3)  # at what was found


def test_no_noise_hides_a_record_better_than_a_guess(plan):
    assert measure(plan, 1 / 6)["enough"] is None
    assert measure(plan, 0.2)["enough"]["sigma"][0] > 1


def test_the_noise_is_the_mechanisms_own_and_not_the_grids(planned, data):
    """Which may say it in other units."""
    twice = lambda s: Chain((Clip(NORM), GaussianNoise(2 * s)))
    found = measure(planned(*own_models.make(), *data, sigmas=(0.125,), mechanism=twice))
    (row,) = against_bound.identified(with_(found))
    assert row.bound == pytest.approx(gaussian_guarantee(0.25 / NORM, 1e-5).reconstruction_bound(1 / 6))
    assert row.expected < row.worst < row.bound
    assert against_bound.findings(with_(found)) == against_bound.warnings(with_(found)) == []


@pytest.mark.parametrize(
    ("mechanism", "norm"),
    [
        (clipped, NORM),
        (lambda s: Chain((Clip(NORM), GaussianNoise(2 * s))), None),
        (lambda s: Chain((Clip(NORM + s), GaussianNoise(s))), None),
        (GaussianNoise, None),
    ],
)
def test_a_clip_norm_is_told_where_it_holds_at_every_level(planned, data, mechanism, norm):
    """Or an epsilon would be told that is another's."""
    assert clip_norm(planned(*own_models.make(), *data, sigmas=SIGMAS, mechanism=mechanism)) == norm


def test_of_local_steps_what_the_client_sends_is_told_apart(plan):
    found = measure(dataclasses.replace(plan, client=Client(local_steps=2, local_learning_rate=0.5)))
    record = with_(found)
    assert against_bound.findings(record) == against_bound.warnings(record) == []


@pytest.mark.parametrize(
    ("pool", "counts"),
    [
        (2, (2,)),
        (6, (6,)),
        (10, (10,)),
        (12, (10,)),
        (64, (10, 64)),
        (1999, (10, 100, 1000)),
        (20_000, identify.COUNTS),
    ],
)
def test_the_counts_are_powers_of_ten_and_all(pool, counts):
    assert identify.counts_for(pool) == counts


def test_other_candidates_take_part_by_their_labels(plan, data):
    """Each once, and none whose label is no class of the loss."""
    few = dataclasses.replace(plan, images=plan.images[:2], labels=plan.labels[:2])
    rest = identify.measured(few, plan.images, plan.labels, 0.1)
    assert rest["pool"] == 6
    assert [level["counts"][0]["expected"] for level in rest["levels"]] == [
        level["counts"][0]["expected"] for level in measure(plan)["levels"]
    ]
    unlabelled = identify.measured(few, plan.images, None, 0.1)
    assert (unlabelled["pool"], len(unlabelled["notes"])) == (2, 2)
    beyond = identify.measured(few, plan.images, plan.labels + 20, 0.1)
    assert beyond["pool"] == 2
    assert "label 22" in beyond["notes"][0]


def test_in_a_call_candidates_take_part_by_labels_that_are_given(planned, data, monkeypatch):
    monkeypatch.setattr(call, "run", lambda plan, question, *_: (plan, question))
    images, labels = data
    asked = dict(sigmas=(0.3,), mechanism=clipped, candidates=images)
    known = dict(candidate_labels=labels.tolist())
    for given, pool in ((known, 6), ({}, 2)):
        plan, question = planned(*own_models.make(), images[:2], labels[:2], **asked, **given)
        assert identify.measured(plan, question.candidates, question.candidate_labels, 0.1)["pool"] == pool


def test_candidates_that_are_there_twice_keep_their_own_labels(data):
    images, labels = data
    twice = run.Question(images[[0, 0, 1, 0, 2]], candidate_labels=labels[[0, 0, 1, 0, 2]])
    np.testing.assert_array_equal(twice.candidates, images[:3])
    np.testing.assert_array_equal(twice.candidate_labels, labels[:3])


def test_a_large_model_has_fewer_candidates_and_says_so(plan, monkeypatch):
    monkeypatch.setattr(identify, "LARGEST", 4 * plan.size(next(iter(plan.params)).name))
    monkeypatch.setattr(identify, "WORK", 1.0)
    found = measure(plan)
    assert (found["pool"], found["repetitions"]) == (4, identify.FEWEST)
    assert "the first 4 take part" in " ".join(found["notes"])


def test_the_command_ends_with_a_code_of_its_own(tiny_prior, tmp_path, monkeypatch, capsys):
    """Where a fault is planted; and with 0 without."""
    monkeypatch.setattr(run, "_theory", lambda *_: None)
    monkeypatch.setattr(run, "_film", lambda *_: [])
    config = functools.partial(audit_config, tiny_prior, sigma_grid=(0.5,), mechanism=f"clip:{NORM}+gaussian")
    asked = lambda out: config(tmp_path / out, methods=("analytic",), victim=f"{own_models.__file__}:mlp")
    monkeypatch.setattr(command.flags, "read_flags", lambda _: asked("sound"))
    command._audit()
    assert "FINDING" not in capsys.readouterr().out
    page = (tmp_path / "sound" / "report.html").read_text()
    assert "Measured against that bound" in page
    assert 'id="figure-identification"' in page
    forgotten_noise(monkeypatch)
    monkeypatch.setattr(command.flags, "read_flags", lambda _: asked("faulty"))
    with pytest.raises(SystemExit) as end:
        command._audit()
    assert end.value.code == 4
    assert "FINDING: among 6 candidates" in capsys.readouterr().out
    assert "FINDING: among 6 candidates" in (tmp_path / "faulty" / "report.html").read_text()
    assert faults_of_json((tmp_path / "faulty" / "audit.json").read_text()) == []
    assert gd.Audit.load(tmp_path / "faulty" / "audit.json").findings()


def test_an_audit_of_before_is_read(attacks_alone, plain_prior, data, tmp_path):
    """Without the field; and the call returns what it found."""
    options = dict(prior=plain_prior, sigmas=(0.5,), methods=[Still()], steps=3, batch=4, seeds=1, progress=False)
    audit = gd.audit(*own_models.make(), *data, mechanism=clipped, **options)
    assert audit.findings() == []
    assert faults_of_json(audit.to_json()) == []
    text = audit.to_json().replace(', "identification": null', "")
    assert "identification" not in text
    (tmp_path / "old.json").write_text(text)
    assert gd.Audit.load(tmp_path / "old.json").identification is None
