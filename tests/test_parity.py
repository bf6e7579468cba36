"""Against torch itself: `pip install -e ".[parity]"`. Holds the golden files to what torch computes today, and the
parameter lists to diffusers' own class at full size; test_golden.py holds gdiff_jax to the golden files."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

import make_golden
from parity_cases import ADM, CELEBAHQ, CIFAR10, GOLDEN, UNET2D, error
from test_golden import torch_shapes

import gdiff_jax as gd
from gdiff_jax.priors import UNet2DConfig


@pytest.mark.parametrize("name", UNET2D)
def test_golden_unet2d_is_what_diffusers_computes(name):
    with np.load(GOLDEN / "unet2d.npz") as golden:
        assert error(golden[name], make_golden.unet2d_output(UNET2D[name])) < 3e-6


@pytest.mark.parametrize("name", ADM)
def test_golden_adm_is_what_the_reference_computes(name):
    with np.load(GOLDEN / "adm.npz") as golden:
        assert error(golden[name], make_golden.adm_output(ADM[name], make_golden.adm_shapes(ADM[name]))) < 3e-6


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
