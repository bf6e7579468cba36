"""Writes tests/priors/golden/*.npz: outputs of diffusers' torch U-Net, of an independent ADM, and of diffusers' DDPM sampler.

    pip install -e ".[parity]" && python tests/priors/make_golden.py

The plain test command holds gdiff_jax to these files; `tests/priors/test_parity.py` holds the files, and gdiff_jax, to torch.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "priors")]

import adm_reference
import edm_reference
import jax
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from parity_cases import ADM, ADM_CONV1D, EDM, GOLDEN, UNET2D, edm_state_dict, edm_told, inputs, state_dict, told, torch_shapes

from gdiff_jax import Schedule
from gdiff_jax.priors import ADMConfig

TRAJECTORY_STEPS = 50
torch.set_num_threads(1)


def torch_unet(config: dict) -> UNet2DModel:
    """diffusers' own class with the weights of `parity_cases`."""
    model = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    tensors = state_dict({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    return model


def unet2d_output(config: dict) -> np.ndarray:
    x, _ = inputs(config["sample_size"], config["in_channels"])
    t, labels = (None if a is None else torch.from_numpy(a) for a in told(config))
    with torch.no_grad():
        y = torch_unet(config)(torch.from_numpy(x).permute(0, 3, 1, 2), t, labels).sample
    return y.permute(0, 2, 3, 1).numpy()


def adm_output(flags: dict) -> np.ndarray:
    shapes = torch_shapes(ADMConfig.from_flags(flags), ADM_CONV1D)
    x, _ = inputs(flags["image_size"], 3)
    t, labels = (None if a is None else torch.from_numpy(a) for a in told(flags))
    weights = {name: torch.from_numpy(value) for name, value in state_dict(shapes).items()}
    with torch.no_grad():
        y = adm_reference.forward(weights, flags, torch.from_numpy(x).permute(0, 3, 1, 2), t, labels)
    return y.permute(0, 2, 3, 1).numpy()


def edm_output(kwargs: dict) -> np.ndarray:
    x, _ = inputs(kwargs["img_resolution"], 3)
    noise, labels = edm_told(kwargs)
    weights = {name.removeprefix("model."): torch.from_numpy(value) for name, value in edm_state_dict(kwargs).items()}
    # One number after the last class is none: a row of zeros.
    rows = None if labels is None else torch.eye(kwargs["label_dim"] + 1)[:, :-1][torch.from_numpy(labels).long()]
    with torch.no_grad():
        y = edm_reference.forward(weights, kwargs, torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(noise), rows)
    return y.permute(0, 2, 3, 1).numpy()


def trajectory(config: dict, variance: str, timesteps: np.ndarray, clip: bool = True) -> np.ndarray:
    """x_0 of diffusers' ancestral sampler, on the noise that `gdiff_jax.unguided_sample(jax.random.key(0))` draws."""
    from diffusers.schedulers import scheduling_ddpm

    model = torch_unet(config)
    scheduler = DDPMScheduler(variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(timesteps=timesteps[::-1].tolist())
    size, c = config["sample_size"], config["in_channels"]
    start, steps = jax.random.split(jax.random.key(0))
    normal = lambda key: torch.from_numpy(np.array(jax.random.normal(key, (size, size, c))).transpose(2, 0, 1)[None])
    x = normal(start)
    drawn = scheduling_ddpm.randn_tensor
    with torch.no_grad():
        for i, t in zip(reversed(range(len(timesteps))), scheduler.timesteps, strict=True):
            scheduling_ddpm.randn_tensor = lambda *_, i=i, **__: normal(jax.random.fold_in(steps, i))
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
    scheduling_ddpm.randn_tensor = drawn
    return x[0].permute(1, 2, 0).numpy()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / "unet2d.npz", **{name: unet2d_output(config) for name, config in UNET2D.items()})
    np.savez_compressed(GOLDEN / "adm.npz", **{name: adm_output(flags) for name, flags in ADM.items()})
    np.savez_compressed(GOLDEN / "edm.npz", **{name: edm_output(kwargs) for name, kwargs in EDM.items()})
    t = np.asarray(Schedule.create(num_steps=TRAJECTORY_STEPS).t)
    runs = {
        "celebahq-fixed_small": trajectory(UNET2D["celebahq"], "fixed_small", t),
        "cifar10-fixed_large": trajectory(UNET2D["cifar10"], "fixed_large", t),
        "learned-variance-learned_range": trajectory(UNET2D["learned-variance"], "learned_range", t),
    }
    np.savez_compressed(GOLDEN / "trajectory.npz", **runs)


if __name__ == "__main__":
    main()
