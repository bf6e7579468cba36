"""How far attacks are from the limit, by its command, on a tiny prior."""

import json
import sys

import numpy as np
import pytest
from tiny import ROOT, plan_of, run_command

from benchmarks import limits
from gdiff_jax.sweeping.config import PrivateImages
from gdiff_jax.sweeping.plan import VictimState
from gdiff_jax.theory import summary


def run(prior, out, *flags):
    inputs = [f"--prior={prior}/prior", f"--images={prior}/images.npz", "--num_images=2", "--steps=3", f"--out={out}"]
    return run_command([sys.executable, str(ROOT / "benchmarks" / "limits.py"), *inputs, *flags])


@pytest.mark.long
def test_the_limit_stands_beside_what_attacks_reach(tiny_prior, tmp_path):
    out, data = tmp_path / "out", f"--data={tiny_prior}/images.npz"
    flags = ("--victims=mlp-narrow", "--training_steps=0", "--sigma_grid=0,0.1", data)
    done = run(tiny_prior, out, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (out / "summary.md").read_text()
    assert table.strip() in done.stdout
    lines = [[cell.strip() for cell in line.split("|")[3:-1]] for line in table.splitlines() if line.startswith("|")]
    limit, auto, short = (next(rest for what, *rest in lines if what == n) for n in ("limit", "auto", "limit less auto"))
    assert limit[0] == short[0] == "-"  # there is none without noise
    assert float(auto[0]) > 100

    plan = plan_of(tiny_prior, num_images=1, victims=("mlp-narrow",))
    victim, params = plan.victims["mlp-narrow"], plan.params[VictimState("mlp-narrow", 0)]
    with np.load(tiny_prior / "images.npz") as images:
        information = summary.prior_information(images["images"])
    (exact,) = summary.exact_spectra(victim.loss, params, plan.images[:1], plan.labels[:1], [0.1], information)
    expected = 10 * np.log10(4 * plan.images[0].size / exact["van_trees"][0])
    assert float(limit[1]) == pytest.approx(expected, abs=0.06)
    first = next(
        row["psnr"] for row in map(json.loads, (out / "sweep" / "records.jsonl").read_text().splitlines())
        if (row["method"], row["sigma"], row["image"]) == ("auto", 0.1, 0)
    )  # fmt: skip
    assert float(short[1]) == pytest.approx(expected - first, abs=0.06)
    assert (out / "limits.png").stat().st_size > 10_000


def test_what_failed_or_does_not_fit_is_left_out(tmp_path):
    config = limits.LimitConfig(
        victims=("mlp", "cnn"), training_steps=(0,), sigma_grid=(0.1,), methods=("analytic-mean", "dsg"), limit_images=2,
        private=PrivateImages(num_images=2),
    )  # fmt: skip
    row = lambda victim, method, image, psnr: {
        "victim": victim, "training_steps": 0, "mechanism": "gaussian", "method": method, "sigma": 0.1, "image": image,
        "psnr": psnr, "failed": psnr is None,
    }  # fmt: skip
    rows = [row("mlp", "analytic-mean", 0, None), row("mlp", "analytic-mean", 1, 25.0)]
    rows += [row(victim, "dsg", image, 20.0) for victim in config.victims for image in range(2)]
    found = {VictimState(victim, 0): np.array([[30.0], [32.0]]) for victim in config.victims}
    table = limits.distance_table(config, rows, found)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    short = {cell[0]: cell[3] for cell in cells if cell[2] == "limit less analytic-mean"}
    assert short == {"mlp": "7.0", "cnn": "-"}
    limits.plot(config, rows, found, {"prior only": 8.0}, tmp_path / "limits.png")
    assert (tmp_path / "limits.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--sigma_grid=0.1", "--data is needed"),
        ("--limit_images=3", "--limit_images 3 must lie in 1..2"),
        ("--victims=cnn-batchnorm --training_steps=0", "BatchNorm sees a batch"),
    ],
)
def test_bad_input_ends_with_one_line(tiny_prior, tmp_path, flag, words):
    data = [] if "data" in words else [f"--data={tiny_prior}/images.npz"]
    done = run(tiny_prior, tmp_path / "out", *flag.split(), *data)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()
