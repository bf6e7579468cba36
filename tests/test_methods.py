"""Every method, attacker and kind of client in the sweep, and the table that compares methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.cli import ConfigError
from experiments.inputs import SweepConfig, for_victims, load_inputs
from experiments.methods import METHODS, hindrances
from test_sweep import config, run_in_process

import gdiff_jax as gd
from experiments import attackers, compare, report, trials
from gdiff_jax.matching import released

# Descents of a few steps: what is tested is that they run and are told apart.
SHORT = dict(dlg_steps=3, inverting_steps=3, steps=2, batch=4)


def by(rows, *names):
    return {tuple(row[name] for name in names): row for row in rows if row["method"] != trials.PRIOR_ONLY}


def test_all_methods_in_one_sweep_and_the_analytic_one_is_exact(tiny_prior, tmp_path):
    """60 dB is the aim for a first dense layer; the table names the strongest and what each costs."""
    c = for_victims(config(tiny_prior, tmp_path / "out", methods=("all",), victims=("mlp-narrow",), **SHORT))
    rows = run_in_process(c)
    found = by(rows, "victim", "method", "sigma", "image")
    assert {m for _, m, _, _ in found} == set(METHODS)
    assert len(found) == len(METHODS) * 2 * 3
    assert all(np.isfinite(row["psnr"]) and row["memory_mib"] > 0 for row in rows)
    for image in range(3):
        exact = found["mlp-narrow", "analytic", 0.0, image]
        assert exact["psnr"] > 60
        assert exact["distance"] < 1e-3
        assert exact["psnr_at_least_distance"] > 60
        assert found["mlp-narrow", "analytic", 0.1, image]["psnr"] < exact["psnr"] - 20
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "Strongest by median against mlp-narrow, untrained: analytic at sigma 0" in summary
    for line in summary.splitlines():
        if "| analytic " in line and "| 0 " in line and "3/3" in line:
            break
    else:
        raise AssertionError("the table of wins does not give the analytic attack all three images")


def test_a_victim_is_attacked_by_what_applies_to_it(tiny_prior, tmp_path):
    c = for_victims(config(tiny_prior, tmp_path / "out", methods=("all",), victims=("mlp-narrow", "lenet"), **SHORT))
    dense = {name for name, method in METHODS.items() if method.dense}
    pairs = {(t.group.victim, t.group.method) for t in trials.make_grid(c, load_inputs(c)) if t.group.victim}
    expected = {"mlp-narrow": set(METHODS), "lenet": set(METHODS) - dense}
    assert pairs == {(victim, method) for victim, methods in expected.items() for method in methods}


def test_methods_all_leaves_out_what_cannot_be_run():
    every = set(METHODS)
    conv = every - {"analytic", "analytic-dsg"}
    for changes, expected in (
        (dict(victims=("cnn", "mlp-wide")), every),
        (dict(victims=("cnn",)), conv),
        (dict(victims=("mlp",), group=2, num_images=4), conv),
        (dict(methods=("dlg",)), {"dlg"}),
    ):
        assert set(for_victims(SweepConfig(**{"methods": ("all",), **changes})).methods) == expected


@pytest.mark.parametrize("labels", ["known", "inferred"])
def test_a_group_of_images_is_one_leak_and_each_image_a_row(tiny_prior, tmp_path, labels):
    """The stored image of a row is what its scores are of, and the leak is the mean gradient."""
    c = config(tiny_prior, tmp_path / "out", num_images=4, group=2, labels=labels, methods=("dsg", "inverting"), **SHORT)
    rows, inputs = run_in_process(c), load_inputs(c)
    found = by(rows, "method", "sigma", "image")
    assert len(found) == 2 * 2 * 4
    for row in rows:
        with np.load(tmp_path / "out" / "chunks" / f"{row['chunk']:05d}.npz") as arrays:
            image = arrays["images"][row["row"]]
        assert row["psnr"] == pytest.approx(float(gd.image_metrics(image, inputs.images[row["image"]])["psnr"]), abs=1e-3)
    for first in (0, 2):
        pair = [found["dsg", 0.1, first + k] for k in range(2)]
        assert pair[0]["trial"] == pair[1]["trial"]
        assert pair[0]["distance"] == pair[1]["distance"]
        assert [r["psnr_of_best_step"] for r in pair] == [None, None]  # which is which is not known on the way
    victim, params = inputs.victims["mlp"], inputs.params["mlp", 0]
    x, y = jnp.asarray(inputs.images), jnp.asarray(inputs.labels)
    grads = [gd.victim_gradient(victim.loss, params, x[i], y[i]) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    assert found["dsg", 0.0, 0]["gradient_norm"] == pytest.approx(
        float(gd.l2(mean, jax.tree.map(jnp.zeros_like, mean))), rel=1e-4
    )
    assert found["dsg", 0.0, 0]["label_accuracy"] == 1  # four distinct labels of an untrained network
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "2 to a gradient, matched to the truth by assignment" in summary
    assert "nan" not in summary
    assert ("the labels" in summary) == (labels == "known")


CLIENTS = [
    (dict(local_steps=3), "3 local steps were made and their rate"),
    (dict(local_steps=2, attacker="eavesdropper"), "local rate is guessed"),
    (dict(local_steps=2, group=2, num_images=2, local_batch=1), "after 2 local steps of 1 images"),
    (dict(victims=("cnn-batchnorm",)), "the statistics of the BatchNorms"),
    (dict(victims=("cnn-batchnorm",), attacker="server"), "the candidate's own are taken"),
    (dict(victims=("cnn-batchnorm",), attacker="eavesdropper"), "those of samples of the prior"),
    (
        dict(victims=("cnn-batchnorm",), methods=("calibrated-mean",), chains=2, labels="inferred"),
        "mean of 2 chains of calibrated",
    ),
    (dict(labels="joint", methods=("dlg",)), "optimises the labels"),
    (dict(layer_weights="equal", distance="cosine"), "guided by cosine, layers weighted alike"),
]


@pytest.mark.parametrize(("changes", "words"), CLIENTS, ids=lambda x: str(x)[:50])
def test_every_client_and_attacker_runs_and_is_told(tiny_prior, tmp_path, changes, words):
    changes = dict(methods=("dsg",), num_images=1, sigma_grid=(0.0,)) | SHORT | changes
    c = config(tiny_prior, tmp_path / "out", **changes)
    c = attackers.with_attacker(c, set(changes))
    (row,) = [r for r in run_in_process(c) if r["method"] != trials.PRIOR_ONLY][: 1 if c.group == 1 else None][:1]
    assert np.isfinite(row["psnr"])
    assert row["attacker"] == c.attacker
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert words in summary
    assert (tmp_path / "out" / "labels.png").exists() == (c.labels != "known")


def objective(tiny_prior, truth=True, **changes):
    """An attacker's distance at the private image, and at another."""
    c = config(tiny_prior, "unused", num_images=1, steps=2, **changes)
    inputs = load_inputs(c)
    name = c.victims[0]
    victim, params = inputs.victims[name], inputs.params[name, 0]
    client = gd.LocalSGD(c.local_learning_rate, c.local_steps) if c.local_steps > 1 else None
    x, y = jnp.asarray(inputs.images[0]), jnp.asarray(inputs.labels[0])
    leak = released(client, victim.loss, params, x, y)
    match = trials.attacker_match(c, victim, params, jnp.asarray(inputs.proxy), x, leak, y, gd.GaussianNoise(0.0), client)
    return float(match(x) / match(jnp.zeros_like(x)))


def test_who_knows_the_client_is_at_distance_0_from_the_truth_and_who_does_not_is_not(tiny_prior):
    """The objective at the private image, over that at a grey one."""
    assert objective(tiny_prior, local_steps=3, local_learning_rate=0.3) < 1e-4
    guess = objective(tiny_prior, local_steps=3, local_learning_rate=0.3, local_rate="guessed")
    assert 1e-3 < guess < 1
    normed = dict(victims=("cnn-batchnorm",))
    assert objective(tiny_prior, **normed, statistics="known") < 1e-4
    assert objective(tiny_prior, **normed, statistics="batch") < 1e-4  # one image: its own are the batch's
    assert objective(tiny_prior, **normed, statistics="replaced") > 1e-2


def test_the_distance_of_joint_labels_is_at_the_label_that_was_found(tiny_prior, tmp_path):
    """Not at the one read off the last layer, which dlg was not told: after three steps the two differ."""
    changes = SHORT | dict(labels="joint", methods=("dlg",), sigma_grid=(0.0,))
    c = config(tiny_prior, tmp_path / "out", **changes)
    rows, inputs = run_in_process(c), load_inputs(c)
    victim, params = inputs.victims["mlp"], inputs.params["mlp", 0]
    accuracy = []
    for row in by(rows, "image").values():
        with np.load(tmp_path / "out" / "chunks" / f"{row['chunk']:05d}.npz") as arrays:
            image = jnp.asarray(arrays["images"][row["row"]])
        truth, y = jnp.asarray(inputs.images[row["image"]]), int(inputs.labels[row["image"]])
        leak = gd.victim_gradient(victim.loss, params, truth, jnp.asarray(y))
        at = [float(gd.l2(gd.victim_gradient(victim.loss, params, image, jnp.asarray(k)), leak)) for k in range(10)]
        assert (np.abs(row["distance"] - at[y]) < 1e-3 * at[y]) == (row["label_accuracy"] == 1)
        assert np.min(np.abs(row["distance"] - np.array(at))) < 1e-3 * at[y]
        accuracy.append(row["label_accuracy"])
    assert min(accuracy) < 1


def test_attackers_set_what_the_user_did_not():
    c = attackers.with_attacker(SweepConfig(attacker="eavesdropper", labels="known"), {"labels"})
    assert (c.labels, c.adaptive, c.local_rate, c.statistics) == ("known", False, "guessed", "replaced")
    assert "changed by flags" in attackers.threat_model(c)
    assert attackers.with_attacker(SweepConfig(), set()) == SweepConfig()  # the default is the informed one
    server = attackers.with_attacker(SweepConfig(attacker="server"), set())
    assert "changed" not in attackers.threat_model(server)
    assert "Labels are inferred" in attackers.threat_model(server)


@pytest.mark.parametrize("name", ["mlp", "lenet", "lenet-sigmoid", "cnn", "cnn-batchnorm", "resnet"])
def test_labels_of_untrained_victims_are_always_inferred_right(tiny_prior, name):
    """As the sweep infers them, without noise: every class."""
    c = config(tiny_prior, "unused", victims=(name,))
    inputs = load_inputs(c)
    victim, params = inputs.victims[name], inputs.params[name, 0]
    x = jnp.asarray(inputs.images)

    def infer(x, y):
        return trials.infer_labels(victim, params, jnp.asarray(inputs.proxy), gd.victim_gradient(victim.loss, params, x, y), 1)

    found = jax.jit(jax.vmap(jax.vmap(infer, (None, 0)), (0, None)))(x, jnp.arange(10))
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(10), (len(x), 10)))


def row(method, sigma, image, psnr, *, seed=0, trial=None, accuracy=1.0, labels="inferred", failed=False, group=1):
    return {
        "method": method, "victim": "cnn", "training_steps": 0, "mechanism": "gaussian", "sigma": sigma, "image": image,
        "seed": seed, "psnr": psnr, "failed": failed, "label_accuracy": accuracy, "labels": labels, "seconds": 2.0 * image + 1,
        "memory_mib": 10.0, "chunk": 0, "trial": image // group if trial is None else trial, "row": image,
    }  # fmt: skip


def test_wins_by_hand():
    """The best of each image and seed; a tie is won by both, a failed trial by nobody."""
    rows = [row("dsg", 0.1, i, p) for i, p in enumerate([10.0, 20.0, 30.0])]
    rows += [row("dlg", 0.1, 0, 11.0), row("dlg", 0.1, 1, 20.0), row("dlg", 0.1, 2, None, failed=True)]
    rows += [row("dlg", 0.2, 0, 50.0)]
    (cells,) = compare.panels(rows).values()
    assert compare.wins(cells, 0.1) == {"dsg": 2, "dlg": 2}
    assert compare.wins(cells, 0.2) == {"dlg": 1}


def test_the_interval_is_of_a_bootstrap_over_leaks():
    """Images of one leak and seeds of one image stay together; two leaks are too few."""
    same = [row("dsg", 0.1, i, 20.0) for i in range(5)]
    assert compare.median_interval(same) == (20.0, 20.0, 20.0)
    rng = np.random.default_rng(0)
    many = [row("dsg", 0.1, i, float(p)) for i, p in enumerate(rng.normal(20, 1, 400))]
    median, low, high = compare.median_interval(many)
    assert low < median < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.3)  # sqrt(pi / 2) / sqrt(n), a normal's median
    seeds = [dict(r, seed=s, chunk=s) for r in many[:41] for s in range(10)]  # ten times the rows, no more images
    assert compare.median_interval(seeds) == compare.median_interval(many[:41])
    median, low, high = compare.median_interval(many[:2])
    assert np.isnan(low)
    assert np.isnan(high)
    pairs = [row("dsg", 0.1, i, 10.0 * (i // 2), group=2) for i in range(4)]  # two leaks of two images
    assert np.isnan(compare.median_interval(pairs)[1])
    assert np.isnan(compare.median_interval([row("dsg", 0.1, 0, None, failed=True)])[0])


def test_verdicts_by_hand():
    rows = [row("dsg", s, 0, p) for s, p in ((0.0, 20.0), (0.1, 19.0), (0.3, 12.0))]
    rows += [row("dlg", s, 0, p) for s, p in ((0.0, 50.0), (0.1, 8.0), (0.3, 5.0))]
    (words,) = compare.verdicts(rows)
    assert words == (
        "Strongest by median against cnn, untrained: dlg at sigma 0 (50.0 dB), then dsg at sigma 0.1 to 0.3 (19.0 to 12.0 dB)."
    )
    assert "every trial failed" in compare.verdicts([row("dsg", 0.0, 0, None, failed=True)])[0]


def test_the_table_counts_a_leak_of_several_images_once():
    """Seconds are a trial's, labels are shares."""
    rows = [dict(row("dsg", 0.1, i, 20.0, group=2, accuracy=0.5), seconds=[1.0, 1.0, 3.0, 3.0, 8.0, 8.0][i]) for i in range(6)]
    line = compare.table(rows).splitlines()[2]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["cnn", "no", "gaussian", "0.1", "dsg", "20.0 [20.0, 20.0]", "6/6", "50%", "3", "10"]
    known = compare.table([row("dsg", 0.1, 0, 20.0, labels="known")]).splitlines()[2]
    assert "| known " in known


def test_the_legend_names_every_method_and_an_exact_image_does_not_flatten_the_plot(monkeypatch, tmp_path):
    """Methods that the first panel lacks too; 150 dB would press all else into one line."""
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    rows = [row("dsg", 0.0, 0, 20.0), dict(row("analytic", 0.0, 0, 150.0), victim="mlp")]
    report.plot_quality(rows, [], lambda victim, mechanism, sigma: float("inf"), tmp_path / "quality.png")
    (figure,) = figures
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"DSG", "ANALYTIC"}
    assert [ax.get_ylim()[1] for ax in figure.axes] == [report.EXACT] * 2
    assert "cut at 60" in figure.axes[0].get_ylabel()


def test_calibrated_methods_take_groups_and_are_left_to_those_who_know_the_mechanism(tiny_prior, tmp_path):
    c = config(tiny_prior, tmp_path / "o", methods=("calibrated-dsg", "calibrated-mean"), num_images=4, group=2, chains=2)
    rows = run_in_process(c)
    assert not any(r["failed"] for r in rows)
    every = dataclasses.replace(c, methods=("all",))
    assert "calibrated-dsg" in for_victims(every).methods
    assert "calibrated-dsg" not in for_victims(dataclasses.replace(every, adaptive=False)).methods
    with pytest.raises(ConfigError, match="cannot be run with --noadaptive: it draws from the noise"):
        load_inputs(dataclasses.replace(c, adaptive=False))
    with pytest.raises(ConfigError, match="--distance=cosine --local_steps=2"):
        load_inputs(dataclasses.replace(c, distance="cosine", local_steps=2))
    hidden = dataclasses.replace(c, mechanisms=("soteria:0.5+gaussian",))
    with pytest.raises(ConfigError, match=r"--mechanisms=soteria:0.5\+gaussian"):
        load_inputs(hidden)
    assert not hindrances("calibrated-mean", dataclasses.replace(c, mechanisms=("soteria:0.5", "gaussian+soteria:0.5")))
    assert hindrances("analytic-dsg", dataclasses.replace(c, attacker="eavesdropper", adaptive=False)) == [
        "--attacker=eavesdropper"
    ]
    with pytest.raises(ConfigError, match="--chains 1"):
        load_inputs(dataclasses.replace(c, chains=1))


def test_every_attack_is_told_with_its_settings(tiny_prior, tmp_path):
    c = config(tiny_prior, tmp_path / "o", methods=tuple(METHODS), chains=3, calibrated_rate=0.35, guidance_rate=0.15)
    told = report.strengths(c)
    assert told.count(", ") >= len(METHODS)
    for words in ("3 chains of calibrated DSG guidance rate 0.35", "3 chains of DSG guidance rate 0.15", "analytic"):
        assert words in told
    alone = report.strengths(dataclasses.replace(c, methods=("calibrated-mean",)))
    assert alone == "the mean of 3 chains of calibrated DSG guidance rate 0.35 at most, guided by l2"


def test_who_knows_the_noise_is_told_to(tiny_prior, tmp_path):
    c = config(tiny_prior, tmp_path / "o")
    assert "knows the victim's weights and loss, the label, the prior and the noise's distribution." in attackers.threat_model(
        c
    )
    assert "that noise of mean zero was added" in attackers.threat_model(dataclasses.replace(c, adaptive=False))


def test_a_combined_image_leans_on_the_priors_mean(tiny_prior, tmp_path, monkeypatch):
    """And not on the samples that stand in for the statistics of a neighbour's BatchNorms."""
    trace = jax.tree.map(lambda a: jnp.full(2, a, jnp.float32), gd.StepInfo(0.1, 0.1, 0.1))
    monkeypatch.setitem(METHODS, "dsg", dataclasses.replace(METHODS["dsg"], run=lambda task, c: (task.mean, trace)))
    victims = dict(victims=("mlp", "cnn-batchnorm"), attacker="eavesdropper", labels="known", statistics="replaced")
    c = config(tiny_prior, tmp_path / "o", methods=("dsg",), num_images=1, sigma_grid=(0.0,), **victims, **SHORT)
    inputs, rows = load_inputs(c), [r for r in run_in_process(c) if r["method"] != trials.PRIOR_ONLY]
    assert len(rows) == 2
    for row in rows:
        with np.load(tmp_path / "o" / "chunks" / f"{row['chunk']:05d}.npz") as arrays:
            np.testing.assert_allclose(arrays["images"][row["row"]], inputs.prior.mean_image, atol=1e-3)
    assert np.abs(inputs.proxy.mean(0) - inputs.prior.mean_image).max() > 0.1
