"""The engine: every trial once, of its own random numbers alone, whatever runs beside it and whatever happened before."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    ONE_DEVICE,
    attack_once,
    attacks_of,
    config,
    plain_plan,
    plan_of,
    read_records,
    run_in_memory,
    run_in_process,
    scores,
    to_folder,
    without_time,
)

import gdiff_jax as gd
from gdiff_jax import parallel
from gdiff_jax.mechanisms.base import pytree, static
from gdiff_jax.methods import DLG, METHODS, Method
from gdiff_jax.options import replace
from gdiff_jax.problem import Info
from gdiff_jax.sweeping import comparison, records, run, tables, trials
from gdiff_jax.sweeping.plan import PRIOR_ONLY, VictimState

# Descents of a few steps: what is tested is that they run and are told apart.
SHORT = dict(dlg_steps=3, inverting_steps=3)
COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)\b")
CNN = dict(victims=("cnn-batchnorm",))
long = pytest.mark.long


def by(rows, *names):
    return {tuple(row[name] for name in names): row for row in attacks_of(rows)}


def test_every_trial_once_and_all_outputs(tiny_sweep):
    out = Path(tiny_sweep.run.out)
    rows = read_records(out)
    cells = [(r["method"], r["sigma"], r["image"], r["seed"]) for r in rows]
    assert len(set(cells)) == len(cells) == 3 * 2 * (1 + 2 * 3)
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
            assert set(arrays.files) == {"images", "trace_distance", "trace_guidance_norm", "trace_x0_error"}
        again = scores(image, images[row["image"]])
        for name in ("psnr", "ssim", "mse"):
            assert row[name] == pytest.approx(float(again[name]), abs=1e-3)
        assert row["psnr_of_best_step"] == pytest.approx(10 * np.log10(4 / error.min()), abs=1e-3)


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
    assert np.std([r["psnr"] for r in small]) > 0.1  # there is something to tell apart


def test_a_result_depends_on_neither_chunk_nor_neighbours(finished, tiny_prior):
    _, _, rows = finished
    are_the_same(run_in_memory(plain_plan(tiny_prior, methods=("dsg",)), batch=5)[0], rows)


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


def is_exact(rows, sigmas=(0.0, 0.1)):
    """60 dB is the aim for a first dense layer; the table gives the analytic attack every image without noise."""
    found = by(rows, "method", "sigma", "image")
    for image in range(3):
        exact = found["analytic", sigmas[0], image]
        assert exact["psnr"] > 60
        assert exact["distance"] < 1e-3
        assert exact["psnr_at_least_distance"] > 60
        assert found["analytic", sigmas[1], image]["psnr"] < exact["psnr"] - 20
    assert "Strongest by median against mlp-narrow, untrained: analytic at sigma 0" in comparison.verdicts(rows)[0]
    lines = comparison.table(rows).splitlines()
    assert any("| analytic " in line and "| 0 " in line and "3/3" in line for line in lines)


def test_the_analytic_attack_is_exact_and_wins_in_a_sweep(tiny_prior):
    rows, _ = run_in_memory(plain_plan(tiny_prior, methods=("dsg", "analytic")))
    assert all(np.isfinite(row["psnr"]) for row in rows)
    assert all(row["memory_mib"] > 0 for row in attacks_of(rows))
    is_exact(rows)


@long
def test_all_methods_in_one_sweep(tiny_prior, tmp_path):
    rows = run_in_process(config(tiny_prior, tmp_path / "out", methods=("all",), **SHORT))
    found = by(rows, "method", "sigma", "image")
    assert {method for method, *_ in found} == set(METHODS)
    assert len(found) == len(METHODS) * 2 * 3
    assert all(np.isfinite(row["psnr"]) and row["memory_mib"] > 0 for row in rows)
    is_exact(rows)
    assert "Strongest by median against mlp-narrow, untrained: analytic at" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("labels", "methods"),
    [("inferred", ("dsg",)), *(pytest.param(labels, ("dsg", "inverting"), marks=long) for labels in ("known", "inferred"))],
)
def test_a_group_of_images_is_one_leak_and_each_image_a_row(tiny_prior, tmp_path, labels, methods):
    """The stored image of a row is what its scores are of, and the leak is the mean gradient."""
    changes = dict(num_images=4, group=2, labels=labels, methods=methods, **SHORT)
    plan = plain_plan(tiny_prior, **changes)
    rows = run_in_process(config(tiny_prior, tmp_path / "out", **changes), plan)
    found = by(rows, "method", "sigma", "image")
    assert len(found) == len(methods) * 2 * 4
    for row in rows:
        with np.load(tmp_path / "out" / "chunks" / f"{row['chunk']:05d}.npz") as arrays:
            image = arrays["images"][row["row"]]
        assert row["psnr"] == pytest.approx(float(scores(image, plan.images[row["image"]])["psnr"]), abs=1e-3)
    for first in (0, 2):
        pair = [found["dsg", 0.1, first + k] for k in range(2)]
        assert pair[0]["trial"] == pair[1]["trial"]
        assert pair[0]["distance"] == pair[1]["distance"]
        assert [r["psnr_of_best_step"] for r in pair] == [None, None]  # which is which is not known on the way
    victim, params = plan.victims["mlp-narrow"], plan.params[VictimState("mlp-narrow", 0)]
    gradient = jax.jit(lambda x, y: gd.victim_gradient(victim.loss, params, x, y))
    grads = [gradient(plan.images[i], jnp.asarray(plan.labels[i])) for i in range(2)]
    norm = np.sqrt(sum(np.square((a + b) / 2).sum() for a, b in zip(*map(jax.tree.leaves, grads), strict=True)))
    assert found["dsg", 0.0, 0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert found["dsg", 0.0, 0]["label_accuracy"] == 1  # four distinct labels of an untrained network
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "2 to a gradient, matched to the truth by assignment" in summary
    assert "nan" not in summary
    assert ("the labels" in summary) == (labels == "known")
    assert (tmp_path / "out" / "labels.png").exists() == (labels != "known")


CLIENTS = [
    (dict(local_steps=3), "3 local steps were made and their rate"),
    (dict(local_steps=2, attacker="eavesdropper"), "local rate is guessed"),
    (dict(local_steps=2, group=2, num_images=2, local_batch=1), "after 2 local steps of 1 images"),
    (CNN, "the statistics of the BatchNorms"),
    (dict(CNN, attacker="server"), "the candidate's own are taken"),
    (dict(CNN, attacker="eavesdropper"), "those of samples of the prior"),
    (dict(CNN, methods=("calibrated-mean",), chains=2, labels="inferred"), "mean of 2 chains of calibrated"),
    (dict(labels="joint", methods=("dlg",)), "optimises the labels"),
    (dict(layer_weights="equal", distance="cosine"), "guided by cosine, layers weighted alike"),
]


def client_plan(tiny_prior, changes, make=plan_of):
    return make(tiny_prior, **(dict(methods=("dsg",), num_images=1, sigma_grid=(0.0,)) | SHORT | changes))


def is_attacked(plan):
    rows, _ = attack_once(plan)
    assert np.isfinite(rows[0]["psnr"])
    assert rows[0]["outcome"] == "finished"
    known = {"attacker": plan.attacker.attacker, **dataclasses.asdict(plan.attacker.knowledge)}
    assert {name: rows[0][name] for name in known} == known


@pytest.mark.parametrize("changes", [changes for changes, _ in CLIENTS[1:3]], ids=lambda x: str(x)[:50])
def test_clients_of_several_steps_are_attacked(tiny_prior, changes):
    """By one who guesses rate and labels, and by one who knows both of a group in batches."""
    is_attacked(client_plan(tiny_prior, changes, plain_plan))


@long
@pytest.mark.parametrize(("changes", "words"), CLIENTS, ids=lambda x: str(x)[:50])
def test_every_client_and_attacker_runs_and_is_told(tiny_prior, tmp_path, changes, words):
    plan = client_plan(tiny_prior, changes)
    is_attacked(plan)
    given = dict(methods=("dsg",), num_images=1, sigma_grid=(0.0,)) | SHORT | changes
    run_in_process(config(tiny_prior, tmp_path / "out", **given), plan)
    assert words in (tmp_path / "out" / "summary.md").read_text()
    assert (tmp_path / "out" / "labels.png").exists() == (plan.attacker.knowledge.labels != "known")


@pytree
class Says(Method):
    """An attack that finds a grey image and the same label for every leak."""

    label: int = static(default=1)
    name = "dlg"

    def __call__(self, key, problem):
        trace = jax.tree.map(lambda a: jnp.full(1, a, jnp.float32), gd.StepInfo(0.1, 0.1, 0.1))
        image = jnp.zeros(problem.shape)
        return image, Info(trace, problem.outcome(image), jax.nn.one_hot(self.label, problem.num_classes))


@pytest.mark.parametrize(
    "dlg", [Says(), pytest.param(DLG(steps=3, joint_labels=True), marks=long)], ids=lambda m: type(m).__name__
)
def test_the_distance_of_joint_labels_is_at_the_label_that_was_found(tiny_prior, dlg):
    """Not at the one read off the last layer, which dlg was not told: after three steps the two differ."""
    plan = plain_plan(tiny_prior, labels="joint", methods=("dlg",), sigma_grid=(0.0,))
    rows, arrays = attack_once(dataclasses.replace(plan, methods={"dlg": dlg}), 3)
    victim, params = plan.victims["mlp-narrow"], plan.params[VictimState("mlp-narrow", 0)]
    gradient = lambda x, y: gd.victim_gradient(victim.loss, params, x, y)

    @jax.jit
    def distances(image, truth, y):
        return jax.vmap(lambda k: gd.l2(gradient(image, k), gradient(truth, y)))(jnp.arange(10))

    accuracy = []
    for row in rows:
        image = jnp.asarray(arrays["images"][row["row"]])
        y = int(plan.labels[row["image"]])
        at = np.asarray(distances(image, jnp.asarray(plan.images[row["image"]]), jnp.asarray(y)))
        assert (np.abs(row["distance"] - at[y]) < 1e-3 * at[y]) == (row["label_accuracy"] == 1)
        assert np.min(np.abs(row["distance"] - at)) < 1e-3 * at[y]
        accuracy.append(row["label_accuracy"])
    assert len(accuracy) == 3
    assert min(accuracy) < 1
    assert dlg != Says() or accuracy == [0, 1, 0]


@long
def test_guidance_at_x0hat_runs(tiny_prior):
    rows, _ = run_in_memory(plan_of(tiny_prior, through_prior=False, methods=("dsg", "dps"), num_images=1, sigma_grid=(0.0,)))
    assert all(np.isfinite(row["psnr"]) for row in rows)


@long
@pytest.mark.parametrize("method", ["calibrated-dsg", "calibrated-mean"])
def test_calibrated_methods_take_groups_and_leave_their_own_trace(tiny_prior, method):
    """What was measured of the guidance is in the trace of who measured it, and of nobody else."""
    plan = plain_plan(tiny_prior, methods=(method,), num_images=4, group=2, chains=2, sigma_grid=(0.1,))
    rows, arrays = attack_once(plan, 2)
    assert [r["image"] for r in rows] == [0, 1, 2, 3]
    assert not any(r["failed"] for r in rows)
    assert set(arrays) >= {"trace_signal", "trace_pull", "trace_noise_pull", "trace_curvature"}


@long
def test_every_mechanism_runs_and_is_told_in_the_summary(tiny_prior, tmp_path):
    """All in one sweep; those without noise once; the aware attacker is at distance 0 from the truth where there is none."""
    from test_trials import MECHANISMS, told_apart

    c = config(tiny_prior, tmp_path / "a", mechanisms=MECHANISMS, methods=("dsg",), num_images=1, sigma_grid=(0.1,), steps=2)
    rows = {r["mechanism"]: r for r in attacks_of(run_in_process(c))}
    assert {k: r["sigma"] for k, r in rows.items()} == {t: 0.1 if "+" in t else 0.0 for t in MECHANISMS}
    told_apart(rows)
    assert all(r["adaptive"] for r in rows.values())
    summary = (tmp_path / "a" / "summary.md").read_text()
    assert "which it matches through" in summary
    for reason in ("none: no noise", "none: no clipping", "none: uniform noise"):
        assert reason in summary
    unaware = replace(to_folder(c, tmp_path / "b"), mechanisms=("clip:0.1",), adaptive=False)
    other = {r["mechanism"]: r for r in attacks_of(run_in_process(unaware))}
    assert other["clip:0.1"]["adaptive"] is False
    assert "The mechanism is not known: the leak is taken for the gradient" in (tmp_path / "b" / "summary.md").read_text()
