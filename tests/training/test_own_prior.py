"""A prior of one's own, of a folder, new or tuned: a run goes on to the same weights, and what cannot be trained is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import TRAINED as NETWORK
from tiny import ended

from gdiff_jax.commands import train_prior
from gdiff_jax.errors import ConfigError
from gdiff_jax.files import lock
from gdiff_jax.parametrisation import V
from gdiff_jax.priors import Denoiser, Prior, load_prior, save_prior
from gdiff_jax.schedule import make_betas
from gdiff_jax.training import log, prior, start
from gdiff_jax.training.prior_card import eps_mse_by_level
from gdiff_jax.training.settings import PriorTraining


@pytest.fixture(scope="module")
def given(tmp_path_factory, random_params):
    """40 images, others, and a prior of other noise levels than those that a training begins with."""
    root = tmp_path_factory.mktemp("given")
    for seed, name in enumerate(("images", "others")):
        np.savez(root / f"{name}.npz", images=np.random.default_rng(seed).integers(0, 256, (40, 8, 8, 3), np.uint8))
    tuned = Prior(Denoiser(random_params(NETWORK), NETWORK), make_betas(num=20, end=0.5), "fixed_large", "t", "", clip=False)
    scheduler = {**start.start_of(tuned).scheduler}
    save_prior(root / "tuned", tuned, scheduler)
    return root


@pytest.fixture
def loose():
    """optax raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tuning(given, out, **changes):
    return PriorTraining(
        **{
            **dict(data=f"{given}/images.npz", prior=f"{given}/tuned", out=str(out), steps=4, batch=8, save_every=1, warmup=0),
            **changes,
        }
    )


@pytest.mark.long
def test_a_prior_is_tuned_to_the_same_weights_killed_or_not_watched_or_not(given, loose, tmp_path, monkeypatch, capsys):
    pictures = []
    monkeypatch.setattr(prior, "write_card", lambda *_: None)
    monkeypatch.setattr(prior, "draw_samples", lambda *_, drawn=prior.draw_samples: pictures.append(drawn(*_)) or pictures[-1])
    monkeypatch.setattr(prior, "SAMPLES_EVERY", 0.0)
    watched = load_prior(prior.train_prior(tuning(given, tmp_path / "a")))
    assert [p.shape for p in pictures] == [(prior.SAMPLES, 8, 8, 3)] * 4

    before = load_prior(given / "tuned")
    np.testing.assert_array_equal(watched.betas, before.betas)
    assert (watched.variance, watched.clip, watched.denoise.config) == (before.variance, before.clip, NETWORK)
    held = start.load_data(tuning(given, tmp_path), (8, 8, 3))[1]
    first = log.read(tmp_path / "a" / "log.jsonl")[0]
    of_tuned = eps_mse_by_level(before.denoise, before.schedule(), held, prior.SHOWN_LEVELS)
    assert {int(t): v for t, v in first["heldout"].items()} == pytest.approx(of_tuned, rel=1e-4)

    # Killed after the row of step 2 and before its checkpoint, while that row is written again.
    monkeypatch.setattr(prior, "SAMPLES_EVERY", 1e9)
    saves = iter([prior._save])

    def killed(*arguments):
        next(saves)(*arguments)
        arguments[0].checkpoints.wait_until_finished()

    with monkeypatch.context() as m:
        m.setattr(prior, "_save", killed)
        with pytest.raises(StopIteration):
            prior.train_prior(tuning(given, tmp_path / "b"))
    with open(tmp_path / "b" / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    again = load_prior(prior.train_prior(tuning(given, tmp_path / "b")))
    assert again.sha256 == watched.sha256 != before.sha256
    assert "resumed from step 1 " in capsys.readouterr().out
    lines = (tmp_path / "b" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert len(pictures) == 4 + 1 + 2  # of each start the first checkpoint, and the end

    (tmp_path / "config.json").write_text(json.dumps(NETWORK.to_diffusers()))
    for changes, said in (
        (dict(data=f"{given}/others.npz"), "a run on other images"),
        (dict(prior="", config=f"{tmp_path}/config.json"), "began with other weights"),
    ):
        with pytest.raises(ConfigError, match=said):
            prior.train_prior(tuning(given, tmp_path / "b", **changes))


@pytest.mark.parametrize("channels", [1, 3])
def test_there_is_a_network_for_each_size(channels):
    for size in range(32, 257, 8):
        network = start.network_for(size, channels)
        assert network.image_shape == (size, size, channels)
        attended = network.sample_size >> (len(network.block_out_channels) - 1)
        assert 7 <= attended <= 13 or attended % 2


@pytest.mark.parametrize(("name", "size"), [("cifar10-32", 32), ("faces-64", 64)])
def test_it_is_that_of_the_bundled_prior_of_that_size(name, size):
    assert start.network_for(size, 3) == load_prior(name).denoise.config


def test_only_epsilon_without_classes_is_tuned(given, tmp_path):
    before = load_prior(given / "tuned")
    scheduler = start.start_of(before).scheduler
    v = dataclasses.replace(before, parametrisation=V())
    save_prior(tmp_path / "v", v, {**scheduler, "prediction_type": "v_prediction"})
    with pytest.raises(ConfigError, match="it predicts V, and epsilon is trained here"):
        start.read_tuned(PriorTraining(prior=f"{tmp_path}/v"))
    classes = dataclasses.replace(NETWORK, num_class_embeds=3)
    params = jax.eval_shape(lambda: prior.init_params(jax.random.key(0), classes))
    zeros = {name: np.zeros(a.shape, a.dtype) for name, a in params.items()}
    save_prior(tmp_path / "c", dataclasses.replace(before, denoise=Denoiser(zeros, classes)), scheduler)
    with pytest.raises(ConfigError, match="without classes"):
        start.read_tuned(PriorTraining(prior=f"{tmp_path}/c"))
    with pytest.raises(ConfigError, match=r"--size 64: --prior .* is of 8 px"):
        start.read_tuned(PriorTraining(prior=f"{given}/tuned", size=64))


def test_two_trainings_do_not_write_to_one_folder(given, tmp_path):
    """Nor does the second one touch the log of the first."""
    out = tmp_path / "out"
    with lock(out, "training"):
        log.add(out / "log.jsonl", dict(step=1))
        with pytest.raises(ConfigError, match="another training writes to it"):
            prior.train_prior(tuning(given, out))
    assert log.read(out / "log.jsonl") == [dict(step=1)]


def test_pictures_of_a_folder_are_read_whatever_they_are(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(20):
        grey = rng.integers(0, 256, (i + 1, 2 * i + 1), np.uint8)
        Image.fromarray(grey).convert("RGB" if i % 2 else "L").save(tmp_path / f"{i}.png")
    settings = PriorTraining(data=str(tmp_path))
    images, held = start.load_data(settings, None)
    assert (images.shape, held.shape) == ((18, 32, 32, 1), (2, 32, 32, 1))
    assert start.load_data(settings, (32, 32, 3))[0].shape == (18, 32, 32, 3)  # what a prior in colours demands
    Image.fromarray(rng.integers(0, 256, (9, 9, 4), np.uint8)).save(tmp_path / "rgba.png")
    assert start.load_data(settings, None)[0].shape[-1] == 3
    assert f"{tmp_path}: 1 of 21 pictures laid on white" in capsys.readouterr().out
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"broken\.png cannot be read as a picture"):
        start.load_data(settings, None)


def test_images_that_do_not_fit_into_a_device_are_refused():
    of = (2**10, (32, 32, 1), 2**20)  # 1 MiB of images, 20 of parameters and what is kept of each
    start.need_memory(*of, 21 * 2**20)
    with pytest.raises(ConfigError, match=r"1024 images \(32, 32, 1\) .* at least 0\.02 GiB of each device, .* fewer images"):
        start.need_memory(*of, 21 * 2**20 - 1)


def test_too_many_pictures_are_refused_before_they_are_read(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("train/0.png", "train/1.png", ".hidden.png", "a.txt"):
        (tmp_path / name).write_bytes(b"no picture")
    assert start.count_pictures(str(tmp_path)) == 2
    with pytest.raises(ConfigError, match="give fewer images"):
        start.read_start(PriorTraining(data=str(tmp_path)), 2 * 32 * 32 - 1)
    with pytest.raises(ConfigError, match="cannot be read as a picture"):
        start.read_start(PriorTraining(data=str(tmp_path)), 2 * 32 * 32)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["no-such-folder"], "images 'no-such-folder' do not exist"),
        (["one", "two"], "'two' is one too many: --data is 'one'"),
        (["one", "--data=two"], "'one' is one too many: --data is 'two'"),
        (["one", "steps=5"], "did you mean --steps=5?"),
        ([], "--data is needed"),
        (["x", "--size=36"], "--size 36 must be a multiple of 8 from 32 to 256"),
        (["x", "--size=64", "--config=y"], "--size 64: --config brings a network of its own size"),
        (["x", "--prior=cifar10-32", "--config=y"], "--config and --prior each bring a network"),
        (["x", "--prior=no-such"], "no-such"),
        (["x", "--prior=cifar10-32", "--size=64"], "--size 64: --prior cifar10-32 is of 32 px"),
        (["x", "--learning_rate=0"], "--learning_rate 0.0 must be positive"),
        (["x", "--batch=3"], "--batch 3 does not divide over 4 devices"),
        (["{given}/images.npz"], "images are (8, 8, 3), --size=32 takes (32, 32, 3); pictures are resized, arrays are not"),
        (["{few}/few.npz"], "19 images are too few; give at least 20"),
        (["{few}"], "holds no picture"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_code_2(flags, said, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "few.npz", images=np.zeros((19, 32, 32, 1), np.uint8))
    assert ended(train_prior, monkeypatch, *[f.format(given=given, few=tmp_path) for f in flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "runs").exists()
