"""The three studies by their commands, on a tiny prior; their statistics by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from objectives import float32
from tiny import command_of, ended, run_command, script

from experiments import (
    calibration_report,
    calibration_study,
    noise_study,
    vulnerability,
    vulnerability_outcomes,
    vulnerability_report,
)
from experiments.calibration_study import CalibrationConfig, with_attacks
from experiments.vulnerability_config import VulnerabilityConfig
from experiments.vulnerability_theory import PriorKnowledge
from gdiff_jax import options, victims
from gdiff_jax.errors import ConfigError
from gdiff_jax.mechanisms.text import parse
from gdiff_jax.sweeping import inputs
from gdiff_jax.sweeping.records import Store


def flags_of(prior, out):
    inputs = [f"--prior={prior}/prior", f"--images={prior}/images.npz"]
    return [*inputs, "--steps=4", f"--out={out}", "--batch=2", "--num_images=2"]


def run(script, prior, out, *flags):
    return run_command([*command_of(script), *flags_of(prior, out), *flags])


VULNERABILITY = (
    "--victims=mlp-narrow,mlp-shallow,mlp-tanh,lenet-narrow", "--sigma_grid=0,0.1", "--spectrum_images=1", "--gap_images=2",
    "--probes=8",
)  # fmt: skip


@pytest.mark.long
def test_the_study_of_vulnerability(tiny_prior, tmp_path):
    flags = (*VULNERABILITY, f"--data={tiny_prior}/images.npz")
    first = run("vulnerability.py", tiny_prior, tmp_path / "out", *flags)
    assert first.returncode == 0, first.stderr[-3000:]
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert [v["victim"] for v in results["victims"]] == ["mlp-narrow", "mlp-shallow", "mlp-tanh", "lenet-narrow"]
    rows = [json.loads(line) for line in (out / "untrained" / "records.jsonl").read_text().splitlines()]
    for v in results["victims"]:
        mine = [r["psnr"] for r in rows if (r["victim"], r["sigma"]) == (v["victim"], 0.1)]
        assert v["psnr"][1] == pytest.approx(np.median(mine))
        # The matrix-free norm of the first image beside the exact one, from two independent computations.
        assert v["frobenius"][0] == pytest.approx(v["spectra"][0]["frobenius_exact"], abs=5 * v["frobenius_error"][0])
        assert v["rv"][0] == max(v["frobenius"])
        assert sum(v["shares"].values()) == pytest.approx(1, abs=1e-4)
        assert 0 < v["spectra"][0]["van_trees"][0] <= (v["spectra"][0]["cramer_rao"][0] or np.inf)
    rv = [v["rv"][0] for v in results["victims"]]
    psnr = [v["psnr"][0] for v in results["victims"]]
    assert results["correlations"]["RV = max ‖J‖_F"]["all"][0][0] == pytest.approx(scipy.stats.spearmanr(rv, psnr).statistic)
    summary = (out / "summary.md").read_text()
    assert all(word in summary for word in ("Spearman", "Theorem 2", "Theorem 1", "van Trees", "lenet-narrow"))
    assert (out / "scatter.png").stat().st_size > 10_000
    assert (out / "families.png").stat().st_size > 10_000
    # Again: nothing is computed a second time, and the figures are the same.
    (out / "theory" / "mlp-shallow-0.json").unlink()
    times = {f: f.stat().st_mtime_ns for f in [*out.rglob("*/chunks/*"), *out.glob("theory/*")]}
    assert run("vulnerability.py", tiny_prior, out, *flags).returncode == 0
    assert all(f.stat().st_mtime_ns == t for f, t in times.items())
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.long
def test_the_study_of_noise(tiny_prior, tmp_path):
    flags = ("--victims=mlp-narrow", "--sigma_grid=0.1", "--defences=none,topk:0.1,sign", "--clients=4")
    result = run("noise_study.py", tiny_prior, tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {u["mechanism"]: u["utility"] for u in json.loads((tmp_path / "out" / "utilities.json").read_text())}
    assert set(found) == {"gaussian", "laplace", "uniform", "none", "topk:0.1", "sign"}
    assert found["none"] == pytest.approx(1, abs=1e-6)
    assert max(found[k] for k in ("topk:0.1", "sign", "gaussian")) < 0.999
    # Noise of equal variance has the same utility, up to the draw.
    assert found["gaussian"] == pytest.approx(found["laplace"], abs=0.05)
    assert (tmp_path / "out" / "noise_study.png").stat().st_size > 10_000


VULNERABILITY_STUDY = script(VulnerabilityConfig(), vulnerability.main)
NOISE_STUDY = script(noise_study.NoiseConfig(), noise_study.main)
BAD = [
    (VULNERABILITY_STUDY, "--victims=mlp,lenet,cnn", "at least 4"),
    (VULNERABILITY_STUDY, "--probes=1", "--probes 1"),
    (VULNERABILITY_STUDY, "--trained=mlp", "gdiff-train-victim"),
    (NOISE_STUDY, "--defences=gaussian", "adds noise"),
    (NOISE_STUDY, "--defences=topk:2", "--defences: mechanism 'topk:2'"),
    (NOISE_STUDY, "--sigma_grid=", "no value stands after the ="),
    (NOISE_STUDY, "--clients=0", "--clients 0"),
    (NOISE_STUDY, "--clients=7", "7"),
]


@pytest.mark.parametrize(("study", "flag", "value"), BAD)
def test_bad_input_ends_with_one_line(tiny_prior, tmp_path, study, flag, value, monkeypatch, capsys):
    assert ended(study, monkeypatch, *flags_of(tiny_prior, tmp_path / "out"), flag) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert value in said
    assert not (tmp_path / "out").exists()


def test_rank_correlation_and_its_interval():
    x = np.arange(30.0)
    rng = np.random.default_rng(0)
    assert vulnerability_outcomes.spearman(x, np.exp(x)) == pytest.approx((1, 1, 1))
    value, low, high = vulnerability_outcomes.spearman(x, x + 15 * rng.normal(size=30))
    assert value == pytest.approx(scipy.stats.spearmanr(x, x + 15 * np.random.default_rng(0).normal(size=30)).statistic)
    assert low < value < high
    # The width is about that of Fisher's z-transform.
    z = np.arctanh(value)
    expected = np.tanh(z + 1.96 / 27**0.5) - np.tanh(z - 1.96 / 27**0.5)
    assert high - low == pytest.approx(expected, rel=0.5)
    assert np.isnan(vulnerability_outcomes.spearman(x[:3], x[:3])[0])
    assert np.isnan(vulnerability_outcomes.spearman(np.ones(9), x[:9])[0])


def test_utility_by_hand(random_params):
    """Of top-k over three clients, from single gradients."""
    victim = victims.mlp((16, 16, 3), 10, widths=(8,))
    params = random_params(victim)
    rng = np.random.default_rng(0)
    x, y = float32(rng.uniform(-1, 1, (3, 16, 16, 3))), jnp.array([1, 2, 3])
    gradient = jax.jit(jax.grad(victim.loss))
    gradients = [jax.device_get(gradient(params, a, b)) for a, b in zip(x, y, strict=True)]
    vectors = np.stack([np.concatenate([v.ravel() for v in jax.tree.leaves(g)]) for g in gradients])
    kept = np.where(np.abs(vectors) >= np.sort(np.abs(vectors), axis=1)[:, [-round(0.1 * vectors.shape[1])]], vectors, 0)
    a, b = vectors.mean(0), kept.mean(0)
    at = noise_study.utility(jax.random.key(0), parse("topk:0.1"), victim, params, x, y)
    assert float(at(jnp.float32(0))) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_equal_utility_interpolates_between_measured_strengths():
    row = lambda mechanism, sigma, psnr: {
        "victim": "cnn", "training_steps": 0, "mechanism": mechanism, "method": "dsg", "sigma": sigma, "psnr": psnr,
        "failed": False,
    }  # fmt: skip
    rows = [row("none", 0.0, 30.0), row("gaussian", 0.1, 20.0), row("gaussian", 1.0, 10.0), row("sign", 0.0, 15.0)]
    found = {("none", 0.0): 1.0, ("gaussian", 0.1): 0.9, ("gaussian", 1.0): 0.5, ("sign", 0.0): 0.7}
    found = {("cnn", *key): value for key, value in found.items()}
    c = options.replace(noise_study.NoiseConfig(), utilities=(0.95, 0.7, 0.4))
    lines = noise_study.equal_utility_table(c, rows, found).splitlines()[2:]
    assert [cell.strip() for cell in lines[0].split("|")[2:6]] == ["gaussian", "25.0", "15.0", "-"]
    assert len(lines) == 1  # sign has no strength that could be changed to another utility


def measured(name, scale, exact):
    """What `measure_victim` returns, made up; a spectrum that is estimated has neither median nor limits."""
    spectrum = {"lambda_max": 4.0 * scale, "lambda_min": 0.1 * scale, "effective_rank": 7.0 * scale}
    if exact:
        spectrum |= {"lambda_median": scale, "cramer_rao": [None], "van_trees": [0.5]}
    gap = {"index": 1, "gap": [3.0, 0.5], "m1": [1.0, 0.1], "trace_covariance": [2.0, 0.1]}
    gap |= {"frobenius_at_x0hat": 2.0, "at_x0hat": 1.0}
    return {
        "victim": name, "training_steps": 0, "parameters": 10, "gradient_norm": [1.0], "rv": [scale, 0.1], "frobenius": [scale],
        "shares": {}, "spectrum_is_exact": exact, "spectra": [spectrum], "jensen": [gap],
    }  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
def test_the_report_of_singular_and_of_estimated_spectra(exact, tmp_path):
    """Images too large for the whole J^T J: what is not known is left out, an upper bound is not called lambda_min."""
    names = ("mlp", "lenet", "cnn", "resnet", "vit")
    c = options.replace(VulnerabilityConfig(), sigma_grid=(0.0, 0.1), spectrum_images=1, num_images=1)
    rows = [
        {"victim": n, "training_steps": 0, "sigma": s, "image": 0, "psnr": 10.0 + k, "mse": 0.1, "failed": False}
        for k, n in enumerate(names) for s in c.sigma_grid
    ]  # fmt: skip
    knowledge = PriorKnowledge(
        None, [1.0, 2.0], [1.0, 4.0], [0.9, 0.5], (1,), np.zeros((1, 2, 2, 1)), np.zeros((1, 2, 2, 2, 1))
    )
    store = Store(tmp_path / "out", {})
    store.open()
    vulnerability_report.write(c, rows, [measured(n, k + 1.0, exact) for k, n in enumerate(names)], knowledge, 8.0, store)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["correlations"]
    assert found["RV = max ‖J‖_F"]["all"][0][0] == pytest.approx(1)
    assert found["lambda_min(J^T J)"]["all"][0][0] == (pytest.approx(1) if exact else None)
    limits = next(line for line in (tmp_path / "out" / "summary.md").read_text().splitlines() if line.startswith("| 0.1 "))
    cells = [cell.strip() for cell in limits.split("|")[1:-1]]
    # -10 log10(mse) = 10 dB; a total of 0.5 over 4 pixels is 15.05 dB; all five are singular.
    assert cells == (
        ["0.1", "10", "15.1", "0 of 5", "-", "0 of 0", "5"] if exact else ["0.1", "10", "-", "0 of 0", "-", "0 of 0", "0"]
    )


@pytest.mark.long
def test_the_study_of_calibration(tiny_prior, tmp_path):
    flags = ("--victims=mlp-narrow", "--sigma_grid=0.1,1", "--rates=0.2", "--zetas=4", "--untuned=calibrated-mean")
    result = run("calibration_study.py", tiny_prior, tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    scores = calibration_report.read_csv(tmp_path / "out" / "trials.csv")
    methods = {s.method for s in scores}
    assert methods == {"dsg", "dps", "calibrated-mean", "mean image"}
    assert len(scores) == len(methods) * 2 * 2
    store = tmp_path / "out" / "mlp-narrow-0" / "dps-4" / "chunks"
    rows = [json.loads(line) for file in sorted(store.glob("*.jsonl")) for line in file.read_text().splitlines()]
    theirs = {(r["sigma"], r["image"]): r["psnr"] for r in rows if r.get("method") == "dps"}
    ours = {(s.sigma, s.image): s.psnr for s in scores if s.method == "dps"}
    assert ours == {k: pytest.approx(v, abs=1e-3) for k, v in theirs.items()}
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "calibrated-mean at its worst is within" in summary
    again = ["--trials=" + str(tmp_path / "out" / "trials.csv"), f"--out={tmp_path}/again"]
    assert run_command([*command_of("calibration_study.py"), *again]).returncode == 0
    assert (tmp_path / "again" / "summary.md").read_text().split("\n\n", 1)[1] == summary.split("\n\n", 1)[1]
    for name in ("trials.csv", "calibration.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_plan_with_other_attacks_is_the_plan_that_would_be_loaded(tiny_prior):
    """So a study may load a victim once, and its folders are those of the sweeps themselves."""
    flags = dict(prior=f"{tiny_prior}/prior", images=f"{tiny_prior}/images.npz", num_images=2, steps=4)
    config = options.replace(CalibrationConfig(), rates=(0.4,), zetas=(4.0,), untuned=("dsg-mean",), **flags)
    first, *others = (config.sweep("mlp-narrow", setting) for setting in config.settings())
    plan = inputs.load(first)
    for sweep in others:
        mine, loaded = with_attacks(plan, sweep.attacks), inputs.load(sweep)
        assert (mine.identity, mine.methods, mine.distance) == (loaded.identity, loaded.methods, loaded.distance)


def score(method, strength, sigma, psnrs, victim="net"):
    return [calibration_report.Score("prior", victim, method, strength, sigma, i, p, 0.5, 1.0) for i, p in enumerate(psnrs)]


def test_an_untuned_attack_is_compared_with_the_best_tuned_one_of_each_noise():
    nan = float("nan")
    found = [
        *score("dsg", 0.2, 0.1, [20, 22, 24, 30]), *score("dsg", 0.4, 0.1, [23, 25, 27, 29]), *score("dps", 8.0, 0.1, [1] * 4),
        *score("dsg", 0.2, 1.0, [9] * 4), *score("dsg", 0.4, 1.0, [8] * 4), *score("dps", 8.0, 1.0, [10, 11, 12, nan]),
        *score("mine", None, 0.1, [24, 26, 26, 28]), *score("mine", None, 1.0, [12, 12, 12, 12]),
        *score("mean image", None, 0.1, [11, 12, 13, 14]), *score("mean image", None, 1.0, [11, 12, 13, 14]),
    ]  # fmt: skip
    victims = calibration_report.by_victim(found)
    cells = victims["net, prior"]
    assert calibration_report.oracle(cells, 0.1) == ("dsg", 0.4)
    assert calibration_report.oracle(cells, 1.0) == ("dps", 8.0)
    gaps = calibration_report.gaps(victims, "mine")
    assert [g.above.value for g in gaps["the oracle"]] == [0.0, 1.5]  # the failed trial of dps recovers nothing
    assert [g.above.value for g in gaps["dsg"]] == [3.0, 3.0]
    assert [g.above.value for g in gaps["mean image"]] == [13.5, -0.5]
    assert gaps["dsg"][1].above[1:] == (3.0, 3.0)  # alike for all images
    assert "the oracle (net, prior, sigma 0.1)" in calibration_report.verdict(victims, ["mine"])[0]
    assert calibration_report.write_csv(found).count("\n") == 1 + len(found)
    swapped = [s for sigma in (1.0, 0.1) for s in found if s.method == "mine" and s.sigma == sigma]  # levels in another order
    again = calibration_report.by_victim([*(s for s in found if s.method != "mine"), *swapped])
    assert calibration_report.summary(again, ["mine"]) == calibration_report.summary(victims, ["mine"])


def test_trials_of_unlike_studies_are_refused():
    mine = score("mine", None, 0.1, [24, 26])
    whole = [*score("dsg", 0.2, 0.1, [20, 22]), *mine]
    calibration_report.check_complete(whole)
    for found, message in [
        ([*whole, *score("dsg", 0.2, 0.1, [20, 22], victim="other")], "other, prior lacks mine"),
        ([*whole, *score("mine", None, 0.1, [20, 22], victim="other")], "other, prior lacks dsg-0.2"),
        ([*whole, *score("dsg", 0.4, 0.1, [20])], "images for dsg-0.4"),
        ([*whole, *score("dsg", 0.4, 0.3, [20, 22])], "images for dsg-0.4"),
        ([*whole, *mine], "images for mine, or has them twice"),
        (score("dsg", 0.2, 0.1, [20, 22]), "no attack with one setting"),
        ([], "no attack with one setting"),
    ]:
        with pytest.raises(ConfigError, match=message):
            calibration_report.check_complete(found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--untuned=magic"], "--untuned 'magic' is not known"),
        (["--rates=0.2,0.2"], "must be non-empty, without repeats"),
        (["--victims=mlp-narrow@x"], "after the @ comes a number"),
        (["--rates=7"], "--guidance_rate 7.0 must lie in 0..1"),
        (["--trials=nothing.csv"], "nothing.csv is no trials.csv"),
    ],
)
def test_what_the_study_of_calibration_refuses(tiny_prior, tmp_path, flags, message, monkeypatch, capsys):
    study = script(CalibrationConfig(), calibration_study.main)
    assert ended(study, monkeypatch, *flags_of(tiny_prior, tmp_path / "out"), *flags) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
