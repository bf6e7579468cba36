"""Priors from files: every layout and format, whole and broken; what is broken is refused, named, and never half-loaded."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_files
from parity_cases import ADM, ADM_CONV1D, CELEBAHQ, EDM, FFHQ, TWO, edm_state_dict, state_dict, torch_shapes

from gdiff_jax import modules, parametrisation, tensor_files
from gdiff_jax.parametrisation import Flow, Sample, V
from gdiff_jax.priors import (
    ADMConfig,
    EDMConfig,
    Prior,
    UNet2DConfig,
    cache,
    load_prior,
    save_prior,
    sources,
    weights,
)
from gdiff_jax.priors.schedulers import read_scheduler
from gdiff_jax.schedule import Schedule, make_betas

SCHEDULER = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=50, variance_type="fixed_large")
FP16 = "diffusion_pytorch_model.fp16.safetensors"
SAFETENSORS = "diffusion_pytorch_model.safetensors"
BIN = "diffusion_pytorch_model.bin"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GDIFF_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_unet, tmp_path):
    mean = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    save_prior(tmp_path / "prior", Prior(tiny_unet, make_betas(num=50), "fixed_large", "toy", "", mean), SCHEDULER)
    return tmp_path / "prior"


@pytest.fixture
def tensors(tiny_unet):
    """The same network's state dict in float32."""
    return weights.to_torch(tiny_unet.params, np.float32)


def assert_same(params, expected, **tolerance):
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        assert params[name].dtype == jnp.float32
        np.testing.assert_allclose(params[name], value, err_msg=name, **tolerance)


# Whole


def test_saved_prior_is_read_back(folder, tiny_unet):
    prior = load_prior(folder)
    assert prior.denoise.config == tiny_unet.config
    assert_same(prior.denoise.params, tiny_unet.params, rtol=1e-3, atol=1e-6)  # float16 keeps 11 bits
    np.testing.assert_array_equal(prior.betas, make_betas(num=50))
    np.testing.assert_allclose(prior.mean_image, np.linspace(-1, 1, 64).reshape(8, 8, 1), atol=1e-3)
    assert (prior.image_shape, prior.variance, prior.name) == ((8, 8, 1), "fixed_large", str(folder))
    assert (prior.clip, prior.revision) == (True, "")
    assert (prior.schedule(10).num_steps, prior.schedule().num_steps) == (10, 50)
    assert prior.sha256 == hashlib.sha256((folder / FP16).read_bytes()).hexdigest()
    changed = load_prior(folder, "bfloat16", remat=True).denoise
    assert (changed.dtype, changed.remat) == ("bfloat16", True)
    assert sorted(os.listdir(folder)) == ["config.json", FP16, "mean_image.npy", "scheduler_config.json"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one file may read all


def test_prior_without_a_mean_image(folder):
    (folder / "mean_image.npy").unlink()
    assert load_prior(folder).mean_image is None


def write(path, tensors):
    """A weight file of the format that its name says."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    else:
        torch_files.save(path, tensors)


@pytest.mark.parametrize("name", [SAFETENSORS, BIN])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_layouts_formats_and_types(folder, tensors, tiny_unet, name, dtype, pipeline):
    (folder / FP16).unlink()
    write(folder / name, {k: v.astype(dtype) for k, v in tensors.items()})
    if pipeline:
        for part in ("unet", "scheduler"):
            (folder / part).mkdir()
        for file in ("config.json", name):
            (folder / file).rename(folder / "unet" / file)
        (folder / "scheduler_config.json").rename(folder / "scheduler" / "scheduler_config.json")
    exact = dict(rtol=1e-3, atol=1e-6) if dtype == "float16" else dict(rtol=0)
    assert_same(load_prior(folder).denoise.params, tiny_unet.params, **exact)


def test_bfloat16_weights_are_read(folder, tensors, tiny_unet):
    (folder / FP16).unlink()
    write(folder / SAFETENSORS, {k: v.astype(jnp.bfloat16) for k, v in tensors.items()})
    assert_same(load_prior(folder).denoise.params, tiny_unet.params, rtol=1e-2)


@pytest.mark.parametrize("name", [SAFETENSORS, BIN])
def test_the_plain_weight_file_is_taken_before_its_variants(folder, tensors, tiny_unet, name):
    write(folder / name, tensors)
    write(folder / FP16, {})
    if name == SAFETENSORS:
        write(folder / BIN, {})
    assert_same(load_prior(folder).denoise.params, tiny_unet.params, rtol=0)


def write_shards(folder, tensors, count=3, kind="safetensors", of=""):
    """As diffusers' save_pretrained(max_shard_size=...) does; the index."""
    names = sorted(tensors)
    where = {name: f"diffusion_pytorch_model{of}-{k % count + 1:05d}-of-{count:05d}.{kind}" for k, name in enumerate(names)}
    for file in set(where.values()):
        write(folder / file, {name: tensors[name] for name in names if where[name] == file})
    index = folder / f"diffusion_pytorch_model.{kind}.index{of}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("of", ["", ".fp16"])
def test_shards_are_read_as_the_whole_file(folder, tensors, tiny_unet, kind, of):
    (folder / FP16).unlink()
    write_shards(folder, tensors, kind=kind, of=of)
    prior = load_prior(folder)
    assert_same(prior.denoise.params, tiny_unet.params, rtol=0)
    shard = next(folder.glob(f"*-00002-of-00003.{kind}"))
    write(shard, {name: value + 1 for name, value in sharded(shard).items()})
    assert load_prior(folder).sha256 != prior.sha256  # of every shard, not of the first or the index


def sharded(file):
    return {name: np.asarray(value) for name, value in tensor_files.read_tensors(file).items()}


def test_shards_that_are_not_whole_are_refused_by_name(folder, tensors):
    index = write_shards(folder, tensors)
    second = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    whole = sharded(second)
    write(second, dict(list(whole.items())[1:]))
    with pytest.raises(ValueError, match=f"00002-of-00003.* does not hold what .*missing: {next(iter(whole))}"):
        load_prior(folder)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"shards that are missing .*00002-of-00003"):
        load_prior(folder)
    write(second, whole)
    load_prior(folder)
    text = index.read_text()
    index.write_text(text.replace(second.name, f"../{second.name}"))
    with pytest.raises(ValueError, match="a file that is not beside it"):
        load_prior(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index of shards"):
        load_prior(folder)
    index.write_text(text)
    write(folder / SAFETENSORS, tensors)
    with pytest.raises(FileNotFoundError, match="may be different weights; keep one of them"):
        load_prior(folder)
    (folder / SAFETENSORS).unlink()
    (folder / FP16).unlink()
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"are shards, and their index, .*index.json, is missing"):
        load_prior(folder)


AVERAGING = dict(decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=5000, power=0.75, update_after_step=0)


def test_what_an_average_of_weights_says_of_itself_is_no_field_of_the_network(folder, tiny_unet):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **AVERAGING, "use_ema_warmup": True}))
    assert load_prior(folder).denoise.config == tiny_unet.config
    (folder / "config.json").write_text(json.dumps({**config, **AVERAGING, "decays": 0.9}))
    with pytest.raises(ValueError, match=r"decays=0.9 \(unknown field\)$"):
        load_prior(folder)


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_configs_with_a_byte_order_mark_and_other_line_ends_are_read(folder, tiny_unet, name):
    text = (folder / name).read_text()
    (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_prior(folder).denoise.config == tiny_unet.config


def test_attention_of_old_files_is_renamed_and_squeezed(folder, tensors, tiny_unet):
    old = {}
    for name, value in tensors.items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{new}." in name:
                name = name.replace(new, was)
                value = value[..., None, None] if name.endswith("weight") else value
        old[name] = value
    assert len(old.keys() - tensors.keys()) == 8
    (folder / FP16).unlink()
    write(folder / SAFETENSORS, old)
    assert_same(load_prior(folder).denoise.params, tiny_unet.params, rtol=0)
    both = old | {k: v for k, v in tensors.items() if k.endswith("attentions.0.to_q.bias")}
    write(folder / SAFETENSORS, both)
    with pytest.raises(ValueError, match=r"under an old and a new name: mid_block\.attentions\.0\.query\.bias"):
        load_prior(folder)


def test_strided_and_shared_storages_of_torch_files(tmp_path):
    pool = np.arange(24, dtype=np.float32)
    torch_files.save(
        tmp_path / "x.bin",
        {
            "rows": torch_files.tensor("0", pool, (2, 3), (3, 1), 4),
            "columns": torch_files.tensor("0", pool, (3, 2), (1, 3), 4),
            "skipping": torch_files.tensor("0", pool, (4,), (5,), 1),
            "scalar": torch_files.tensor("0", pool, (), (), 7),
            "empty": torch_files.tensor("0", pool, (0, 3), (3, 1), 0),
        },
        storages={"0": pool.tobytes()},
    )
    read = tensor_files.read_tensors(tmp_path / "x.bin")
    rows = pool[4:10].reshape(2, 3)
    for name, expected in dict(rows=rows, columns=rows.T, skipping=pool[1::5][:4], scalar=pool[7], empty=pool[:0]).items():
        np.testing.assert_array_equal(read[name].ravel(), np.ravel(expected), err_msg=name)
    assert read["columns"].shape == (3, 2)


@pytest.fixture
def adm_file(tmp_path):
    flags = ADM["ffhq"] | dict(diffusion_steps=500, noise_schedule="linear", use_fp16=False)
    path = tmp_path / "toy.pt"
    torch_files.save(path, state_dict(torch_shapes(ADMConfig.from_flags(flags), ADM_CONV1D)))
    path.with_suffix(".json").write_text(json.dumps(flags))
    return path


def test_adm_file_is_read_with_its_flags(adm_file):
    prior = load_prior(adm_file)
    assert prior.denoise.config == ADMConfig.from_flags(ADM["ffhq"] | dict(diffusion_steps=500))
    assert (prior.variance, prior.clip, prior.image_shape) == ("learned_range", True, (16, 16, 3))
    np.testing.assert_allclose(prior.betas, np.linspace(2e-4, 0.04, 500))
    eps, v = jax.jit(lambda denoise: denoise(jnp.zeros((16, 16, 3)), jnp.asarray(7)))(prior.denoise)
    assert eps.shape == v.shape == (16, 16, 3)
    flags = json.loads(adm_file.with_suffix(".json").read_text())
    adm_file.with_suffix(".json").unlink()
    assert_same(load_prior(adm_file, config=flags).denoise.params, prior.denoise.params, rtol=0)
    other = adm_file.with_suffix(".safetensors")
    safetensors.numpy.save_file(tensor_files.read_tensors(adm_file), other)
    assert_same(load_prior(other, config=flags).denoise.params, prior.denoise.params, rtol=0)
    with pytest.raises(FileNotFoundError, match=r"flags, or EDM's arguments, as JSON in toy\.json"):
        load_prior(adm_file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(class_cond="some"), r"class_cond='some' \(a bool is needed\)"),
        (dict(predict_xstart=True, colour=1), r"predict_xstart=True .*; colour=1 \(unknown flag\)"),
        (dict(learn_sigma="perhaps"), r"learn_sigma='perhaps' \(a bool is needed\)"),
        (dict(num_channels=32.5), r"num_channels=32\.5 \(a int is needed\)"),
        (dict(num_channels=40), "40 of a level must be a multiple of 32"),
        (dict(image_size=10), "10 cannot be halved 2 times"),
        (dict(channel_mult=""), "channel_mult is needed for image_size 16"),
        (dict(channel_mult="1,b"), "channel_mult '1,b'"),
        (dict(num_head_channels=-1, num_heads=5), "attention: 64 channels are no multiple of .* 5"),
        (dict(noise_schedule="sigmoid"), "'sigmoid' is not implemented"),
    ],
)
def test_adm_flags_that_cannot_be_used_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        ADMConfig.from_flags(ADM["ffhq"] | flags)


@pytest.fixture
def edm_file(tmp_path):
    path = tmp_path / "edm-toy.pt"
    torch_files.save(path, edm_state_dict(EDM["dhariwal"]))
    path.with_suffix(".json").write_text(json.dumps(EDM["dhariwal"]))
    return path


def test_edm_file_is_read_with_its_arguments(edm_file):
    prior = load_prior(edm_file)
    assert prior.denoise.config == EDMConfig.from_kwargs(EDM["dhariwal"])
    assert (prior.variance, prior.clip, prior.image_shape) == ("fixed_small", False, (16, 16, 3))
    assert prior.schedule(7).parametrisation == parametrisation.EDM(0.5)
    assert (prior.denoise.config.num_classes, prior.denoise.null_label) == (7, 7)  # it was trained with labels left out
    other = edm_file.with_suffix(".safetensors")
    safetensors.numpy.save_file(tensor_files.read_tensors(edm_file), other)
    assert_same(load_prior(other, config=EDM["dhariwal"]).denoise.params, prior.denoise.params, rtol=0)
    guided = load_prior(edm_file, class_guidance=2.0)
    assert guided.denoise.class_guidance == 2
    assert guided.settings_sha256 != prior.settings_sha256
    edm_file.with_suffix(".json").write_text(json.dumps(EDM["dhariwal"] | dict(label_dropout=0)))
    assert load_prior(edm_file).denoise.null_label is None
    with pytest.raises(ValueError, match=r"class_guidance 2\.0 needs a null_label"):
        load_prior(edm_file, class_guidance=2.0)
    with pytest.raises(ValueError, match="null_label 9 is none of the 7 classes"):
        load_prior(edm_file, null_label=9)


def test_edm_pickle_is_refused_with_the_lines_that_export_it(tmp_path):
    path = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    path.write_bytes(pickle.dumps({"ema": 1}))
    with pytest.raises(ValueError, match="runs what it holds") as error:
        load_prior(path)
    assert "torch.save(net.state_dict(), 'edm-cifar10-32x32-cond-vp.pt')\n" in str(error.value)
    assert "{'class_name': type(net).__name__, **net.init_kwargs}, open('edm-cifar10-32x32-cond-vp.json', 'w'))" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(class_name="VPPrecond"), r"class_name 'VPPrecond' is not implemented; .*edm-\*"),
        (dict(colour=1), "colour: unknown arguments"),
        (dict(model_type="UNet"), "model_type='UNet' .implemented: 'SongUNet' or 'DhariwalUNet'"),
        (dict(encoder_type="skip"), "encoder_type='skip' is of a SongUNet"),
        (dict(resample_filter=[1, 2, 1]), r"resample_filter=\(1, 2, 1\)"),
        (dict(model_channels=60), "60 channels cannot have 15 groups|multiple of 4|heads"),
        (dict(img_resolution=17), r"img_resolution 17 cannot be halved for each of channel_mult \(1, 2\)"),
        (dict(label_dim=8), r"of another shape: map_label\.weight \(256, 7\)"),
        (dict(num_blocks=65), r"num_blocks=65 \(needed: an integer in 1\.\.64\)"),
        (dict(init_args=[]), "init_args: unknown arguments"),
        (dict(num_blocks=2), r"missing: dec\.16x16_block2"),
        (dict(augment_dim=0), r"unexpected: map_augment\.weight"),
    ],
)
def test_edm_arguments_that_cannot_be_used_are_refused(edm_file, kwargs, message):
    edm_file.with_suffix(".json").write_text(json.dumps(EDM["dhariwal"] | kwargs))
    with pytest.raises(ValueError, match=message):
        load_prior(edm_file)


def test_edm_filter_of_another_kind_is_refused(edm_file):
    tensors = edm_state_dict(EDM["dhariwal"])
    tensors["model.enc.8x8_down.conv0.resample_filter"] = (
        np.outer([1, 3, 3, 1], [1, 3, 3, 1])[None, None].astype(np.float32) / 64
    )
    torch_files.save(edm_file, tensors)
    with pytest.raises(ValueError, match=r"8x8_down.conv0.resample_filter is not the resample_filter \(1, 1\)"):
        load_prior(edm_file)


def test_edm_tensors_that_are_there_twice_or_belong_to_nothing_are_refused():
    config = EDMConfig.from_kwargs(EDM["ncsnpp"])
    tensors = edm_state_dict(EDM["ncsnpp"])
    found = config.weights_of(tensors)
    assert not [name for name in found if "resample_filter" in name]
    some = next(name for name in tensors if name.endswith("map_layer0.weight"))
    for name, of in ((some.removeprefix("model."), some), ("map_noise.weight", "model.map_noise.freqs")):
        twice = tensors | {of: np.zeros(1), name: np.ones(1)}
        with pytest.raises(ValueError, match="are the same tensor; leave one of them out") as error:
            config.weights_of(twice)
        assert {name, of} <= set(str(error.value).split())
    assert "nonsense.resample_filter" in config.weights_of(tensors | {"nonsense.resample_filter": np.ones((1, 1, 4, 4))})


def test_odd_values_in_edm_arguments_are_refused_or_harmless():
    odd = (None, True, -1, 0, 10**12, 1.5, float("nan"), "8", "", [], [8], ["8"], [[8]], {})
    for base, field in itertools.product((EDM["ddpmpp"], EDM["dhariwal"]), (f.name for f in dataclasses.fields(EDMConfig))):
        for value in odd:
            with contextlib.suppress(ValueError):
                config = EDMConfig.from_kwargs(base | {field: value})
                # Sizes that are allowed and large are built of nothing but shapes, and would take long.
                modules.param_shapes(dataclasses.replace(config, model_channels=64 if config.model_channels > 64 else 16))


def test_adm_flags_may_be_text_as_on_a_command_line():
    text = {name: str(value) for name, value in FFHQ.items()} | dict(class_cond="False", channel_mult="")
    assert ADMConfig.from_flags(text) == ADMConfig.from_flags(FFHQ)
    assert (ADMConfig().variance, ADMConfig(sigma_small=True).variance) == ("fixed_large", "fixed_small")


def test_hub_id_is_found_in_the_hub_cache(folder, tensors, tmp_path, monkeypatch):
    """The layout that huggingface_hub leaves on disk, which is what it reads offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision, repo = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub" / "models--someone--ddpm-toy"
    shutil.copytree(folder, repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    monkeypatch.chdir(tmp_path)
    for name in ("someone/ddpm-toy", f"someone/ddpm-toy@{revision}"):
        prior = load_prior(name)
        assert (prior.name, prior.revision) == (name, revision)
        assert prior.sha256 == load_prior(folder).sha256
    note = json.loads(next((tmp_path / "cache").glob("*/about.json")).read_text())
    assert (note["source"], note["revision"]) == ("someone/ddpm-toy", revision)
    assert (note["sha256"], note["converter"]) == (prior.sha256, weights.CONVERTER_VERSION)
    with pytest.raises(FileNotFoundError, match=r"'someone/else' is no file or folder.*cannot be had from the hub"):
        load_prior("someone/else")


@pytest.mark.parametrize("name", sources.BUNDLED)
def test_bundled_priors_are_whole_small_and_have_a_card(name):
    prior = load_prior(name)
    assert prior.image_shape == prior.mean_image.shape
    folder = sources.find(name).weights.parent
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert max(sizes) < 16e6
    assert sum(sizes) < 32e6
    card = (folder / "README.md").read_text()
    assert prior.sha256 in card
    assert (folder / "samples.png").is_file()
    assert not (folder / "neighbours.png").exists()  # it would publish training images


# The cache


def test_converted_weights_are_read_from_the_cache(folder, own_cache, monkeypatch, tiny_unet):
    first = load_prior(folder)
    assert [entry.name for entry in own_cache.iterdir()] == [next(own_cache.iterdir()).name]
    monkeypatch.setattr(tensor_files, "read_tensors", lambda path: pytest.fail("the file was converted again"))
    assert_same(load_prior(folder).denoise.params, first.denoise.params, rtol=0)
    monkeypatch.undo()
    monkeypatch.setenv("GDIFF_JAX_CACHE", str(own_cache))
    monkeypatch.setattr(cache, "CONVERTER_VERSION", 2)
    load_prior(folder)
    assert len(list(own_cache.iterdir())) == 2
    write(folder / FP16, weights.to_torch({k: v + 1 for k, v in tiny_unet.params.items()}))
    assert_same(load_prior(folder).denoise.params, {k: v + 1 for k, v in tiny_unet.params.items()}, rtol=1e-2)
    assert not list(own_cache.glob("partial-*"))


def damage_note(entry):
    (entry / "about.json").write_text("{")


def damage_digest(entry):
    note = json.loads((entry / "about.json").read_text())
    (entry / "about.json").write_text(json.dumps(note | {"params_sha256": ""}))


def damage_params(entry):
    shutil.rmtree(entry / "params")


@pytest.mark.parametrize("damage", [damage_note, damage_digest, damage_params])
def test_damaged_cache_entry_is_told_of_and_made_again(folder, own_cache, damage):
    expected = load_prior(folder).denoise.params
    (entry,) = own_cache.iterdir()
    damage(entry)
    with pytest.warns(UserWarning, match="is damaged .* converting again"):
        assert_same(load_prior(folder).denoise.params, expected, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_prior(folder)


def test_cache_that_cannot_be_written_is_told_of(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GDIFF_JAX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept"):
        load_prior(folder)


# Broken


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("conv_in.bias"), r"missing: conv_in\.bias$"),
        (lambda w: w.update({"conv_in.scale": np.zeros(8, np.float16)}), r"unexpected: conv_in\.scale$"),
        (lambda w: w.update({"conv_in.bias": np.zeros(9, np.float16)}), r"of another shape: conv_in\.bias \(9,\).*\(8,\)"),
        (
            lambda w: w.update({"conv_in.weight": w["conv_in.weight"].transpose(2, 3, 1, 0)}),
            r"of another shape: conv_in\.weight \(3, 3, 1, 8\).*\(3, 3, 1, 8\)",
        ),
        (lambda w: w.update({"conv_a.bias": w.pop("conv_in.bias")}), r"missing: conv_in\.bias; unexpected: conv_a\.bias"),
        (lambda w: w.clear(), r"missing: conv_in\.bias, .* and \d+ more"),
        (lambda w: w.update({"conv_in.bias": np.full(8, np.inf, np.float16)}), r"not finite: conv_in\.bias"),
        (lambda w: w.update({k: v.astype(float) + 1e39 for k, v in w.items()}), r"not finite: conv_in\.bias"),
        (lambda w: w.update({"conv_in.bias": np.zeros(8, np.int64)}), r"another type: conv_in\.bias int64 among float16"),
        (lambda w: w.update({"conv_in.bias": np.zeros(8, np.float32)}), r"another type: conv_in\.bias float32 among float16"),
    ],
)
def test_weights_that_do_not_fit_are_listed(folder, damage, message):
    found = safetensors.numpy.load_file(folder / FP16)
    damage(found)
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, folder / FP16)
    with pytest.raises(ValueError, match=message):
        load_prior(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "config"), ("scheduler_config.json", "scheduler_config"), (FP16, r"diffusion_pytorch_model\*")],
)
def test_missing_file_is_named(folder, file, message):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder}.*{message}"):
        load_prior(folder)


def test_several_variants_without_a_plain_file_are_refused(folder):
    shutil.copy(folder / FP16, folder / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(FileNotFoundError, match=r"found .*ema.*fp16.*; keep one"):
        load_prior(folder)


@pytest.mark.parametrize("file", ["config.json", "scheduler_config.json"])
@pytest.mark.parametrize("text", ['{"sample_size": ', "[1, 2]", "\x00\xff"])
def test_config_that_is_not_a_json_object_is_named(folder, file, text):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=file):
        load_prior(folder)


def test_legacy_pickle_is_refused_with_the_command_that_converts_it(folder):
    (folder / FP16).unlink()
    (folder / BIN).write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match=r"legacy pickle.*Convert it.*weights_only=True"):
        load_prior(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(prediction_type="score"), r"prediction_type='score' \(implemented: 'epsilon' or 'sample' or 'v_prediction'\)"),
        (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True with prediction_type='epsilon'.*say what"),
        (dict(timestep_spacing="leaded"), "timestep_spacing='leaded'"),
        (dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"), "timestep_type='continuous'"),
        (
            dict(_class_name="EDMEulerScheduler", sigma_min=1e-9),
            "sigma_min=1e-09, .*levels differ by nothing.*a larger sigma_min",
        ),
        (dict(_class_name="ScoreSdeVeScheduler", sigma_min=1e-9), "sigma_min=1e-09, .*a larger sigma_min"),
        (dict(beta_start=1e-17), "beta_start=1e-17, .*a larger beta_start"),
        (dict(_class_name="EDMEulerScheduler", sigma_min=90), r"sigma_min=90 \(needed: below sigma_max 80\)"),
        (dict(_class_name="EDMEulerScheduler", sigma_data="0.5"), r"sigma_data='0\.5' \(needed: a number"),
        (dict(_class_name="FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (dict(thresholding=True), "thresholding=True"),
        (dict(clip_sample_range=2.0), r"clip_sample_range=2\.0"),
        (dict(variance_type="learned"), "variance_type='learned'"),
        (dict(variance_type="fixed_large_log"), "variance_type='fixed_large_log'"),
        (dict(variance_type="learned_range"), "its network has no output for it"),
        (dict(_class_name="ScoreSdeVpScheduler"), "_class_name='ScoreSdeVpScheduler'"),
        (dict(_class_name="ScoreSdeVeScheduler", sigma_min=2000), r"sigma_min=2000 \(needed: below sigma_max 1348\)"),
        (dict(beta_schedule="laplace"), "'laplace'"),
        (dict(trained_betas=[0.1, 1.5]), r"in \(0, 1\)"),
        (dict(trained_betas=[0.1, 0.2]), "length 2 .*num_train_timesteps 50"),
        (dict(clip_sample="no"), "clip_sample='no'"),
        (dict(use_flow_sigmas=True), "use_flow_sigmas=True"),
        (dict(num_train_timesteps="many"), "num_train_timesteps='many'"),
    ],
)
def test_scheduler_values_that_are_not_implemented_are_refused(folder, fields, message):
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | fields))
    with pytest.raises(ValueError, match=message):
        load_prior(folder)


@pytest.mark.parametrize(
    ("fields", "variance", "clip"),
    [
        ({}, "fixed_small", True),  # the class defaults of DDPMScheduler
        (dict(_class_name="PNDMScheduler"), "fixed_small", False),
        (dict(_class_name="DDIMScheduler", clip_sample=False), "fixed_small", False),
        (dict(variance_type="fixed_small_log", clip_sample=False), "fixed_small", False),
        (dict(variance_type="fixed_large"), "fixed_large", True),
    ],
)
def test_scheduler_config_is_honoured(fields, variance, clip):
    diffusion = read_scheduler(fields)
    assert (diffusion.variance, diffusion.clip) == (variance, clip)
    np.testing.assert_array_equal(diffusion.betas, np.linspace(1e-4, 0.02, 1000))
    betas = [0.1, 0.2]
    with_betas = fields | dict(trained_betas=betas, num_train_timesteps=2)
    np.testing.assert_array_equal(read_scheduler(with_betas).betas, betas)


@pytest.mark.parametrize(
    ("fields", "predicted"),
    [
        (dict(predict_epsilon=False), Sample()),
        (dict(prediction_type="sample", predict_epsilon=True), Sample()),
        (dict(_class_name="EulerDiscreteScheduler", prediction_type="v_prediction", timestep_spacing="trailing"), V()),
        (dict(_class_name="DDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True), V()),
        (dict(_class_name="EDMDPMSolverMultistepScheduler", sigma_data=1.0), parametrisation.EDM(1.0)),
        (dict(_class_name="EDMEulerScheduler", prediction_type="v_prediction"), parametrisation.EDM(0.5, -1.0)),
        (dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0), Flow(50.0)),
    ],
)
def test_what_a_network_predicts_is_read_of_its_scheduler(folder, fields, predicted):
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | fields))
    prior = load_prior(folder)
    assert prior.parametrisation == prior.schedule(7).parametrisation == predicted
    zero = "rescale_betas_zero_snr" in fields or fields.get("_class_name", "").startswith("Flow")
    assert (prior.betas[-1] == 1) == zero
    save_prior(folder, prior, SCHEDULER | fields)
    with pytest.raises(ValueError, match="prediction_type are not those of the prior"):
        save_prior(folder, prior, SCHEDULER)


@pytest.mark.parametrize(
    ("network", "scheduler", "message"),
    [
        (dict(time_embedding_type="fourier"), {}, "'fourier' takes the logarithm of a noise level, as a ScoreSdeVeScheduler"),
        (
            dict(time_embedding_type="learned", num_train_timesteps=49),
            {},
            "num_train_timesteps 49; .* has 50 levels",
        ),
        (
            dict(time_embedding_type="learned", num_train_timesteps=50),
            dict(_class_name="EDMEulerScheduler"),
            "has 50 levels of EDM",
        ),
        (dict(time_embedding_type="learned"), {}, "'learned' needs num_train_timesteps"),
        (dict(class_embed_type="simple_projection"), {}, "class_embed_type='simple_projection' .needed: null or timestep"),
        (
            dict(down_block_types=["KDownBlock2D"]),
            {},
            "block type 'KDownBlock2D' is not implemented here; .* AttnSkip",
        ),
        (dict(down_block_types=["SkipDownBlock2D"]), {}, "in_channels 1, out_channels 1: .* 3"),
        (dict(norm_num_groups=None), {}, "norm_num_groups None is for networks of Skip blocks"),
    ],
)
def test_times_and_blocks_that_do_not_go_together_are_refused(folder, network, scheduler, message):
    for name, fields in (("config.json", network), ("scheduler_config.json", scheduler)):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        load_prior(folder)


def test_blocks_under_their_old_names_and_what_is_left_out_are_what_diffusers_makes_of_them():
    old = TWO | dict(down_block_types=["UNetResDownBlock2D", "UNetResAttnDownBlock2D"], downsample_type=None)
    assert UNet2DConfig.from_diffusers(old) == UNet2DConfig.from_diffusers(TWO)


def test_another_model_class_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(_class_name="UNet2DConditionModel")))
    with pytest.raises(ValueError, match="a UNet2DConditionModel is not implemented"):
        load_prior(folder)


def test_unknown_name_lists_what_is_bundled():
    with pytest.raises(FileNotFoundError, match=r"'cifar11-32' is no file or folder"):
        load_prior("cifar11-32")


def test_flags_are_for_adm_files_only(folder):
    with pytest.raises(ValueError, match="brings its own config"):
        load_prior(folder, config={})
    with pytest.raises(ValueError, match="dtype 'float8'"):
        load_prior(folder, "float8")


def fields_and_values():
    odd = (None, True, -1, 0, 10**12, 1.5, float("nan"), float("inf"), "8", "", [], [8], ["8"], [None], [[8], [8]], {})
    more = ("patch_size", "time_embedding_dim", "attn_norm_num_groups", "add_attention", "dropout", "class_embed_type")
    for field in [*CELEBAHQ, *more, "num_class_embeds", "num_train_timesteps", "mid_block_type"]:
        for value in odd:
            yield field, value


def test_odd_values_in_a_network_config_are_refused_or_mean_what_they_say():
    """Every field by every odd value: a clear error, or a config that holds exactly the value."""
    refused = {}
    for field, value in fields_and_values():
        if field.startswith("_"):
            continue
        try:
            config = UNet2DConfig.from_diffusers(TWO | {field: value})
        except ValueError as error:
            refused[field, repr(value)] = str(error)
        else:
            assert getattr(config, field, value) == (tuple(value) if isinstance(value, list) else value), (field, value)
            assert min(config.image_shape) > 0
    assert len(refused) > 300
    assert all(field in message or "block type" in message for (field, _), message in refused.items())


def test_odd_values_in_adm_flags_and_schedulers_are_refused_or_harmless():
    odd = (True, -1, -2, 0, 10**12, 1.5, "inf", "", [], [8], [None], {}, "x")
    for field in (f.name for f in dataclasses.fields(ADMConfig)):
        for value in (None, *odd):
            with contextlib.suppress(ValueError):
                config = ADMConfig.from_flags(ADM["plain"] | {field: value})
                modules.param_shapes(dataclasses.replace(config, num_channels=min(config.num_channels, 64)))
    fields = (*SCHEDULER, "trained_betas", "clip_sample", "_class_name", "prediction_type", "timestep_values")
    fields += ("predict_epsilon", "rescale_betas_zero_snr", "sigma_min", "sigma_max", "sigma_data", "rho", "shift")
    for kind in ("DDPMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        for field, value in itertools.product(fields, (*odd, 1e-6, 10**400, [0.1], [2.0])):
            with contextlib.suppress(ValueError):
                diffusion = read_scheduler(SCHEDULER | {"_class_name": kind, field: value})
                assert len(Schedule.create(diffusion.betas, 1, parametrisation=diffusion.parametrisation).t) == 1


def test_mean_image_that_is_none_is_refused(folder):
    whole = np.zeros((8, 8, 1), np.float16)
    for content in (whole + 2, whole * np.nan, whole[1:], whole.astype(np.uint8), whole.astype(complex), np.array(None)):
        np.save(folder / "mean_image.npy", content)
        with pytest.raises(ValueError, match=r"mean_image\.npy"):
            load_prior(folder)
    for raw in (b"", b"PK\x03\x04", b"\x93NUMPY"):
        (folder / "mean_image.npy").write_bytes(raw)
        with pytest.raises(ValueError, match=r"mean_image\.npy cannot be read"):
            load_prior(folder)


def test_weights_that_change_while_they_are_read_are_refused(folder, own_cache, monkeypatch, tiny_unet):
    read = tensor_files.read_tensors

    def swap_and_read(path):
        write(path, weights.to_torch({k: v + 1 for k, v in tiny_unet.params.items()}))
        return read(path)

    monkeypatch.setattr(tensor_files, "read_tensors", swap_and_read)
    with pytest.raises(ValueError, match="changed while it was read"):
        load_prior(folder)
    assert not own_cache.exists()


def test_saving_what_would_be_read_back_as_another_prior_is_refused(folder, tiny_unet, tensors):
    prior = load_prior(folder)
    for scheduler in (SCHEDULER | dict(variance_type="fixed_small"), SCHEDULER | dict(beta_end=0.03), dict()):
        with pytest.raises(ValueError, match="not those of the prior"):
            save_prior(folder, prior, scheduler)
    save_prior(folder, dataclasses.replace(prior, mean_image=None), SCHEDULER)
    assert load_prior(folder).mean_image is None
    config = dataclasses.replace(prior.denoise.config, num_class_embeds=3)
    none = dataclasses.replace(prior, denoise=dataclasses.replace(prior.denoise, config=config, null_label=2))
    with pytest.raises(ValueError, match="null_label 2 and class_guidance 1 cannot be written"):
        save_prior(folder, none, SCHEDULER)
    write(folder / BIN, tensors)
    with pytest.raises(ValueError, match="holds other weights"):
        save_prior(folder, prior, SCHEDULER)


def test_settings_beside_the_weights_have_a_digest_of_their_own(folder):
    prior = load_prior(folder)
    for changed in (
        dict(variance="fixed_small"),
        dict(clip=False),
        dict(mean_image=None),
        dict(betas=make_betas(num=49)),
        dict(parametrisation=V()),
    ):
        assert dataclasses.replace(prior, **changed).settings_sha256 != prior.settings_sha256
    assert load_prior(folder, "bfloat16").settings_sha256 == prior.settings_sha256


# Many generated cases: not one may be loaded, wholly or by half


def mutations(tensors, rng):
    """(what, tensors) for each way in which a state dict can be wrong."""
    names = sorted(tensors)
    for name in names:
        yield f"without {name}", {k: v for k, v in tensors.items() if k != name}
    for name in rng.choice(names, 12, replace=False):
        yield f"{name} twice", tensors | {f"{name}.1": tensors[name]}
        yield f"{name} renamed", {(f"x{k}" if k == name else k): v for k, v in tensors.items()}
    for dtype in (np.int64, np.float16, np.float64):
        for name in rng.choice(names, 6, replace=False):
            yield f"{name} as {dtype}", tensors | {name: tensors[name].astype(dtype)}
    yield "all int64", {k: v.astype(np.int64) for k, v in tensors.items()}
    for value in (np.nan, np.inf):
        for name in rng.choice(names, 6, replace=False):
            spoilt = tensors[name].copy()
            spoilt.flat[rng.integers(spoilt.size)] = value
            yield f"{value} in {name}", tensors | {name: spoilt}
    swaps = [(a, b) for a in names for b in names if a < b and tensors[a].shape != tensors[b].shape]
    for i in rng.choice(len(swaps), 15, replace=False):
        a, b = swaps[i]
        yield f"{a} and {b} swapped", tensors | {a: tensors[b], b: tensors[a]}
    for name in [n for n in names if tensors[n].ndim > 1 and tensors[n].shape[0] != tensors[n].shape[1]][:10]:
        yield f"{name} transposed", tensors | {name: np.ascontiguousarray(tensors[name].swapaxes(0, 1))}
    for name in rng.choice(names, 6, replace=False):
        yield f"{name} cut", tensors | {name: tensors[name][:-1]}


def expect_refusal(folder, what):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        print(what, load_prior(folder).sha256)  # pytest shows it where nothing was raised
    assert str(folder) in str(caught.value), what


@pytest.mark.parametrize("name", [SAFETENSORS, pytest.param(BIN, marks=pytest.mark.long)])
def test_mutated_state_dicts_are_refused(folder, tensors, own_cache, name):
    (folder / FP16).unlink()
    cases = list(mutations(tensors, np.random.default_rng(0)))
    assert len(cases) >= 100
    for what, mutated in cases:
        write(folder / name, mutated)
        expect_refusal(folder, what)
    assert not own_cache.exists()
    write(folder / name, tensors)
    load_prior(folder)  # it was the mutations


@pytest.mark.parametrize("suffix", [pytest.param(".pt", marks=pytest.mark.long), ".safetensors"])
def test_mutated_adm_files_are_refused(tmp_path, own_cache, suffix):
    path, flags = tmp_path / f"adm{suffix}", ADM["plain"]
    whole = state_dict(torch_shapes(ADMConfig.from_flags(flags), ADM_CONV1D))
    cases = list(mutations(whole, np.random.default_rng(2)))
    assert len(cases) >= 100
    path.with_suffix(".json").write_text(json.dumps(flags))
    for what, mutated in cases:
        write(path, mutated)
        expect_refusal(path, what)
    assert not own_cache.exists()
    write(path, whole)
    load_prior(path)


@pytest.mark.parametrize("name", [SAFETENSORS, BIN])
def test_damaged_bytes_are_refused(folder, tensors, own_cache, name):
    """Truncations; and, where the format has checksums or a header to be wrong, flipped bytes."""
    (folder / FP16).unlink()
    write(folder / name, tensors)
    whole, rng = (folder / name).read_bytes(), np.random.default_rng(1)
    lengths = {0, 1, 7, 8, 100, len(whole) - 1, *rng.integers(9, len(whole), 30).tolist()}
    cases = {f"first {n} bytes": whole[:n] for n in lengths}
    if name == BIN:
        with zipfile.ZipFile(folder / name) as archive:
            members = [m for m in archive.infolist() if m.file_size]
        for member in rng.choice(members, 30):
            start = member.header_offset + 30 + len(member.filename)
            i = int(rng.integers(start, start + member.file_size))
            cases[f"byte {i} flipped"] = whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :]
    else:
        (header,) = struct.unpack("<Q", whole[:8])
        cases["longer header"] = struct.pack("<Q", header + 1) + whole[8:]
        cases["huge header"] = struct.pack("<Q", 2**63) + whole[8:]
        cases["one byte more"] = whole + b"\0"
    for what, raw in cases.items():
        (folder / name).write_bytes(raw)
        expect_refusal(folder, what)
    assert not own_cache.exists()


class Call:
    """A pickle of it calls `function(*args)` when it is loaded freely."""

    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


def test_malicious_pickles_run_nothing(folder, tensors, tmp_path):
    import builtins
    import importlib
    import subprocess

    mark = tmp_path / "owned"
    make = f"open({str(mark)!r}, 'w')"
    (folder / FP16).unlink()
    payloads: dict = {
        "os.system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, make),
        "exec": Call(exec, make),
        "open": Call(open, str(mark), "w"),
        "subprocess": Call(subprocess.check_call, ["touch", str(mark)]),
        "getattr": Call(builtins.getattr, "os", "system"),
        "import": Call(importlib.import_module, "antigravity"),
        "numpy.load": Call(np.load, str(mark)),
        "shutil": Call(shutil.rmtree, str(folder)),
        "load_prior": Call(load_prior, str(mark)),
        "OrderedDict subclass": Call(type, "X", (dict,), {}),
        "dataclass": Call(dataclasses.make_dataclass, "X", []),
    }
    for what, payload in payloads.items():
        for place in ("value", "key", "beside", "whole"):
            content = {
                "value": {**dict.fromkeys(tensors, 0), "conv_in.bias": payload},
                "key": {("conv_in.bias", payload): 0} if place == "key" else None,
                "beside": {"weights": [], "hook": payload},
                "whole": payload,
            }[place]
            for protocol in (0, 2, 4):
                torch_files.save(folder / BIN, tensors, pickled=pickle.dumps(content, protocol))
                with pytest.raises(ValueError, match="plain tensors"):
                    load_prior(folder)
                assert not mark.exists(), what
    assert folder.is_dir()


@pytest.mark.parametrize(
    "tensor",
    [
        lambda pool: torch_files.tensor("0", pool, (9,), (1,), 0),  # longer than its storage
        lambda pool: torch_files.tensor("0", pool, (2, 2), (7, 1), 0),
        lambda pool: torch_files.tensor("0", pool, (4,), (1,), 5),
        lambda pool: torch_files.tensor("0", pool, (4,), (-1,), 4),
        lambda pool: torch_files.tensor("0", pool, (4,), (1,), -4),
        lambda pool: torch_files.tensor("0", pool, (10**9, 10**9), (0, 0), 0),  # a bomb
        lambda pool: torch_files.tensor("0", pool, (2, 2), (1,), 0),
        lambda pool: torch_files.tensor("0", pool, (4.0,), (1,), 0),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, tensor):
    pool = np.arange(8, dtype=np.float32)
    torch_files.save(tmp_path / "x.bin", {"x": tensor(pool)}, storages={"0": pool.tobytes()})
    with pytest.raises(ValueError, match=r"x\.bin cannot be read"):
        tensor_files.read_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("raw", [b"", b"\0" * 31, b"\0" * 33])
def test_storages_of_another_length_are_refused(tmp_path, raw):
    torch_files.save(tmp_path / "x.bin", {"x": np.arange(8, dtype=np.float32)}, storages={"0": raw})
    with pytest.raises(ValueError, match="storage 0 holds"):
        tensor_files.read_tensors(tmp_path / "x.bin")
