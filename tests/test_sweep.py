"""The sweep as a user meets it: a command, its output folder, its errors, a kill in the middle."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dp_accounting
import jax
import numpy as np
import pytest
from PIL import Image

import gdiff_jax as gd
from experiments import memory, records, report, sweep, trials, victim_files
from experiments.cli import ConfigError
from experiments.inputs import DEFAULT_SIGMAS, SweepConfig, load_inputs
from experiments.train_prior import SCHEDULER
from gdiff_jax import parallel

ROOT = Path(__file__).parent.parent
ONE_DEVICE = parallel.trial_mesh(jax.local_devices()[:1])


def config(tiny_prior, out, **changes):
    tiny = SweepConfig(
        sigma_grid=(0.0, 0.1),
        victims=("mlp",),
        images=str(tiny_prior / "images.npz"),
        num_images=3,
        prior=str(tiny_prior / "prior"),
        steps=3,
        batch=4,
        out=str(out),
    )
    return dataclasses.replace(tiny, **changes)


def command_of(script):
    return [sys.executable, str(ROOT / "experiments" / script)]


def command(c):
    flags = []
    for name, value in dataclasses.asdict(c).items():
        value = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags.append(f"--{name}={value}")
    return [*command_of("sweep.py"), *flags]


def run_in_process(c):
    inputs = load_inputs(c)
    store = records.Store(Path(c.out), {"steps": c.steps})
    sweep.sweep(c, inputs, store, mesh=ONE_DEVICE)
    return [json.loads(line) for line in (Path(c.out) / "records.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def records_of(c):
    """The rows that a sweep left, without the time they took."""
    return without_time(map(json.loads, (Path(c.out) / "records.jsonl").read_text().splitlines()))


def test_every_trial_once_and_all_outputs(tiny_prior, tmp_path):
    rows = run_in_process(config(tiny_prior, tmp_path / "out", seeds=2))
    cells = [(r["method"], r["sigma"], r["image"], r["seed"]) for r in rows]
    assert len(set(cells)) == len(cells) == 3 * 2 * (1 + 2 * 2)
    assert all(np.isfinite(r["psnr"]) and np.isfinite(r["ssim"]) for r in rows)
    for name in ("manifest.json", "summary.md", "quality.png", "contact_sheet.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert not list((tmp_path / "out").rglob("*partial*"))


def test_records_hold_what_the_arrays_hold(tiny_prior, tmp_path):
    """The scores in the rows are those of the stored images, computed again."""
    c = config(tiny_prior, tmp_path / "out")
    rows = run_in_process(c)
    images = load_inputs(c).images
    for row in rows:
        with np.load(tmp_path / "out" / "chunks" / f"{row['chunk']:05d}.npz") as arrays:
            image, error = arrays["images"][row["row"]], arrays["trace_x0_error"][row["row"]]
        scores = gd.image_metrics(image, images[row["image"]])
        assert row["psnr"] == pytest.approx(float(scores["psnr"]), abs=1e-3)
        assert row["psnr_of_best_step"] == pytest.approx(10 * np.log10(4 / error.min()), abs=1e-3)


def test_common_random_numbers(tiny_prior, tmp_path):
    """One noise draw for every sigma, so the noise's norm is proportional to it; prior-only does not know of sigma."""
    rows = run_in_process(config(tiny_prior, tmp_path / "out", sigma_grid=(0.1, 0.4), methods=("dsg",)))
    norm = {(r["sigma"], r["image"]): r["noise_norm"] for r in rows if r["method"] == "dsg"}
    for image in range(3):
        assert norm[0.4, image] == pytest.approx(4 * norm[0.1, image], rel=1e-4)
    assert norm[0.1, 0] != norm[0.1, 1]
    assert sum(r["method"] == trials.PRIOR_ONLY for r in rows) == 3


def test_a_result_depends_on_neither_chunk_nor_neighbours(tiny_prior, tmp_path):
    key = lambda r: (r["method"], r["sigma"] if r["sigma"] is not None else -1, r["image"])
    small = sorted(run_in_process(config(tiny_prior, tmp_path / "a", methods=("dsg",))), key=key)
    large = sorted(run_in_process(config(tiny_prior, tmp_path / "b", methods=("dsg",), batch=5, num_images=4)), key=key)
    large = [r for r in large if r["image"] < 3]
    assert [key(r) for r in small] == [key(r) for r in large]
    np.testing.assert_allclose([r["psnr"] for r in small], [r["psnr"] for r in large], atol=1e-3)


def test_one_compilation_for_the_whole_grid(tiny_prior, tmp_path):
    """Two sigmas, three images, a padded last chunk, and a second training state: the victim's loss is traced as for one."""
    c = config(tiny_prior, tmp_path / "out", methods=("dsg",))
    inputs = load_inputs(c)
    group = trials.Group("dsg", "mlp", 0)
    grid = [[trials.Trial(group, s, i, 0) for i in range(n)] for s, n in ((0.0, 3), (0.1, 3), (0.1, 1))]
    counts = []
    for chunks in (1, 3):
        traced = []

        class Counting(gd.Victim):
            def loss(self, params, x, y, traced=traced):
                traced.append(1)
                return super().loss(params, x, y)

        victim = inputs.victims["mlp"]
        counting = Counting(victim.network, victim.image_shape, victim.num_classes, victim.options)
        counted = dataclasses.replace(inputs, victims={"mlp": counting})
        program = sweep.compile_program(c, counted, ONE_DEVICE, grid[0][0], c.batch)
        assert len(list(sweep.compute(c, counted, program, dict(enumerate(grid[:chunks]))))) == chunks
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0


def test_resume_after_sigkill_equals_an_undisturbed_run(undisturbed, tmp_path):
    c = dataclasses.replace(undisturbed, out=str(tmp_path / "killed"))
    process = subprocess.Popen(command(c), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    chunks = tmp_path / "killed" / "chunks"
    deadline = time.time() + 300
    while len(list(chunks.glob("[0-9]*.jsonl"))) < 8:  # in the middle of the guided trials
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in chunks.glob("[0-9]*.jsonl")}
    assert not (tmp_path / "killed" / "records.jsonl").exists()

    subprocess.run(command(c), check=True, capture_output=True)
    assert records_of(c) == records_of(undisturbed)
    assert all(f.stat().st_mtime_ns == t for f, t in done.items()), "a finished chunk was computed again"
    assert len(json.loads((tmp_path / "killed" / "manifest.json").read_text())["runs"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_at_once_and_say_how_to_go_on(undisturbed, tmp_path, number):
    c = dataclasses.replace(undisturbed, out=str(tmp_path / "out"))
    process = subprocess.Popen(command(c), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out" / "chunks").glob("[0-9]*.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert "the same command goes on" in process.communicate()[1]
    assert process.returncode == 128 + number
    assert not (tmp_path / "out" / "records.jsonl").exists()


BAD = [
    (dict(sigma_grid=(0.0, -0.1)), "-0.1"),
    (dict(sigma_grid=(float("nan"),)), "nan"),
    (dict(sigma_grid=(float("inf"),)), "inf"),
    (dict(sigma_grid=()), "sigma_grid"),
    (dict(sigma_grid=(0.1, 0.1)), "repeats"),
    (dict(methods=("ddrm",)), "ddrm"),
    (dict(victims=("vgg",)), "vgg"),
    (dict(images="gdiff-no-such-folder"), "gdiff-no-such-folder"),
    (dict(images="cifar10-test-64"), "(32, 32, 3)"),
    (dict(num_images=7), "7"),
    (dict(label=10), "10"),
    (dict(num_classes=2), "outside 0..1"),
    (dict(steps=1001), "1001"),
    (dict(steps=0), "0"),
    (dict(batch=0), "batch"),
    (dict(guidance_rate=1.5), "1.5"),
    (dict(zeta=-1.0), "-1.0"),
    (dict(spacing="cubic"), "cubic"),
    (dict(prior="no-such-prior"), "no-such-prior"),
    (dict(prior_dtype="float8"), "float8"),
    (dict(training_steps=(5,)), "train_victim.py --victim=mlp"),
    (dict(mechanisms=()), "mechanisms"),
    (dict(mechanisms=("gauss",)), "'gauss' is not known"),
    (dict(mechanisms=("clip+gaussian",)), "clip:1"),
    (dict(mechanisms=("clip:-1+gaussian",)), "above 0"),
    (dict(mechanisms=("topk:0",)), "topk:0.1"),
    (dict(mechanisms=("qsgd:2.5",)), "number of levels"),
    (dict(mechanisms=("soteria:1",)), "share of features"),
    (dict(mechanisms=("gaussian:0.1",)), "takes no number"),
    (dict(epsilon_grid=(1.0,)), "clip:1+gaussian"),
    (dict(epsilon_grid=(0.0,), mechanisms=("clip:1+gaussian",)), "0.0"),
    (dict(epsilon_grid=(1.0,), mechanisms=("clip:1+laplace",)), "clip:1+laplace"),
    (dict(delta=0.0), "delta 0.0"),
    (dict(attacker="god"), "'god'"),
    (dict(labels="guessed"), "'guessed'"),
    (dict(local_rate="none"), "'none'"),
    (dict(statistics="running"), "'running'"),
    (dict(distance="linf"), "'linf'"),
    (dict(layer_weights="some"), "'some'"),
    (dict(methods=("dsg", "all")), "'all'"),
    (dict(methods=("analytic",), victims=("lenet",)), "such as mlp"),
    (dict(methods=("analytic",), group=3), "--group=3"),
    (dict(group=2), "ask for 4"),
    (dict(group=0), "--group 0"),
    (dict(group=3, local_batch=2, local_steps=2), "--local_batch 2"),
    (dict(group=3, local_batch=1), "--local_steps"),
    (dict(local_steps=0), "--local_steps 0"),
    (dict(local_learning_rate=0.0), "--local_learning_rate 0.0"),
    (dict(local_steps=2, victims=("cnn-batchnorm",)), "--statistics=batch"),
    (dict(labels="joint", methods=("dlg",), victims=("cnn-batchnorm",)), "--statistics=batch"),
    (dict(local_steps=2, local_rate="guessed", mechanisms=("clip:1+gaussian",)), "--noadaptive"),
    (dict(dlg_steps=0), "--dlg_steps 0"),
    (dict(inverting_steps=0), "--inverting_steps 0"),
    (dict(restarts=0), "--restarts 0"),
    (dict(tv=-1.0), "--tv -1.0"),
    (dict(red_diff_weight=float("inf")), "--red_diff_weight inf"),
]


@pytest.mark.parametrize(("changes", "value"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_refused_with_its_value(tiny_prior, tmp_path, changes, value):
    with pytest.raises(ConfigError) as caught:
        load_inputs(config(tiny_prior, tmp_path / "out", **changes))
    assert value in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_pictures_are_refused(tiny_prior, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "a.png").write_text("no picture")
    for name, value in (("empty", "holds no picture"), ("corrupt", "a.png")):
        with pytest.raises(ConfigError, match=value):
            load_inputs(config(tiny_prior, tmp_path / "out", images=str(tmp_path / name), num_images=1))


def test_images_without_labels_get_label_0_and_the_user_is_told(tiny_prior, tmp_path, capsys):
    (tmp_path / "unlabelled").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "unlabelled" / "a.png")
    c = config(tiny_prior, tmp_path / "out", images=str(tmp_path / "unlabelled"), num_images=1)
    assert load_inputs(c).labels.tolist() == [0]
    assert "every image gets label 0" in capsys.readouterr().out
    assert load_inputs(dataclasses.replace(c, label=3)).labels.tolist() == [3]


def test_clip_is_the_priors_unless_the_user_says_otherwise(tiny_prior, tmp_path):
    shutil.copytree(tiny_prior / "prior", tmp_path / "prior")
    scheduler = tmp_path / "prior" / "scheduler_config.json"
    scheduler.write_text(json.dumps(SCHEDULER | dict(clip_sample=False)))
    for clip, expected in (("prior", False), ("yes", True), ("no", False)):
        c = config(tiny_prior, tmp_path / "out", prior=str(tmp_path / "prior"), clip=clip)
        assert load_inputs(c).prior.clip is expected
    with pytest.raises(ConfigError, match="--clip 'maybe'"):
        load_inputs(config(tiny_prior, tmp_path / "out", clip="maybe"))


def test_checkpoint_of_another_shape_is_refused(tiny_prior, tmp_path):
    victim = victim_files.make_victim("lenet", (16, 16, 3), 7)
    params = victim_files.init_params("lenet", victim, 0)
    checkpoints = victim_files.manager(tmp_path / "victims", "lenet")
    victim_files.save(checkpoints, 5, params, {"shapes": {k: list(v.shape) for k, v in params.items()}})
    checkpoints.wait_until_finished()
    c = config(tiny_prior, tmp_path / "out", victims=("lenet",), training_steps=(5,), checkpoints=str(tmp_path / "victims"))
    with pytest.raises(ConfigError, match=r"another shape.*fc.*7.*10"):
        load_inputs(c)
    inputs = load_inputs(dataclasses.replace(c, num_classes=7))
    np.testing.assert_array_equal(inputs.params["lenet", 5]["fc.kernel"], params["fc.kernel"])


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--sigma_grid=0,-1"], "-1"),
        (["--sigma_grid=zero"], "zero"),
        (["--no_such_flag"], "no_such_flag"),
        (["runs/x"], "runs/x"),
        (["--steps=ten"], "ten"),
    ],
)
def test_the_command_ends_bad_input_with_one_line_and_code_2(tmp_path, arguments, value):
    sweep_py = str(ROOT / "experiments" / "sweep.py")
    out = tmp_path / "out"
    result = subprocess.run([sys.executable, sweep_py, f"--out={out}", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert value in lines[0]
    assert not out.exists()


def test_output_of_another_configuration_is_refused_and_left_alone(tmp_path):
    store = records.Store(tmp_path / "out", {"steps": 3, "seed": 0})
    store.open()
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="steps was 3, is 4"):
        records.Store(tmp_path / "out", {"steps": 4, "seed": 0})
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not a sweep's output"):
        records.Store(tmp_path / "mine", {"steps": 3})


def test_sigma_grid_takes_both_spellings():
    script = (
        "import sys; from absl import flags; from experiments import cli, inputs\n"
        "cli.define_flags(inputs.SweepConfig); flags.FLAGS(sys.argv); print(cli.read_flags(inputs.SweepConfig).sigma_grid)"
    )
    for argument, expected in (("--sigma_grid", DEFAULT_SIGMAS), ("--sigma_grid=0,1e-3", (0.0, 1e-3))):
        result = subprocess.run(
            [sys.executable, "-c", script, argument], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ
        )
        assert result.stdout.strip() == str(expected)


def test_table_statistics_by_hand():
    """Quartiles, the failed trial left out and counted, and the two picks, which differ where distance misleads."""
    row = lambda image, seed, psnr, distance, at_least, best, failed=False: {
        "method": "dsg", "victim": "v", "training_steps": 0, "mechanism": "gaussian", "sigma": 0.1,
        "image": image, "seed": seed, "psnr": psnr,
        "least_step_distance": distance, "psnr_at_least_distance": at_least, "psnr_of_best_step": best, "failed": failed,
    }  # fmt: skip
    rows = [row(0, 0, 10.0, 1.0, 10.0, 12.0), row(0, 1, 20.0, 2.0, 20.0, 21.0), row(1, 0, 30.0, 1.0, 30.0, 30.0)]
    rows.append(row(1, 1, None, None, None, None, failed=True))
    assert report.quartiles(rows, "psnr") == pytest.approx((20.0, 15.0, 25.0))
    assert report.choices(rows) == (20.0, 21.0)  # attacker: 10, 20, 30; oracle: 12, 21, 30
    assert "4 (1 failed)" in report.table(rows, [])


class Needs:
    """A compiled program that says that it needs so many bytes."""

    def __init__(self, size):
        self.argument_size_in_bytes, self.output_size_in_bytes, self.temp_size_in_bytes = 60, 0, 40 + 10 * size

    def memory_analysis(self):
        return self


@pytest.mark.parametrize(("limit", "size"), [(1000, 8), (180, 8), (179, 7), (150, 5), (119, 1), (110, 1)])
def test_as_many_trials_as_fit(limit, size):
    compiled = []

    def compile_for(n):
        compiled.append(n)
        return Needs(n)

    assert memory.fit(compile_for, 8, limit, "dsg mlp")[0] == size
    assert len(compiled) == (1 if size == 8 else 2 if size == 1 else 3)


def test_one_trial_that_does_not_fit_is_an_error_with_the_remedy():
    with pytest.raises(ConfigError, match=r"one trial of dsg mlp needs 0\.00 GiB.*--prior_remat"):
        memory.fit(Needs, 8, 109, "dsg mlp")
    assert memory.budget(0.5, ONE_DEVICE) == 2**29
    assert memory.budget(0, ONE_DEVICE) > 2**28


def test_a_memory_budget_changes_how_many_run_at_a_time_and_no_result(tiny_prior, tmp_path):
    plenty = run_in_process(config(tiny_prior, tmp_path / "a", methods=("dsg",), seeds=2))
    inputs = load_inputs(config(tiny_prior, tmp_path / "a"))
    trial = trials.Trial(trials.Group("dsg", "mlp", 0), 0.1, 0, 0)
    c = config(tiny_prior, tmp_path / "b", methods=("dsg",), seeds=2)
    program = lambda c, most: sweep.compile_program(c, inputs, ONE_DEVICE, trial, most)
    one, three = (memory.needed(program(c, n).run) for n in (1, 3))
    c = dataclasses.replace(c, memory_gib=(one + three) / 2 / memory.GIB)
    assert program(c, 3).size < 3
    little = run_in_process(c)
    np.testing.assert_allclose([r["psnr"] for r in little], [r["psnr"] for r in plenty], atol=1e-3)
    with pytest.raises(ConfigError, match="one trial of"):
        run_in_process(config(tiny_prior, tmp_path / "c", memory_gib=1e-6))


def test_epsilons_become_sigmas_of_the_clipped_gaussian(tiny_prior, tmp_path):
    c = config(tiny_prior, tmp_path / "out", sigma_grid=(0.5,), epsilon_grid=(10.0, 1.0), mechanisms=("clip:2+gaussian",))
    sigmas = load_inputs(c).sigmas["clip:2+gaussian"]
    assert sigmas == (0.5, *sorted(2 * dp_accounting.get_sigma_gaussian(e, c.delta) for e in (1.0, 10.0)))
    rows = run_in_process(dataclasses.replace(c, methods=("dsg",), num_images=1))
    assert {r["sigma"] for r in rows if r["method"] == "dsg"} == set(sigmas)
    summary = (tmp_path / "out" / "summary.md").read_text()
    line = next(line for line in summary.splitlines() if f"{sigmas[1]:.4g}" in line and "| any" in line)
    assert float(line.split("|")[4]) == pytest.approx(10)


def test_guidance_at_x0hat_is_told(tiny_prior, tmp_path):
    c = config(tiny_prior, tmp_path / "out", through_prior=False, methods=("dsg",), num_images=1, sigma_grid=(0.0,), steps=2)
    assert all(np.isfinite(row["psnr"]) for row in run_in_process(c))
    assert "guided by l2 at x0hat, without a derivative of the prior" in (tmp_path / "out" / "summary.md").read_text()


def test_the_command_takes_epsilons_alone_or_beside_sigmas(tiny_prior, tmp_path):
    """`--epsilon_grid` without `--sigma_grid` means no other noise levels."""
    flags = [f"--prior={tiny_prior}/prior", f"--images={tiny_prior}/images.npz", "--num_images=1", "--steps=2", "--victims=mlp"]
    flags += ["--methods=dsg", "--epsilon_grid=10", "--mechanisms=clip:1+gaussian", f"--out={tmp_path}/out"]
    result = subprocess.run([*command_of("sweep.py"), *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [r["sigma"] for r in rows if r["method"] == "dsg"] == [pytest.approx(dp_accounting.get_sigma_gaussian(10, 1e-5))]


def test_every_mechanism_runs_and_is_told_in_the_summary(tiny_prior, tmp_path):
    """All in one sweep; those without noise once; the aware attacker is at distance 0 from the truth where there is none."""
    texts = (
        "none",
        "clip:0.1",
        "topk:0.2",
        "random:0.5",
        "sign",
        "qsgd:4",
        "soteria:0.5",
        "topk:0.5+laplace",
        "clip:1+uniform",
    )
    c = config(tiny_prior, tmp_path / "a", mechanisms=texts, methods=("dsg",), num_images=1, sigma_grid=(0.1,), steps=2)
    c = dataclasses.replace(c, victims=("mlp-narrow",))
    rows = {r["mechanism"]: r for r in run_in_process(c) if r["method"] == "dsg"}
    assert {k: r["sigma"] for k, r in rows.items()} == {t: 0.1 if "+" in t else 0.0 for t in texts}
    assert rows["none"]["noise_norm"] == 0
    assert rows["clip:0.1"]["leak_cosine"] == pytest.approx(1, abs=1e-5)
    assert all(0 < rows[t]["leak_cosine"] < 0.9999 for t in texts if t not in ("none", "clip:0.1"))
    assert all(r["adaptive"] for r in rows.values())
    summary = (tmp_path / "a" / "summary.md").read_text()
    assert "which it matches through" in summary
    for reason in ("none: no noise", "none: no clipping", "none: uniform noise"):
        assert reason in summary
    unaware = config(tiny_prior, tmp_path / "b", mechanisms=("clip:0.1",), adaptive=False, methods=("dsg",), num_images=1)
    other = {r["mechanism"]: r for r in run_in_process(unaware) if r["method"] == "dsg"}
    assert other["clip:0.1"]["adaptive"] is False
    assert "The mechanism is not known: the leak is taken for the gradient" in (tmp_path / "b" / "summary.md").read_text()
