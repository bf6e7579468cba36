"""Against torch itself: `pip install -e ".[parity]"`. Holds the golden files to what torch computes today, and the
parameter lists to diffusers' own class at full size; test_golden.py holds gdiff_jax to the golden files."""

import argparse
import datetime
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

import make_golden
from diffusers import DDPMPipeline
from parity_cases import ADM, ADM_CONV1D, CELEBAHQ, CIFAR10, EDM, GOLDEN, TOLERANCE, UNET2D, error, state_dict, torch_shapes
from test_golden import run

import gdiff_jax as gd
from gdiff_jax.priors import ADMConfig, UNet2DConfig
from gdiff_jax.priors.schedulers import read_scheduler
from gdiff_jax.samplers.base import predict_kept
from gdiff_jax.tensor_files import read_tensors
from gdiff_jax.victims import tree_files


@pytest.mark.parametrize("name", UNET2D)
def test_golden_unet2d_is_what_diffusers_computes(name):
    with np.load(GOLDEN / "unet2d.npz") as golden:
        assert error(golden[name], make_golden.unet2d_output(UNET2D[name])) < 3e-6


@pytest.mark.parametrize("name", ADM)
def test_golden_adm_is_what_the_reference_computes(name):
    with np.load(GOLDEN / "adm.npz") as golden:
        assert error(golden[name], make_golden.adm_output(ADM[name])) < 3e-6


@pytest.mark.parametrize("name", EDM)
def test_golden_edm_is_what_the_reference_computes(name):
    with np.load(GOLDEN / "edm.npz") as golden:
        assert error(golden[name], make_golden.edm_output(EDM[name])) < 3e-6


def test_golden_trajectories_are_those_of_diffusers_scheduler():
    t = np.asarray(gd.Schedule.create(num_steps=make_golden.TRAJECTORY_STEPS).t)
    with np.load(GOLDEN / "trajectory.npz") as golden:
        for name, array in golden.items():
            config, variance = name.rsplit("-", 1)
            assert np.abs(array - make_golden.trajectory(UNET2D[config], variance, t)).max() < 3e-5, name


@pytest.mark.parametrize("config", [CELEBAHQ, CIFAR10, *UNET2D.values()])
def test_every_key_and_shape_is_that_of_diffusers(config):
    with torch.device("meta"):
        model = make_golden.UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert torch_shapes(UNet2DConfig.from_diffusers(config)) == expected


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GDIFF_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "root"])
def test_what_diffusers_saves_is_loaded_and_computes_the_same(tmp_path, safe, pipeline):
    config = UNET2D["learned-variance"]
    model, scheduler = make_golden.torch_unet(config), make_golden.DDPMScheduler(variance_type="learned_range")
    if pipeline:
        DDPMPipeline(model, scheduler).save_pretrained(tmp_path / "ddpm", safe_serialization=safe)
    else:
        model.save_pretrained(tmp_path / "ddpm", safe_serialization=safe)
        scheduler.save_pretrained(tmp_path / "ddpm")
    prior = gd.load_prior(tmp_path / "ddpm")
    assert prior.variance == "learned_range"
    with np.load(GOLDEN / "unet2d.npz") as golden:
        assert error(run(prior.denoise), golden["learned-variance"]) < TOLERANCE


def test_what_torch_saves_of_an_adm_is_loaded_and_computes_the_same(tmp_path):
    flags = ADM["ffhq"]
    tensors = {
        name: torch.from_numpy(a) for name, a in state_dict(torch_shapes(ADMConfig.from_flags(flags), ADM_CONV1D)).items()
    }
    torch.save(tensors, tmp_path / "adm.pt")
    with np.load(GOLDEN / "adm.npz") as golden:
        assert error(run(gd.load_prior(tmp_path / "adm.pt", config=flags).denoise), golden["ffhq"]) < TOLERANCE


def test_torch_files_are_read_exactly(tmp_path):
    x = torch.arange(24.0).reshape(4, 6)
    half, column = x.to(torch.float16), x[:, 2]
    tensors = {
        "contiguous": x,
        "transposed": x.t(),
        "column": column,
        "half": half,
        "bfloat16": x.to(torch.bfloat16),
        "double": x.double(),
        "integers": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(x).detach(),
        "empty": torch.zeros(0, 3),
    }
    torch.save(tensors, tmp_path / "x.pt")
    read = read_tensors(tmp_path / "x.pt")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert str(read[name].dtype) == str(value.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(read[name].astype(np.float64), value.double().numpy(), err_msg=name)


def test_legacy_files_and_whole_modules_of_torch_are_refused(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="legacy pickle"):
        read_tensors(tmp_path / "legacy.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"it asks for torch\.nn.*save the tensors alone, such as torch\.save"):
        read_tensors(tmp_path / "module.pt")


def test_what_checkpoints_hold_beside_tensors_is_left_aside(tmp_path):
    beside = {
        "best": np.float64(0.9),
        "arguments": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
        "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
    }
    torch.save({"state_dict": {"x": torch.arange(3.0)}, **beside}, tmp_path / "x.pt")
    tree = tree_files.read(str(tmp_path / "x.pt"))
    assert (tree.arrays.keys(), set(tree.others)) == ({"state_dict.x"}, set(beside))
    np.testing.assert_array_equal(tree.arrays["state_dict.x"], [0.0, 1.0, 2.0])


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True])
def test_x0hat_is_that_of_diffusers_schedulers(kind, zero):
    from diffusers import DDIMScheduler

    if zero and kind == "epsilon":
        pytest.skip("is refused")
    theirs = DDIMScheduler(
        prediction_type=kind, rescale_betas_zero_snr=zero, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    diffusion = read_scheduler(dict(theirs.config))
    np.testing.assert_allclose(diffusion.betas, theirs.betas.double().numpy(), rtol=1e-4, atol=5e-7)
    ours = gd.Schedule.create(diffusion.betas, 7, spacing="trailing", parametrisation=diffusion.parametrisation)
    theirs.set_timesteps(7)
    np.testing.assert_array_equal(ours.t[::-1], theirs.timesteps.numpy())
    x, out = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 2)).astype(np.float32)
    for i, t in zip(range(6, -1, -1), theirs.timesteps, strict=True):
        found, _ = predict_kept(lambda *_: (out, None), ours, x, i, clip=False)
        expected = theirs.step(torch.from_numpy(out), t, torch.from_numpy(x)).pred_original_sample
        assert error(found, expected.numpy()) < 2e-4  # its betas are float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("levels", ["karras", "exponential"])
def test_edm_is_that_of_diffusers(kind, levels):
    from diffusers import EDMEulerScheduler

    theirs = EDMEulerScheduler(prediction_type=kind, sigma_schedule=levels, sigma_data=0.7)
    diffusion = read_scheduler(dict(theirs.config) | {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 9})
    ours = gd.Schedule.create(diffusion.betas, parametrisation=diffusion.parametrisation)
    theirs.set_timesteps(9)
    np.testing.assert_allclose(ours.t[::-1], theirs.timesteps.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.exp(ours.levels())[::-1], theirs.sigmas[:-1].numpy(), rtol=1e-5)
    x, out = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 2)).astype(np.float32)
    for i, (t, sigma) in enumerate(zip(theirs.timesteps, theirs.sigmas, strict=False)):
        shown = []
        denoise = lambda x, t: (shown.append(x), (out, None))[1]  # noqa: B023
        found, _ = predict_kept(denoise, ours, x / float((1 + sigma**2) ** 0.5), 8 - i, clip=False)
        scaled = theirs.scale_model_input(torch.from_numpy(x), t)
        assert error(shown[0], scaled.numpy()) < 1e-5
        expected = theirs.precondition_outputs(torch.from_numpy(x), torch.from_numpy(out), sigma)
        assert error(found, expected.numpy()) < 1e-5
        theirs.step(torch.from_numpy(out), t, torch.from_numpy(x))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_that_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    diffusion = read_scheduler(dict(theirs.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    ours = gd.Schedule.create(diffusion.betas, 1000, parametrisation=diffusion.parametrisation)
    np.testing.assert_allclose(ours.t[::-1], theirs.timesteps.numpy(), rtol=1e-4)
    x, out = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 2)).astype(np.float32)
    for i in (0, 400, 999):
        s = theirs.sigmas[999 - i].item()
        found, _ = predict_kept(lambda *_: (out, None), ours, x / np.float32(np.hypot(s, 1 - s)), i, clip=False)
        assert error(found, x - s * out) < 1e-5  # Euler's step of theirs to s = 0
