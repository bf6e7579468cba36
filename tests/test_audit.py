"""The audit as a user meets it: a call, a command, a saved gradient, a page, and an error for each wrong input."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.cli import ConfigError
from safetensors.numpy import save_file
from test_sweep import command_of

import gdiff_jax as gd
from experiments import audit as command
from gdiff_jax.auditing import figures, page, pictures
from gdiff_jax.matching import victim_gradient
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise

MODEL = """
import jax, jax.numpy as jnp

def loss(params, x, y):
    axes = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x[None], params["conv"]["kernel"], (4, 4), "SAME", dimension_numbers=axes)
    h = jnp.tanh(h + params["conv"]["bias"].reshape(1, 1, 1, -1)).reshape(-1)
    logits = h @ params["out"]["kernel"] + params["out"]["bias"]
    return -jax.nn.log_softmax(logits)[y]

def make():
    k = jax.random.split(jax.random.key(3), 2)
    return loss, {
        "conv": {"kernel": 0.3 * jax.random.normal(k[0], (5, 5, 3, 6)), "bias": jnp.zeros(6)},
        "out": {"kernel": 0.3 * jax.random.normal(k[1], (96, 10)), "bias": jnp.zeros(10)},
    }

def mlp():
    k = jax.random.split(jax.random.key(4), 2)
    mean = jnp.array([0.4, 0.5, 0.6]).reshape(1, 1, 3)
    def mlp_loss(params, x, y):
        h = jnp.tanh(((x + 1) / 2 - mean).reshape(-1) / 0.25 @ params["a"]["w"] + params["a"]["b"])
        return -jax.nn.log_softmax(h @ params["z"]["w"] + params["z"]["b"])[y]
    return mlp_loss, {
        "a": {"w": 0.03 * jax.random.normal(k[0], (768, 20)), "b": jnp.zeros(20)},
        "z": {"w": 0.3 * jax.random.normal(k[1], (20, 10)), "b": jnp.zeros(10)},
    }

def no_pair(): return 3
def fails(): raise RuntimeError("no such checkpoint")
def vector(): return (lambda p, x, y: p["w"] * x.sum(), {"w": jnp.ones(3)})
def integer(): return (lambda p, x, y: p["w"].sum() * 1.0, {"w": jnp.ones(3, jnp.int32)})
def no_array(): return (lambda p, x, y: 1.0, {"w": 1.0})
def blind(): return (lambda p, x, y: (p["w"] ** 2).sum(), {"w": jnp.ones(3)})
def constant(): return (lambda p, x, y: x.sum() + 0 * p["w"].sum(), {"w": jnp.ones(3)})
def infinite(): return (lambda p, x, y: (jnp.sqrt(p["w"]) * x.sum()).sum(), {"w": jnp.zeros(3)})
def sometimes(): return (lambda p, x, y: jnp.where(y == 0, 1.0, jnp.inf) * (p["w"] * x.sum()).sum(), {"w": jnp.ones(3)})
def wrong_shape(): return (lambda p, x, y: (x.reshape(99, -1) @ p["w"]).sum(), {"w": jnp.ones(3)})
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "own_model.py"
    path.write_text(MODEL)
    return path


def functions(model):
    names = {}
    exec(model.read_text(), names)
    return names


def config(tiny_prior, model, out, **changes):
    tiny = command.AuditConfig(
        victim=f"{model}:make",
        images=str(tiny_prior / "images.npz"),
        num_images=3,
        sigma_grid=(0.0, 0.1),
        prior=str(tiny_prior / "prior"),
        steps=4,
        batch=4,
        out=str(out),
    )
    return dataclasses.replace(tiny, **changes)


@pytest.fixture(scope="session")
def small(tiny_prior, model, tmp_path_factory):
    """The folder of a small audit, made by its command."""
    changes = dict(mechanism="clip:1+gaussian", sigma_grid=(0, 0.1, 1), methods=("dsg", "calibrated-mean"))
    c = config(tiny_prior, model, tmp_path_factory.mktemp("audit") / "out", **changes)
    flags = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in dataclasses.asdict(c).items()]
    done = subprocess.run([*command_of("audit.py"), *flags], check=True, capture_output=True, text=True)
    assert "report.html" in done.stdout
    assert "images are recovered" in done.stdout
    return Path(c.out)


def test_the_call_and_the_command_find_the_same(small, tiny_prior, model):
    loss, params = functions(model)["make"]()
    data = np.load(tiny_prior / "images.npz")
    prior = gd.load_prior(str(tiny_prior / "prior"))
    clipped = lambda sigma: Chain((Clip(1.0), GaussianNoise(sigma)))
    options = dict(prior=prior, sigmas=(0.1, 0, 1), mechanism=clipped, steps=4, batch=4, candidates=data["images"])
    options["methods"] = ("dsg", "calibrated-mean")
    found = gd.audit(loss, params, data["images"][:3], data["labels"][:3], progress=False, **options)
    theirs = gd.Audit.load(small / "audit.json")
    key = lambda r: (r["method"], r["sigma"] or 0, r["image"], r["seed"])
    ours, other = (sorted(a.trials, key=key) for a in (found, theirs))
    assert [key(r) for r in ours] == [key(r) for r in other]
    assert len(ours) == 3 * 2 * (1 + 2 * 3)
    for a, b in zip(ours, other, strict=True):
        for name in ("psnr", "ssim", "mse", "rank", "leak", "failed"):
            assert a[name] == pytest.approx(b[name], rel=2e-3), name
        if a["method"] != "prior-only":
            assert a["distance"] == pytest.approx(b["distance"], rel=2e-3)
    assert found.guarantees == theirs.guarantees
    assert found.about["clip_norm"] == theirs.about["clip_norm"] == 1
    assert "Clip(norm=1.0), GaussianNoise(sigma=sigma)" in found.about["mechanism"]
    assert found.guarantees[1]["epsilon"] > 0
    assert found.theory["rv"] == pytest.approx(theirs.theory["rv"], rel=1e-4)
    assert "<table>" in found._repr_html_()
    assert "Audit of the model" in repr(found)


def test_every_figure_follows_from_the_json(small, tmp_path):
    flags = [f"--from_json={small / 'audit.json'}", f"--out={tmp_path / 'again'}"]
    subprocess.run([*command_of("audit.py"), *flags], check=True, capture_output=True)
    made = sorted(p.relative_to(small) for p in small.rglob("*") if p.is_file() and "sweep" not in p.parts)
    again = sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert made == again
    for name in made:
        assert (small / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    audit = gd.Audit.load(small / "audit.json")
    drawn = {p.stem for p in (small / "figures").iterdir()}
    assert drawn == set(figures.drawings(audit))
    assert {"reconstructions", "quality", "recovered", "epsilon", "steps", "signal", "film", "layers", "spectrum"} <= drawn
    # And each of them answers to the data: other numbers, another figure.
    worse = lambda r: {**r, "psnr": r["psnr"] and r["psnr"] + 1, "rank": 1, "noise_norm": 2 * (r.get("noise_norm") or 0)}
    theory = {**audit.theory, "shares": {k: v / 2 for k, v in audit.theory["shares"].items()}}
    theory["spectra"] = [{**s, "eigenvalues": [2 * v for v in s["eigenvalues"]]} for s in theory["spectra"]]
    black = {k: pictures.png(np.zeros((16, 16, 3))) for k in audit.pictures}
    halved = {k: {**c, "signal": [v and v / 2 for v in c["signal"]]} if "signal" in c else c for k, c in audit.curves.items()}
    other = dataclasses.replace(
        audit, trials=[worse(r) for r in audit.trials], theory=theory, pictures=black, curves=halved
    )  # fmt: skip
    before, after = figures.files(audit), figures.files(other)
    assert all(before[name] != after[name] for name in before)


def test_the_page_is_whole_and_asks_for_nothing(small):
    text = (small / "report.html").read_text()
    assert len(text) < 5e6
    assert "default-src 'none'" in text
    outside = [u for u in re.findall(r'(?:src|href)="([^"]+)"', text) if not u.startswith(("data:", "#"))]
    assert outside == []
    for svg in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text):
        inner = base64.b64decode(svg).decode()
        assert not re.findall(r'href="(?!#|data:)', inner)
    for words in ("What the attacker has", "clip:1+gaussian", "γ(κ)", "Cramér-Rao", "python", "What this does not say"):
        assert words in text


def test_the_page_escapes_what_it_is_told(small):
    audit = gd.Audit.load(small / "audit.json")
    hostile = dataclasses.replace(audit, about={**audit.about, "victim": "<script>alert(1)</script>"})
    text = page.render(hostile, figures.files(hostile))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_an_audit_goes_on_where_it_was_ended(tiny_prior, model, tmp_path):
    c = config(tiny_prior, model, tmp_path / "out", num_images=2, seeds=1, methods=("dsg",), spectra=0)
    first = command.run(c, True)
    chunks = sorted((tmp_path / "out" / "sweep" / "chunks").glob("*.jsonl"))
    times = [p.stat().st_mtime_ns for p in chunks]
    chunks[1].unlink()
    second = command.run(c, True)
    assert [p.stat().st_mtime_ns for i, p in enumerate(chunks) if i != 1] == [t for i, t in enumerate(times) if i != 1]
    untimed = lambda audit: [{k: v for k, v in r.items() if k != "seconds"} for r in audit.trials]
    assert untimed(first) == untimed(second)
    assert first.curves == second.curves


def test_groups_are_scored_image_by_image(tiny_prior, model, tmp_path):
    c = config(tiny_prior, model, tmp_path / "out", victim="mlp", num_images=4, group=2, seeds=1, methods=("dsg",))
    found = command.run(c, True)
    assert [r["leak"] for r in found.at(0.0)] == [0, 0, 2, 2]
    assert found.theory is None
    found.report(tmp_path / "out")
    assert "4 images" not in found.verdict()
    assert "2 groups of 2 images" in found.verdict()


def test_a_first_dense_layer_is_found_and_read_off(tiny_prior, model, tmp_path):
    """Behind a normalisation of the user's own; it gives the image away exactly, which no default may overlook."""
    few = dict(num_images=2, seeds=1, spectra=0)
    found = command.run(config(tiny_prior, model, tmp_path / "out", victim=f"{model}:mlp", **few), True)
    assert found.methods == ["dsg", "calibrated-mean", "analytic", "analytic-dsg"]
    assert min(r["psnr"] for r in found.at(0.0) if r["method"] == "analytic") > 60
    assert found.levels()[0].methods == "analytic 2"  # and the attacker chooses it
    without = command.run(config(tiny_prior, model, tmp_path / "conv", **few), True)
    assert without.methods == ["dsg", "calibrated-mean"]


@pytest.mark.parametrize(
    "flags", [dict(attacker="eavesdropper", victim="mlp"), dict(mechanism="soteria:0.4+gaussian", victim="mlp")]
)
def test_an_audit_runs_by_default_what_its_attacker_can(flags):
    """Who does not know the noise cannot draw from it."""
    assert command.sweep_config(command.AuditConfig(**flags)).methods == ("dsg", "dps")
    assert command.sweep_config(command.AuditConfig()).methods == ("dsg", "calibrated-mean")


def torch_layout(tree):
    """What a torch network of the same shape saves, its flattened map in the order (C, H, W)."""
    out = np.asarray(tree["out"]["kernel"]).reshape(4, 4, 6, 10).transpose(2, 0, 1, 3).reshape(96, 10)
    conv = np.asarray(tree["conv"]["kernel"]).transpose(3, 2, 0, 1)
    arrays = {"conv.weight": conv, "conv.bias": tree["conv"]["bias"], "out.weight": out.T, "out.bias": tree["out"]["bias"]}
    return {k: np.ascontiguousarray(v) for k, v in arrays.items()}


@pytest.fixture
def saved(model, tiny_prior, tmp_path):
    """The gradient of the first image, as a flax .npz and in torch's layout."""
    loss, params = functions(model)["make"]()
    data = np.load(tiny_prior / "images.npz")
    x = jnp.asarray(data["images"][0] / np.float32(127.5) - 1)
    g = victim_gradient(loss, params, x, jnp.asarray(data["labels"][0]))
    flat = {f"params/{layer}/{k}": np.asarray(v) for layer, arrays in g.items() for k, v in arrays.items()}
    np.savez(tmp_path / "flax.npz", **flat)
    save_file(torch_layout(g), tmp_path / "torch.safetensors")
    return tmp_path


def test_a_saved_gradient_is_attacked_whichever_layout_it_has(tiny_prior, model, saved):
    common = dict(sigma_grid=(0.0,), seeds=2, methods=("dsg",), label=0)
    ways = {
        "own": dict(num_images=1),
        "flax": dict(gradient=str(saved / "flax.npz")),
        "torch": dict(gradient=str(saved / "torch.safetensors"), flattened=("out.kernel:6x4x4",)),
    }
    found = {n: command.run(config(tiny_prior, model, saved / n, **common, **w), True) for n, w in ways.items()}
    distances = {n: [r["distance"] for r in a.attacks] for n, a in found.items()}
    assert distances["flax"] == pytest.approx(distances["own"], rel=1e-3)
    assert distances["torch"] == pytest.approx(distances["own"], rel=1e-3)
    # The order of the rows matters: taken as they are they are another gradient.
    wrong = dict(gradient=str(saved / "torch.safetensors"), flattened=("out.kernel:as-is",))
    assert [r["distance"] for r in command.run(config(tiny_prior, model, saved / "w", **common, **wrong), True).attacks] != (
        pytest.approx(distances["own"], rel=1e-3)
    )


def test_a_saved_gradient_of_an_unknown_image(tiny_prior, model, saved):
    c = config(tiny_prior, model, saved / "out", gradient=str(saved / "flax.npz"), sigma_grid=(0.0,), label=0, seeds=3)
    c = dataclasses.replace(c, images="cifar10-test-64")  # the default, of another size than the prior's: not looked at
    found = command.run(c, False)
    assert not found.has_truth
    assert all(r["psnr"] is None and r["distance"] > 0 for r in found.attacks)
    assert "explains it up to" in found.verdict()
    text = found.report(saved / "out").read_text()
    assert "What the attacks made of the gradient" in text
    assert "recovered" not in text.split("What this does not say")[0].split("</nav>")[1]


def test_weights_from_a_file_are_those_that_are_attacked(tiny_prior, model, tmp_path):
    _, params = functions(model)["make"]()
    other = jax.tree.map(lambda p: 2 * p + 0.01, params)
    save_file(torch_layout(other), tmp_path / "w.safetensors")
    c = config(tiny_prior, model, tmp_path, weights=str(tmp_path / "w.safetensors"), flattened=("out.kernel:6x4x4",))
    loaded = command.load(c, command.sweep_config(c), True).params[c.victim, 0]
    flat = {f"{layer}.{k}": v for layer, arrays in other.items() for k, v in arrays.items()}
    assert loaded.keys() == flat.keys()
    for name, value in flat.items():
        np.testing.assert_allclose(loaded[name], value, rtol=1e-6)


def bad_files(folder, model):
    _, params = functions(model)["make"]()
    flat = {f"{layer}.{k}": np.asarray(v) for layer, arrays in params.items() for k, v in arrays.items()}
    np.savez(folder / "missing.npz", **{k: v for k, v in flat.items() if k != "out.bias"})
    np.savez(folder / "extra.npz", **flat, other=np.zeros(3))
    np.savez(folder / "shape.npz", **{**flat, "out.bias": np.zeros(11)})
    np.savez(folder / "nan.npz", **{**flat, "out.bias": np.full(10, np.nan, np.float32)})
    np.savez(folder / "zero.npz", **{k: np.zeros_like(v) for k, v in flat.items()})
    save_file(torch_layout(params), folder / "torch.safetensors")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    (folder / "empty").mkdir()
    (folder / "audit.json").write_text("{}")


G = dict(sigma_grid=(0.0,), label=0)
# What is wrong, whether --images was given, and words of the one line that says so: the value and the remedy.
WRONG = [
    (dict(victim="resnet99"), True, ["resnet99", "known:"]),
    (dict(victim="{d}/nowhere.py:make"), True, ["nowhere.py", "cannot be imported"]),
    (dict(victim="no_such_module:make"), True, ["no_such_module", "cannot be imported"]),
    (dict(victim="{m}:nothing"), True, ["nothing", "it has", "make"]),
    (dict(victim="{m}:fails"), True, ["fails() failed", "no such checkpoint"]),
    (dict(victim="{m}:no_pair"), True, ["must return (loss, params)"]),
    (dict(victim="{m}:vector"), True, ["(3,)", "floating scalar is needed"]),
    (dict(victim="{m}:integer"), True, ["int32", "floating arrays"]),
    (dict(victim="{m}:no_array"), True, ["params.w", "float", "not an array"]),
    (dict(victim="{m}:blind"), True, ["does not depend on the image"]),
    (dict(victim="{m}:constant"), True, ["gradient is zero"]),
    (dict(victim="{m}:infinite"), True, ["no finite gradient"]),
    (dict(victim="{m}:sometimes"), True, ["2 of 3 images (1, 2, counted from 0)"]),
    (dict(victim="{m}:wrong_shape"), True, ["loss(params, x, y) failed", "(16, 16, 3)"]),
    (dict(training_steps=5), True, ["--training_steps", "weights that its function returns"]),
    (dict(attacker="server"), True, ["--labels=inferred", "built-in networks only"]),
    (dict(mechanism="soteria:0.5"), True, ["soteria:0.5", "built-in networks only"]),
    (dict(attacker="friend"), True, ["friend", "informed"]),
    (dict(mechanism="blur:3"), True, ["blur", "gaussian"]),
    (dict(mechanism="clip"), True, ["the norm, above 0", "clip:1"]),
    (dict(methods=("magic",)), True, ["magic", "dsg"]),
    (dict(sigma_grid=(-1.0,)), True, ["-1.0", ">= 0"]),
    (dict(epsilon_grid=(1.0,)), True, ["--epsilon_grid", "clip:1+gaussian"]),
    (dict(delta=2.0), True, ["2.0", "(0, 1)"]),
    (dict(threshold=float("nan")), True, ["nan", "such as 20"]),
    (dict(share=1.5), True, ["1.5", "such as 0.1"]),
    (dict(spectra=-1), True, ["-1", "0 leaves"]),
    (dict(seeds=0), True, ["--seeds 0", "at least 1"]),
    (dict(num_images=99), True, ["99", "holds 6", "fewer"]),
    (dict(num_images=3, group=2), True, ["not a multiple", "4"]),
    (dict(label=99), True, ["99", "--num_classes"]),
    (dict(steps=5000), True, ["5000", "fewer"]),
    (dict(images="{d}/nowhere"), True, ["nowhere", "do not exist"]),
    (dict(images="{d}/empty"), True, ["empty", "no picture"]),
    (dict(prior="{d}/nowhere"), True, ["--prior", "nowhere"]),
    (dict(prior="cifar10-32"), True, ["(16, 16, 3)", "(32, 32, 3)", "--prior"]),
    (dict(candidates="{d}/nowhere"), True, ["--candidates", "nowhere"]),
    (dict(data="{d}/nowhere"), True, ["--data", "nowhere"]),
    (dict(weights="{d}/nowhere.npz"), True, ["--weights", "nowhere.npz", "give a"]),
    (dict(weights="{d}/missing.npz"), True, ["missing: out.bias"]),
    (dict(weights="{d}/extra.npz"), True, ["not of the victim: other"]),
    (dict(weights="{d}/shape.npz"), True, ["(11,)", "(10,)"]),
    (dict(weights="{d}/nan.npz"), True, ["not finite: out.bias"]),
    (dict(weights="{d}/broken.npz"), True, ["--weights", "cannot be read"]),
    (dict(weights="{d}/broken.safetensors"), True, ["--weights", "cannot be read"]),
    (dict(weights="{d}/torch.safetensors"), True, ["--flattened=out.kernel:CxHxW"]),
    (dict(weights="{d}/torch.safetensors", flattened=("out.kernel:5x4x4",)), True, ["96 rows", "80"]),
    (dict(weights="{d}/torch.safetensors", flattened=("out.kernel",)), True, ["out.kernel", "such as"]),
    (dict(weights="{d}/torch.safetensors", flattened=("in.kernel:1x1x1",)), True, ["in.kernel", "it has", "out.kernel"]),
    (dict(weights="{d}/torch.safetensors", training_steps=3), True, ["leave one away"]),
    (dict(flattened=("out.kernel:6x4x4",)), True, ["--flattened", "--gradient with it"]),
    (dict(gradient="{d}/zero.npz", **G), True, ["zero everywhere"]),
    (dict(gradient="{d}/missing.npz", **G), True, ["--gradient", "missing: out.bias"]),
    (dict(gradient="{d}/zero.npz", sigma_grid=(0.0,)), False, ["--label"]),
    (dict(gradient="{d}/zero.npz", sigma_grid=(0.0,), label=99), False, ["--label 99", "0..9"]),
    (dict(gradient="{d}/zero.npz", label=0), True, ["--sigma_grid names 2", "--sigma_grid=0"]),
    (dict(gradient="{d}/zero.npz", group=3, **G), True, ["--group 3"]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda i: f"{i}-{next(iter(WRONG[i][0]))}")
def test_a_wrong_input_is_named_with_its_remedy_before_anything_is_computed(number, tiny_prior, model, tmp_path):
    changes, images_given, words = WRONG[number]
    bad_files(tmp_path, model)
    put = lambda v: v.format(d=tmp_path, m=model) if isinstance(v, str) else v
    c = config(tiny_prior, model, tmp_path / "out", **{k: put(v) for k, v in changes.items()})
    with pytest.raises(ConfigError) as error:
        command.run(c, images_given)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--from_json=nowhere.json"], "nowhere.json"),
        (["--sigma=0"], "sigma"),
        (["--sigma_grid=a,b"], "list of float"),
        (["victim=cnn"], "is not a flag"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, words, tmp_path):
    done = subprocess.run([*command_of("audit.py"), *flags, f"--out={tmp_path / 'o'}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


LOSS = lambda params, x, y: (params["w"] * jnp.sin(x)).sum()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(images=np.zeros((2, 8, 8, 3))), "resize"),
        (dict(images=np.full((2, 16, 16, 3), 7.0)), r"2 \* x - 1"),
        (dict(labels=np.zeros(3)), "one for each of 2"),
        (dict(sigmas=()), "standard deviations"),
        (dict(sigmas=(-1,)), "standard deviations"),
        (dict(methods=("dlg",)), "dsg, dps"),
        (dict(seeds=0), "seeds 0"),
        (dict(share=0), "share 0"),
        (dict(threshold=np.inf), "threshold inf"),
        (dict(steps=5000), "ask for fewer"),
        (dict(params={}), "no array"),
        (dict(params={"w": 1.0}), "float"),
        (dict(loss=lambda p, x, y: p["w"] * x), "floating scalar"),
    ],
)
def test_the_call_says_what_is_wrong(changes, words, tiny_prior):
    given = dict(loss=LOSS, params={"w": jnp.ones((16, 16, 3))}, images=np.zeros((2, 16, 16, 3), np.uint8), labels=np.zeros(2))
    given |= changes
    args = [given.pop(name) for name in ("loss", "params", "images", "labels")]
    with pytest.raises(ValueError, match=words):
        gd.audit(*args, prior=str(tiny_prior / "prior"), progress=False, **given)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
@pytest.mark.parametrize("width", [1280, 390])
def test_chromium_shows_the_page_without_errors(small, width, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get("data:,")  # leave the browser's own first page, and what it asks for
        driver.get_log("performance")
        driver.get((small / "report.html").as_uri())
        assert driver.get_log("browser") == []
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        broken = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.alt)"
        assert driver.execute_script(broken) == []
        assert driver.execute_script("return document.images.length") >= 7
        asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
        assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
    finally:
        driver.quit()


def test_the_model_of_the_documentation_is_audited(tiny_prior, tmp_path):
    """The file that docs/audit.md shows, as it is but for the size of the test's images."""
    text = (Path(__file__).parents[1] / "docs" / "audit.md").read_text()
    code = textwrap.dedent(re.search(r"```python\n(# my_model.py.*?)```", text, re.DOTALL)[1])
    assert "8 * 8 * 32" in code
    (tmp_path / "my_model.py").write_text(code.replace("8 * 8 * 32", "4 * 4 * 32"))
    c = config(tiny_prior, tmp_path / "my_model.py", tmp_path / "out", num_images=2, seeds=1, methods=("dsg",), spectra=0)
    found = command.run(c, True)
    assert found.about["parameters"] == 27 * 16 + 16 + 9 * 16 * 32 + 32 + 512 * 10 + 10
    assert sys.modules["my_model"].Net is not None
