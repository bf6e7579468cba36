"""Noise that is tried between levels: a root of the share is closed in on as far as the images allow, and found again."""

import dataclasses
import math

import numpy as np
import own_models
import pytest
from test_audit_summary import make, row
from tiny import ONE_DEVICE, QUICK_AUDIT, Still, clipped, plain_plan, without_time

import gdiff_jax as gd
from gdiff_jax.auditing import between, run, sentences
from gdiff_jax.auditing.summary import smallest_noise
from gdiff_jax.intervals import Interval
from gdiff_jax.sweeping import records
from gdiff_jax.sweeping import run as engine

GRID = (0.0, 0.01, 0.1, 1.0)


def tried(sigmas, roots):
    """A record of images whose PSNR falls through the threshold at roots of their own, not straight in log sigma."""
    psnr = lambda sigma, root: 30 - 10 * math.sqrt(sigma / root)
    rows = [row("dsg", s, i, 0, psnr(s, root), 1.0, rank=3) for s in sigmas for i, root in enumerate(roots)]
    none = [dict(sigma=s, epsilon=None, reason="no clipping", gamma=None) for s in sigmas]
    return make(rows, images=len(roots), seeds=1, guarantees=none)


def closed_in(roots, sigmas=GRID):
    """The levels after all that gains anything, and the noise that is found."""
    while (sigma := between.next_level(tried(sigmas, roots))) is not None:
        assert sigma not in sigmas
        sigmas = tuple(sorted((*sigmas, sigma)))
    return sigmas, smallest_noise(tried(sigmas, roots))


@pytest.mark.parametrize("root", [0.0004, 0.004, 0.03, 0.4])
def test_a_root_that_all_images_share_is_found_whatever_the_grid(root):
    """Three digits of the levels are what ends it, as the interval has no width of its own."""
    sigmas, found = closed_in([root] * 12)
    assert found.value == pytest.approx(root, rel=0.01)
    assert len(sigmas) - len(GRID) <= 15  # halvings of a decade to three digits, and as many decades below the grid
    assert abs(smallest_noise(tried(GRID, [root] * 12)).value / root - 1) > 0.02


def test_no_more_is_tried_than_images_can_tell():
    roots = np.geomspace(0.03, 0.3, 12)
    sigmas, found = closed_in(roots)
    assert len(GRID) < len(sigmas) <= len(GRID) + 2
    low, high = between.bracket(tried(sigmas, roots), found)
    assert high / low < found.high / found.low
    assert found.low < np.sort(roots)[::-1][2] < found.high  # which leaves two of twelve above it


def test_of_so_few_images_that_there_is_no_interval_the_gap_is_halved_all_the_same():
    assert between.next_level(tried((0.01, 0.1, 1.0), [0.3] * 2)) == pytest.approx(math.sqrt(0.1), rel=1e-2)


def test_nothing_is_tried_beyond_the_grid():
    nothing = [row("dsg", s, i, 0, 5.0, 1.0, rank=3) for s in GRID for i in range(12)]
    assert between.next_level(make(nothing)) is None
    assert between.next_level(tried(GRID, [30.0] * 12)) is None
    assert between.bracket(tried(GRID, [30.0] * 12), Interval(math.inf, 1.0, math.inf)) is None


def test_what_is_recognised_is_looked_for_too():
    """A level that was tried is what is told of it, so a level between is one closer."""
    rows = [row("dsg", s, i, 0, 5.0, 1.0, rank=0 if s < 0.05 else 3) for s in GRID for i in range(12)]
    assert between.next_level(make(rows)) == pytest.approx(math.sqrt(0.001), rel=0.01)


def test_more_noise_that_gives_more_is_warned_of():
    psnr = {0.0: 30.0, 0.01: 10.0, 0.1: 25.0, 1.0: 5.0}
    rows = [row("dsg", s, i, 0, psnr[s], 1.0, rank=3) for s in GRID for i in range(12)]
    (said,) = (w for w in sentences.warnings(make(rows)) if "not always safer" in w)
    assert "fewer than 25% are recovered at sigma 0.01, and 100% [74, 100] again at 0.1" in said
    assert smallest_noise(make(rows)).value > 0.1
    assert between.warnings(tried(GRID, [0.03] * 12)) == []


@pytest.fixture
def plan(tiny_prior):
    plan = plain_plan(tiny_prior, num_images=2)
    return dataclasses.replace(plan, methods={"still": Still()})


def once(sigma):
    """Asks for one level more."""
    return lambda rows: {} if any(r["sigma"] == sigma for r in rows) else {"gaussian": (sigma,)}


def test_levels_that_are_asked_for_follow_the_plans_by_the_same_program_and_stay(plan, monkeypatch, tmp_path):
    compiled, computed = list[str](), list[float]()
    make_program, describe = engine.compile_program, engine.describe
    monkeypatch.setattr(engine, "compile_program", lambda *a: compiled.append(a[2].group.title) or make_program(*a))
    monkeypatch.setattr(engine, "describe", lambda *a: computed.append(a[2][0].sigma) or describe(*a))
    go = lambda more, folder="out": engine.run_trials(
        plan, records.Store(tmp_path / folder, plan.identity), 4, mesh=ONE_DEVICE, progress=False, more=more
    )
    rows = go(once(0.05))
    assert sorted(compiled) == sorted(set(compiled))
    assert [r["sigma"] for r in rows if r["method"] == "still"] == [0.0, 0.0, 0.1, 0.1, 0.05, 0.05]
    all_levels = dataclasses.replace(plan, sigmas={"gaussian": (0.0, 0.05, 0.1)})
    everything = engine.run_trials(all_levels, records.MemoryStore(), 4, mesh=ONE_DEVICE, progress=False)
    key = lambda r: (r["sigma"] or 0, r["image"])
    numbers = lambda rows: [(*key(r), r["psnr"], r["noise_norm"]) for r in sorted(rows, key=key) if r["method"] == "still"]
    assert numbers(rows) == numbers(everything)
    computed.clear()
    assert go(once(0.05)) == rows  # nothing again
    assert computed == []
    other = go(once(0.02))  # which has the place of another level, and is not taken for it
    assert computed == [0.02]
    assert {r["sigma"] for r in other} == {None, 0.0, 0.1, 0.02}
    (tmp_path / "out" / "chunks" / "00002.jsonl").unlink()  # as after a kill
    assert without_time(go(once(0.02))) == without_time(other)
    assert computed[1:] == [0.02]


def test_an_audit_tells_of_the_levels_that_it_added(attacks_alone, plain_prior, data, monkeypatch):
    (loss, params), (images, labels) = own_models.make(), data
    asked = list[tuple[float, ...]]()
    monkeypatch.setattr(run, "next_level", lambda record: asked.append(tuple(record.sigmas)) or sum(record.sigmas[:2]) / 2)
    usual = dict(prior=plain_prior, sigmas=(0.1, 1.0), mechanism=clipped, methods=[Still()], **QUICK_AUDIT)
    audit = gd.audit(loss, params, images[:2], labels[:2], more_levels=2, **usual)
    assert asked == [(0.1, 1.0), (0.1, 0.55, 1.0)]
    assert audit.sigmas == pytest.approx([0.1, 0.325, 0.55, 1.0])
    assert [g["sigma"] for g in audit.guarantees] == audit.sigmas
