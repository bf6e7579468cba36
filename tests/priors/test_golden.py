"""Both U-Nets and the sampler against what torch computed, kept in tests/priors/golden (made by make_golden.py there)."""

import dataclasses
import functools
import hashlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from parity_cases import (
    ADM,
    ADM_CONV1D,
    EDM,
    FFHQ,
    GOLDEN,
    SMALL_CELEBAHQ,
    SMALL_FFHQ,
    TOLERANCE,
    TWO,
    UNET2D,
    UNET2D_MISTAKES,
    VARIATIONS,
    edm_state_dict,
    edm_told,
    error,
    inputs,
    state_dict,
    told,
    torch_shapes,
)
from tiny import ROOT

import gdiff_jax as gd
from gdiff_jax import modules
from gdiff_jax.priors import ADMConfig, Denoiser, EDMConfig, UNet2DConfig, layers
from gdiff_jax.priors import adm as adm_module
from gdiff_jax.priors import edm as edm_module
from gdiff_jax.priors.weights import to_params


@functools.cache
def golden(file):
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return dict(arrays)


def unet2d(config):
    spec = UNet2DConfig.from_diffusers(config)
    return Denoiser(to_params(spec, state_dict(torch_shapes(spec)), "golden"), spec)


def adm(flags):
    spec = ADMConfig.from_flags(flags)
    return Denoiser(to_params(spec, state_dict(torch_shapes(spec, ADM_CONV1D)), "golden"), spec)


def run(denoise, t=None, labels=None):
    """The network's whole output, eps and v."""
    shape = denoise.config.image_shape
    x, usual = map(jnp.asarray, inputs(shape[0], shape[2]))
    t, denoise = usual if t is None else jnp.asarray(t), denoise if labels is None else denoise.given(labels)
    eps, v = jax.jit(lambda *args: Denoiser.batch(*args), compiler_options=QUICK_COMPILE)(denoise, x, t)  # traced each time
    return eps if v is None else jnp.concatenate([eps, v], axis=-1)


def cases(configs):
    """The names; what is a variation of another is long."""
    return [pytest.param(name, marks=pytest.mark.long) if name in VARIATIONS else name for name in configs]


@pytest.mark.parametrize("name", cases(UNET2D))
def test_unet2d_is_diffusers(name):
    assert error(run(unet2d(UNET2D[name]), *told(UNET2D[name])), golden("unet2d")[name]) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("mistake", UNET2D_MISTAKES)
def test_a_mistake_in_the_unet2d_is_seen(mistake):
    right = unet2d(SMALL_CELEBAHQ)
    wrong = dataclasses.replace(right, config=dataclasses.replace(right.config, **UNET2D_MISTAKES[mistake]))
    assert error(run(wrong), golden("unet2d")["celebahq"]) > 3 * TOLERANCE


@pytest.mark.parametrize("name", ADM)
def test_adm_is_the_independent_one(name):
    assert error(run(adm(ADM[name]), *told(ADM[name])), golden("adm")[name]) < TOLERANCE


@pytest.mark.parametrize("name", cases(EDM))
def test_edm_is_the_independent_one(name):
    spec = EDMConfig.from_kwargs(EDM[name])
    params = to_params(spec, spec.weights_of(edm_state_dict(EDM[name])), "golden")
    noise, labels = edm_told(EDM[name])
    denoise = dataclasses.replace(Denoiser(params, spec), label=None if labels is None else jnp.asarray(labels))
    assert error(run(denoise, noise), golden("edm")[name]) < TOLERANCE


@pytest.mark.long
def test_edm_networks_have_the_parameters_of_the_paper():
    """In millions, as it has them for CIFAR-10's DDPM++ and ImageNet-64's ADM; what maps augmentations is not counted."""
    song = dict(img_resolution=32, model_type="SongUNet", channel_mult=[2, 2, 2])
    for kwargs, millions in ((song, 56), (dict(img_resolution=64, label_dim=1000), 296)):
        shapes = modules.param_shapes(EDMConfig.from_kwargs(kwargs)).values()
        assert round(sum(int(np.prod(shape)) for shape in shapes) / 1e6) == millions, kwargs


ADM_MISTAKES = {
    "new order of qkv": (adm_module.AttentionBlock, "legacy", property(lambda self: False, lambda self, value: None)),
    "sin and cos swapped": (
        adm_module,
        "timestep_embedding",
        lambda t, dim, **_: layers.timestep_embedding(t, dim, freq_shift=0, flip_sin_to_cos=False),
    ),
    "freq_shift 1": (
        adm_module,
        "timestep_embedding",
        lambda t, dim, **_: layers.timestep_embedding(t, dim, freq_shift=1, flip_sin_to_cos=True),
    ),
    "eps 1e-6": (adm_module, "_norm", lambda channels: modules.GroupNorm(channels, 32, 1e-6)),
}


@pytest.mark.long
@pytest.mark.parametrize("mistake", ADM_MISTAKES)
def test_a_mistake_in_the_adm_is_seen(mistake, monkeypatch):
    denoise = adm(SMALL_FFHQ)
    owner, attribute, wrong = ADM_MISTAKES[mistake]
    modules._abstract.cache_clear()  # or the right network would be found again
    monkeypatch.setattr(owner, attribute, wrong, raising=False)
    try:
        assert error(run(denoise), golden("adm")["ffhq"]) > 3 * TOLERANCE
    finally:
        modules._abstract.cache_clear()


# Of a network whose parameters fit either way, as they do in those above.
EDM_MISTAKES = {
    "eps 1e-5": ("_norm", lambda channels, config: modules.GroupNorm(channels, min(32, channels // 4), 1e-5)),
    "sin and cos swapped": ("timestep_embedding", lambda t, dim, **_: layers.timestep_embedding(t, dim, 1, True)),
    "frequencies without end": ("timestep_embedding", lambda t, dim, **_: layers.timestep_embedding(t, dim, 0, False)),
    "sums not divided": ("math", types.SimpleNamespace(sqrt=lambda _: 1.0)),
}


@pytest.mark.long
@pytest.mark.parametrize("mistake", EDM_MISTAKES)
def test_a_mistake_in_the_edm_is_seen(mistake, monkeypatch):
    spec = EDMConfig.from_kwargs(EDM["ddpmpp"])
    params = to_params(spec, spec.weights_of(edm_state_dict(EDM["ddpmpp"])), "golden")
    noise, labels = edm_told(EDM["ddpmpp"])
    modules._abstract.cache_clear()
    monkeypatch.setattr(edm_module, *EDM_MISTAKES[mistake])
    try:
        denoise = dataclasses.replace(Denoiser(params, spec), label=jnp.asarray(labels))
        assert error(run(denoise, noise), golden("edm")["ddpmpp"]) > 3 * TOLERANCE
    finally:
        modules._abstract.cache_clear()


def test_adm_parameters_are_those_of_the_published_ffhq_model():
    spec = ADMConfig.from_flags(FFHQ)
    shapes = torch_shapes(spec, ADM_CONV1D)
    assert len(shapes) == 362
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 93_563_910
    # Of the sorted lines "name<tab>shape" of the published file's state dict.
    lines = sorted(f"{name}\t{shape}" for name, shape in shapes.items())
    assert (
        hashlib.sha256("\n".join(lines).encode()).hexdigest()
        == "7f09d26b10dc9c4a1bd44507f9f9339f160d2ebaf1a1c208b1c74d0585ac46f0"
    )


@pytest.mark.long
def test_adm_networks_have_the_parameters_of_the_paper():
    # In millions, by the paper (Table 4); the conditional 256 px network has a row of 1,024 for each of 1,000 classes more.
    of_paper = {"256x256_diffusion_uncond": 553, "64x64_diffusion": 296, "128x128_diffusion": 422, "256x256_diffusion": 554}
    for name, millions in of_paper.items():
        flags = json.loads((ROOT / "third_party" / "adm" / f"{name}.json").read_text())
        count = sum(int(np.prod(s)) for s in modules.param_shapes(ADMConfig.from_flags(flags)).values())
        assert round(count / 1e6) == millions, name
    assert count == 552_814_086 + 1000 * 1024


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "variance"),
    [("celebahq", "fixed_small"), ("cifar10", "fixed_large"), ("learned-variance", "learned_range")],
)
def test_fifty_steps_of_ddpm_are_those_of_diffusers_scheduler(name, variance):
    denoise = unet2d(UNET2D[name])
    schedule = gd.Schedule.create(num_steps=50, variance=variance)
    sample = jax.jit(gd.unguided_sample, static_argnames="shape", compiler_options=QUICK_COMPILE)
    x, _ = sample(jax.random.key(0), denoise, schedule, shape=denoise.config.image_shape)
    assert np.abs(np.asarray(x) - golden("trajectory")[f"{name}-{variance}"]).max() < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("make", [lambda: unet2d(TWO), lambda: adm(ADM["plain"])], ids=["unet2d", "adm"])
def test_rematerialisation_changes_neither_the_value_nor_the_gradient(make):
    def value_and_gradient(denoise, x, t):
        return jax.value_and_grad(lambda x: jnp.square(denoise.batch(x, t)[0]).sum())(x)

    denoise = make()
    x, t = map(jnp.asarray, inputs(8, 3))
    compiled = jax.jit(value_and_gradient, compiler_options=QUICK_COMPILE)
    kept, again = (compiled(dataclasses.replace(denoise, remat=remat), x, t) for remat in (False, True))
    assert error(again[0], kept[0]) < 1e-6
    assert error(again[1], kept[1]) < 1e-5
