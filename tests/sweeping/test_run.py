"""The engine: every trial once, of its own random numbers alone, whatever runs beside it and whatever happened before."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import (
    ONE_DEVICE,
    attacks_of,
    config,
    plain_plan,
    plan_of,
    read_records,
    run_in_memory,
    scores,
    without_time,
)

import gdiff_jax as gd
from gdiff_jax import parallel
from gdiff_jax.auto import Auto, Candidate
from gdiff_jax.sweeping import records, run, tables, trials
from gdiff_jax.sweeping.plan import PRIOR_ONLY, VictimState

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)\b")
long = pytest.mark.long


def test_every_trial_once_and_all_outputs(tiny_sweep):
    out = Path(tiny_sweep.run.out)
    rows = read_records(out)
    cells = [(r["method"], r["sigma"], r["image"], r["seed"]) for r in rows]
    assert len(set(cells)) == len(cells) == 3 * 2 * (1 + 3 * 3)
    assert all(np.isfinite(r["psnr"]) and np.isfinite(r["ssim"]) for r in rows)
    assert {(r["failed"], r["outcome"]) for r in rows} == {(False, "finished")}
    for name in ("manifest.json", "summary.md", "quality.png", "contact_sheet.png"):
        assert (out / name).stat().st_size > 0
    assert not list(out.rglob("*partial*"))
    assert not (out / "labels.png").exists()  # they are known


def test_records_hold_what_the_arrays_hold(tiny_sweep, tiny_prior):
    """The scores in the rows are those of the stored images, computed again."""
    images = plan_of(tiny_prior).images
    for row in read_records(tiny_sweep.run.out):
        with np.load(Path(tiny_sweep.run.out) / "chunks" / f"{row['chunk']:05d}.npz") as arrays:
            image, error = arrays["images"][row["row"]], arrays["trace_x0_error"][row["row"]]
            usual = {"images", "trace_distance", "trace_guidance_norm", "trace_x0_error"}
            assert set(arrays.files) - {"deviations"} == usual
            if "expected_psnr" in row:
                error_expected = float(np.mean(np.square(arrays["deviations"][row["row"]])))
                assert row["expected_psnr"] == pytest.approx(10 * np.log10(4 / error_expected), abs=1e-3)
        again = scores(image, images[row["image"]])
        for name in ("psnr", "ssim", "mse"):
            assert row[name] == pytest.approx(float(again[name]), abs=1e-3)
        if np.nanmin(error) > 1e-12:  # what is solved may have an error of exactly 0, its PSNR an end
            assert row["psnr_of_best_step"] == pytest.approx(10 * np.log10(4 / np.nanmin(error)), abs=1e-3)


def test_what_is_expected_is_in_the_rows_of_methods_that_say_it(tiny_sweep):
    """Here auto's under noise, where it is `analytic-mean`: what is exact errs by rounding alone."""
    expects = {(row["method"], row["sigma"]) for row in read_records(tiny_sweep.run.out) if "expected_psnr" in row}
    assert ("auto", 0.1) in expects
    assert expects <= {("auto", 0.1), ("auto", 0.4)}  # where all is noise it is the mean image


def test_common_random_numbers(tiny_sweep):
    """One noise draw for every sigma, so the noise's norm is proportional to it; prior-only does not know of sigma."""
    rows = read_records(tiny_sweep.run.out)
    norm = {(r["method"], r["sigma"], r["image"], r["seed"]): r["noise_norm"] for r in attacks_of(rows)}
    for image in range(3):
        for seed in range(2):
            assert norm["dsg", 0.4, image, seed] == pytest.approx(4 * norm["dsg", 0.1, image, seed], rel=1e-4)
            assert norm["dsg", 0.1, image, seed] == pytest.approx(norm["dps", 0.1, image, seed], rel=1e-6)
    assert len({norm["dsg", 0.1, image, seed] for image in range(3) for seed in range(2)}) == 6
    assert sum(r["method"] == PRIOR_ONLY for r in rows) == 3 * 2


@pytest.fixture(scope="module")
def finished(tiny_prior, tmp_path_factory):
    """A configuration and its plan, of 5 chunks, and their rows from a run that nothing disturbed."""
    c = config(tiny_prior, tmp_path_factory.mktemp("finished") / "out", methods=("dsg",), num_images=5)
    plan = plain_plan(tiny_prior, methods=("dsg",), num_images=5)
    store = records.Store(Path(c.run.out), plan.identity)
    return c, plan, run.run_trials(plan, store, 4, mesh=ONE_DEVICE, progress=False)


def are_the_same(small, large):
    """Rows of the same images in other chunks."""
    key = lambda r: (r["method"], r["sigma"] if r["sigma"] is not None else -1, r["image"])
    small, large = sorted(small, key=key), sorted((r for r in large if r["image"] < 3), key=key)
    assert [key(r) for r in small] == [key(r) for r in large]
    np.testing.assert_allclose([r["psnr"] for r in small], [r["psnr"] for r in large], atol=1e-3)
    assert np.std([r["psnr"] for r in small]) > 0.05  # there is something to tell apart


def test_a_result_depends_on_neither_chunk_nor_neighbours(finished, tiny_prior):
    _, _, rows = finished
    are_the_same(run_in_memory(plain_plan(tiny_prior, methods=("dsg",)), batch=5)[0], rows)


@pytest.mark.parametrize("solvable", [True, False])
def test_a_first_leak_that_is_solved_is_shown_before_others_are_looked_at(solvable, tiny_prior, monkeypatch):
    plan = plain_plan(tiny_prior, methods=("auto",), num_images=4, sigma_grid=(0.0,))
    looked_at = list[str]()
    candidate = Auto.candidate

    def noted(self, key, problem):
        looked_at.append("a leak")
        return candidate(self, key, problem)._replace(exact=solvable)

    monkeypatch.setattr(Auto, "candidate", noted)
    store, shown = records.MemoryStore(), list[tuple[int, int]]()
    after = lambda done: shown.append((len(attacks_of(store.rows(done))), len(looked_at)))
    rows = run.run_trials(plan, store, 4, mesh=ONE_DEVICE, progress=False, after=after)
    assert shown[:2] == ([(0, 0), (1, 1)] if solvable else [(0, 0), (1, 4)])  # a search is for all of them at once
    assert [row["image"] for row in attacks_of(rows)] == [0, 1, 2, 3]


@pytest.mark.long
def test_a_solved_trial_is_the_same_beside_others_that_are_searched_for(tiny_prior, monkeypatch):
    """And after a kill, which makes other neighbours: its trace is never a search's."""
    plan = plain_plan(tiny_prior, methods=("auto",), num_images=4, sigma_grid=(0.0, 0.1), victims=("cnn-narrow",))
    nothing = np.zeros(plan.prior.image_shape, np.float32)
    monkeypatch.setattr(Auto, "candidate", lambda self, key, problem: Candidate(nothing, float(problem.sigma) == 0, "a word"))
    whole, store = run_in_memory(plan, batch=3)
    solved = [row for row in attacks_of(whole) if row["sigma"] == 0]
    assert [row["psnr_of_best_step"] for row in solved] == pytest.approx([row["psnr"] for row in solved], abs=1e-3)
    again = records.MemoryStore()
    for k in range(3):  # the prior's two, and the first leak alone
        rows = store.rows([k])
        again.save(k, rows, store.arrays(k))
    assert without_time(run.run_trials(plan, again, 3, mesh=ONE_DEVICE, progress=False)) == without_time(whole)


@long
def test_nor_does_it_with_a_network_for_a_prior(tiny_prior):
    small, large = plan_of(tiny_prior, methods=("dsg",)), plan_of(tiny_prior, methods=("dsg",), num_images=4)
    are_the_same(run_in_memory(small, batch=4)[0], run_in_memory(large, batch=5)[0])


def test_one_compilation_for_the_whole_grid(tiny_prior):
    """Two sigmas, three images, a padded last chunk, then a second training state: nothing of the victim is traced again."""
    plan = plain_plan(tiny_prior, methods=("dsg",))
    traced = []

    class Counting(gd.Victim):
        def loss(self, params, x, y):
            traced.append(1)
            return super().loss(params, x, y)

    victim = plan.victims["mlp-narrow"]
    counting = Counting(victim.network, victim.image_shape, victim.num_classes, victim.options)
    params = plan.params[VictimState("mlp-narrow", 0)]
    trained = {VictimState("mlp-narrow", 5): jax.tree.map(lambda a: 2 * a, params)}
    plan = dataclasses.replace(plan, victims={"mlp-narrow": counting}, params={**plan.params, **trained})
    grid = lambda steps: {
        k: [trials.Trial(trials.Group("dsg", "mlp-narrow", steps), sigma, i, 0) for i in range(n)]
        for k, (sigma, n) in enumerate(((0.0, 3), (0.1, 3), (0.1, 1)))
    }
    program = run.compile_program(plan, ONE_DEVICE, grid(0)[0][0], 4)
    once = len(traced)
    found = [[rows for _, rows, _ in run.compute(plan, program, grid(steps))] for steps in (0, 5)]
    assert [[len(rows) for rows in chunks] for chunks in found] == [[3, 3, 1]] * 2
    assert found[0][0][0]["gradient_norm"] != found[1][0][0]["gradient_norm"]
    assert len(traced) == once > 0


def chunk_files(folder):
    return {file.name: file.stat().st_mtime_ns for file in (Path(folder) / "chunks").glob("[0-9]*.jsonl")}


def test_a_run_that_died_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    _, plan, rows = finished
    save, left = records.Store.save, [3]

    def die(store, chunk, *what):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(store, chunk, *what)

    monkeypatch.setattr(records.Store, "save", die)
    go = lambda: run.run_trials(plan, records.Store(tmp_path / "out", plan.identity), 4, mesh=ONE_DEVICE, progress=False)
    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.undo()
    done = chunk_files(tmp_path / "out")
    assert len(done) == 3
    assert without_time(go()) == without_time(rows)
    assert chunk_files(tmp_path / "out").items() > done.items(), "a finished chunk was computed again"
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["runs"]) == 2


def test_damaged_chunks_are_computed_again_and_it_is_said(finished, tmp_path, capsys):
    c, plan, rows = finished
    out = shutil.copytree(c.run.out, tmp_path / "out")
    damaged = out / "chunks" / "00003.jsonl"
    damaged.write_text(damaged.read_text().replace('"psnr": ', '"psnr": 9', 1))  # a number a reader would believe
    kept = chunk_files(out)
    again = run.run_trials(plan, records.Store(out, plan.identity), 4, mesh=ONE_DEVICE)
    assert without_time(again) == without_time(rows)
    assert "computed again, because damaged or of another version: 1 chunks (3)" in capsys.readouterr().out
    now = chunk_files(out)
    assert [name for name in kept if kept[name] != now[name]] == ["00003.jsonl"]


def test_records_in_memory_are_those_on_disk(finished):
    c, plan, rows = finished
    found, store = run_in_memory(plan)
    assert without_time(found) == without_time(rows)
    on_disk = records.Store(Path(c.run.out), plan.identity)
    for chunk in (0, 4):
        for name, array in on_disk.arrays(chunk).items():
            np.testing.assert_array_equal(store.arrays(chunk)[name], array)


def on_four_devices(plan, monkeypatch):
    """The rows, and the text of each compiled program."""
    devices = jax.local_devices()
    assert len(devices) >= 4, "conftest asks for four devices"
    texts, compile_program = [], run.compile_program

    def spy(*args):
        program = compile_program(*args)
        texts.append(program.run.as_text())
        return program

    monkeypatch.setattr(run, "compile_program", spy)
    rows, _ = run_in_memory(plan, mesh=parallel.trial_mesh(devices[:4]))
    monkeypatch.undo()
    return rows, texts


def same_without_a_collective(four, texts, one):
    assert texts
    assert not any(map(COLLECTIVE.search, texts))
    for a, b in zip(one, four, strict=True):
        assert all(a[k] == b[k] for k in ("method", "sigma", "image", "seed", "chunk", "row"))
        for name in ("psnr", "mse", "distance", "noise_norm"):
            assert a.get(name, np.nan) == pytest.approx(b.get(name, np.nan), rel=1e-4, nan_ok=True)


def test_four_devices_do_what_one_does(finished, monkeypatch):
    """Also where the last devices have nothing to do, and no program of the sweep holds a collective."""
    _, plan, rows = finished
    same_without_a_collective(*on_four_devices(plan, monkeypatch), rows)


@long
def test_four_devices_do_what_one_does_with_a_network_for_a_prior(tiny_prior, monkeypatch):
    plan = plan_of(tiny_prior, methods=("dsg", "dps"), num_images=5)
    rows, texts = on_four_devices(plan, monkeypatch)
    assert len(texts) == 3
    same_without_a_collective(rows, texts, run_in_memory(plan)[0])


def test_linear_algebra_is_done_one_trial_after_the_other(tiny_prior):
    """Two devices of a CPU that both call LAPACK with a batch from within XLA's pool of two threads wait for ever."""
    plan = plain_plan(tiny_prior, methods=("analytic",))
    trial = next(trial for trial in trials.make_grid(plan) if trial.group.method == "analytic")
    arguments = trials.shared_arguments(plan, trial.group), trials.own_arguments(plan, [trial] * 3)
    text = trials.make_runner(plan, trial.group, ONE_DEVICE).lower(*arguments).as_text()
    calls = [line for line in text.splitlines() if "custom_call @lapack" in line]
    assert calls
    shapes = [shape.split("x")[:-1] for line in calls for shape in re.findall(r"tensor<([\dx]+f32)>", line)]
    assert max(map(len, shapes)) == 2


@pytest.mark.parametrize("method", ["dsg", pytest.param("dps", marks=long)])
def test_a_trial_that_fails_is_counted_and_its_neighbours_do_not_notice(tiny_prior, method):
    """Noise of 1e38 overflows the distance: those trials end in nan, in the same batch as others."""
    plan = plain_plan(tiny_prior, methods=(method,), sigma_grid=(0.1, 1e38))
    group = trials.Group(method, "mlp-narrow", 0)
    fine, lost = ([trials.Trial(group, sigma, i, 0) for i in range(2)] for sigma in (0.1, 1e38))
    program = run.compile_program(plan, ONE_DEVICE, fine[0], 4)
    ((_, rows, _),) = run.compute(plan, program, {0: fine + lost})
    ((_, alone, _),) = run.compute(plan, program, {0: fine})
    assert [r["failed"] for r in rows] == [False] * 2 + [True] * 2
    assert [r["outcome"] for r in rows[:2]] == ["finished"] * 2
    assert {r["outcome"] for r in rows[2:]} <= {"not_finite", "leak_not_finite"}
    assert [r["psnr"] for r in rows[:2]] == pytest.approx([r["psnr"] for r in alone], abs=1e-4)
    assert "2 (2 failed)" in tables.table(rows, [])
