"""Training of priors and victims by their commands: it learns, it resumes to the same weights, it refuses bad input."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TRAINED as NETWORK
from tiny import ended

import gdiff_jax as gd
from gdiff_jax import modules
from gdiff_jax.commands import prior_card as card_command
from gdiff_jax.commands import train_prior, train_victim
from gdiff_jax.commands.train_prior import command_line
from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.priors import Prior
from gdiff_jax.schedule import make_betas
from gdiff_jax.training import prior, prior_card, start
from gdiff_jax.training.settings import PriorTraining, VictimTraining
from gdiff_jax.victims import checkpoints, zoo

ROOT = Path(__file__).parents[2]


def run(script, *flags):
    command = [sys.executable, str(ROOT / "experiments" / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of 12 px pictures: dark ones and bright ones."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    images = np.clip(rng.normal(60 + 130 * labels[:, None, None, None], 20, (80, 8, 8, 3)), 0, 255).astype(np.uint8)
    np.savez(root / "train.npz", images=images, labels=labels)
    (root / "config.json").write_text(json.dumps(NETWORK.to_diffusers()))
    return root


@pytest.mark.long
def test_a_prior_resumes_to_the_same_weights(data, tmp_path):
    flags = [
        f"--data={data}/train.npz",
        f"--config={data}/config.json",
        "--steps=6",
        "--save_every=2",
        "--warmup=2",
        "--batch=8",
    ]
    first = run("train_prior.py", *flags, f"--out={tmp_path}/a")
    assert first.returncode == 0, first.stderr[-2000:]
    # What a kill after step 4 leaves.
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "6")
    second = run("train_prior.py", *flags, f"--out={tmp_path}/b")
    assert "resumed from step 4" in second.stdout
    priors = [gd.load_prior(tmp_path / name / "prior") for name in "ab"]
    assert priors[0].sha256 == priors[1].sha256
    assert (tmp_path / "a" / "prior" / "samples.png").stat().st_size > 0
    card = (tmp_path / "a" / "prior" / "README.md").read_text()
    assert priors[0].sha256 in card
    assert f"`python {ROOT}/experiments/train_prior.py --data={data}/train.npz" in card
    np.testing.assert_allclose(priors[0].mean_image.mean(), 0, atol=0.1)


def test_held_out_images_are_not_trained_on(data):
    images, heldout = start.load_data(PriorTraining(data=f"{data}/train.npz", heldout=5), NETWORK.image_shape)
    assert (len(images), len(heldout)) == (72, 5)
    seen = {image.tobytes() for image in images}
    assert not any(image.tobytes() in seen for image in heldout)


def test_nearest_training_images_are_found_mirrored_or_not():
    rng = np.random.default_rng(0)
    train, queries = (rng.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (30, 5))
    queries[1], queries[2] = train[17], train[23, :, ::-1]
    found, distance = prior_card.nearest(queries, train, chunk=7)
    both = np.concatenate([train, train[:, :, ::-1]]).astype(np.float64)
    rms = np.sqrt(np.square(queries[:, None] / 255.0 - both[None] / 255.0).mean((2, 3, 4)))
    np.testing.assert_array_equal(found, both[rms.argmin(1)])
    np.testing.assert_allclose(distance, rms.min(1), atol=2e-4)
    assert distance[1] < 1e-3 > distance[2]


@pytest.mark.long
def test_an_unfinished_training_run_is_a_prior(data, tmp_path):
    """Its moving average, bitwise; a checkpoint whose average is not what was saved is refused."""
    (tmp_path / "config.json").write_text(json.dumps(NETWORK.to_diffusers()))
    flags = [
        f"--data={data}/train.npz",
        f"--config={tmp_path}/config.json",
        "--steps=2",
        "--save_every=1",
        "--warmup=1",
        "--batch=8",
    ]
    result = run("train_prior.py", *flags, f"--out={tmp_path}/run", "--heldout=4")
    assert result.returncode == 0, result.stderr[-2000:]
    shutil.rmtree(tmp_path / "run" / "prior")
    unfinished = gd.load_prior(tmp_path / "run")
    assert unfinished.sha256 == modules.digest(unfinished.denoise.params)
    assert unfinished.image_shape == (8, 8, 3)
    other = NETWORK.to_diffusers() | dict(norm_eps=1e-3)
    (tmp_path / "config.json").write_text(json.dumps(other))
    resumed = run("train_prior.py", *flags, f"--out={tmp_path}/run", "--heldout=4")
    assert (resumed.returncode, "another --config" in resumed.stderr) == (2, True)
    assert gd.load_prior(tmp_path / "run").sha256 == unfinished.sha256
    (tmp_path / "run" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="trained with another config"):
        gd.load_prior(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(NETWORK.to_diffusers()))
    latest = tmp_path / "run" / "checkpoints" / "2"
    note = latest / "about" / "metadata"
    about = json.loads(note.read_text())
    older = {name: value for name, value in about["config"].items() if name not in ("class_embed_type", "mid_block_type")}
    note.write_text(json.dumps(about | {"config": older}))  # of a version that had fewer fields
    assert gd.load_prior(tmp_path / "run").sha256 == unfinished.sha256
    note.write_text(json.dumps(json.loads(note.read_text()) | {"ema_sha256": "0"}))
    with pytest.raises(ValueError, match=r"checkpoints/2 cannot be read .*digest"):
        gd.load_prior(tmp_path / "run")
    shutil.rmtree(latest / "state")
    with pytest.raises(ValueError, match=r"checkpoints/2 cannot be read"):
        gd.load_prior(tmp_path / "run")
    shutil.rmtree(latest.parent)
    latest.parent.mkdir()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        gd.load_prior(tmp_path / "run")


@pytest.mark.parametrize("changes", [dict(num_class_embeds=3), dict(time_embedding_type="fourier")])
def test_a_network_that_is_told_more_than_a_timestep_is_not_trained_here(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps(NETWORK.to_diffusers() | changes))
    with pytest.raises(ConfigError, match="trained is epsilon, without classes"):
        start.read_network(PriorTraining(config=str(tmp_path / "config.json")))


def test_eps_mse_of_a_network_that_predicts_zero_is_one(data):
    """A fresh network's last convolution is zero, so its error is the mean square of standard normal noise."""
    denoise = gd.Denoiser(modules.init_params(jax.random.key(0), NETWORK), NETWORK)
    heldout = np.zeros((100, 8, 8, 3), np.uint8)
    for value in prior_card.eps_mse_by_level(denoise, gd.Schedule.create(), heldout, (10, 500)).values():
        assert value == pytest.approx(1, abs=4 * np.sqrt(2 / heldout.size))


@pytest.mark.parametrize("null_label", [None, 2])
def test_the_card_of_a_conditional_prior_says_what_it_was_told(tmp_path, monkeypatch, null_label):
    monkeypatch.setattr(
        prior_card, "draw_samples", lambda prior: np.zeros((64, 8, 8, 3), np.uint8)
    )  # an export draws them above
    config = dataclasses.replace(NETWORK, num_class_embeds=3)
    denoise = gd.Denoiser(modules.init_params(jax.random.key(0), config), config, null_label=null_label)
    conditional = Prior(denoise, make_betas(num=20), "fixed_small", "toy", "")
    images = np.zeros((64, 8, 8, 3), np.uint8)
    prior_card.write_card(tmp_path, conditional, images, images, {})
    said = {None: "3; an image and a sample are told one each, drawn", 2: "none is told, which is label 2"}[null_label]
    assert f"- **classes**: {said}" in (tmp_path / "README.md").read_text()


def test_learning_rate_warms_up_stays_and_falls():
    rate = prior.warmup_stable_decay(PriorTraining(steps=1000, warmup=100, decay=0.3, learning_rate=1e-3))
    np.testing.assert_allclose([rate(i) for i in (0, 50, 100, 700, 850, 1000)], [0, 5e-4, 1e-3, 1e-3, 5e-4, 0], atol=1e-9)


def test_a_victim_learns_and_keeps_each_state(data, tmp_path):
    flags = [f"--data={data}/train.npz", "--victim=lenet", "--steps=1,60", "--num_classes=2", "--image_size=8", "--batch=16"]
    result = run("train_victim.py", *flags, f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr[-2000:]
    victim = zoo.make_victim("lenet", (8, 8, 3), 2)
    initial = zoo.init_params("lenet", victim, 0)
    one, about_one = checkpoints.load(str(tmp_path), "lenet", 1, victim)
    sixty, about_sixty = checkpoints.load(str(tmp_path), "lenet", 60, victim)
    assert about_sixty["accuracy"] == 1.0  # dark against bright
    assert about_sixty["loss"] < about_one["loss"]
    moved = [max(float(abs(p[k] - initial[k]).max()) for k in initial) for p in (one, sixty)]
    assert 0 < moved[0] < 2e-3 < moved[1]  # Adam's first step is the learning rate, 1e-3, in every weight


def test_a_loss_that_is_not_finite_ends_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prior, "make_step", lambda *_: lambda state, data, key: (state, jnp.float32("nan")))
    settings = PriorTraining(
        data=f"{data}/train.npz", config=f"{data}/config.json", out=str(tmp_path / "run"), steps=3, batch=8
    )
    with pytest.raises(RunError, match=r"nan at step 3; .* lower --learning_rate"):
        prior.train_prior(settings)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_card_names_what_was_typed():
    flags = ["--data=my pictures", "--out=y"]
    assert (
        command_line(["experiments/train_prior.py", *flags]) == "python experiments/train_prior.py '--data=my pictures' --out=y"
    )
    assert command_line(["/usr/bin/gdiff-train-prior", *flags]) == "gdiff-train-prior '--data=my pictures' --out=y"


def test_the_families_that_help_names_are_known():
    (help_text,) = (f.metadata["help"] for f in dataclasses.fields(VictimTraining) if f.name == "victim")
    families = help_text.removeprefix("network: ").split(", or ")[0].split(", ")
    assert len(families) == 6
    assert set(families) <= zoo.VICTIMS.keys()


def test_help_waits_for_no_library():
    code = "import sys; from gdiff_jax.commands import train_prior, train_victim, prior_card; print({*sys.modules})"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}  # which are looked at first
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=plain)
    assert not {"jax", "flax", "optax", "orbax", "numpy"} & ast.literal_eval(result.stdout)


@pytest.mark.parametrize("name", ["train-prior", "train-victim"])
def test_help_is_the_same_by_script_and_by_name(name, tmp_path):
    """The docstring of the command's module, its example, by the name that was called, and its flags."""
    module = name.replace("-", "_")
    installed = tmp_path / f"gdiff-{name}"  # as an installer writes it
    installed.write_text(f"import sys\nfrom gdiff_jax.commands.{module} import main\nsys.exit(main())\n")
    for program in (installed, ROOT / "experiments" / f"{module}.py"):
        command = [sys.executable, str(program), "--help"]
        environment = os.environ | dict(PYTHONPATH=str(ROOT))
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        started = f"python {program}" if program.suffix else program.name
        assert (result.returncode, result.stderr) == (0, "")
        assert f"    {started} " in result.stdout
        assert "\n  --batch               images a step [64]\n" in result.stdout


@pytest.mark.parametrize(
    ("command", "flags", "value"),
    [
        (train_victim, ["--victim=vgg", "--data=x", "--out=y"], "vgg"),
        (train_victim, ["--out=y"], "--data"),
        (train_victim, ["--data=no-such-file", "--out=y"], "no-such-file"),
        (train_prior, ["--data=x", "--config=no-such.json", "--out=y"], "no-such.json"),
        (card_command, ["--data=x", "--prior=no-such-prior"], "no-such-prior"),
    ],
)
def test_bad_input_is_one_line_and_code_2(command, flags, value, monkeypatch, capsys):
    assert ended(command, monkeypatch, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert value in line
