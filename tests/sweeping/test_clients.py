"""Every method, attacker and kind of client, through the engine."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trials import MECHANISMS, told_apart
from tiny import attack_once, attacks_of, config, plain_plan, run_in_memory, run_in_process, scores

import gdiff_jax as gd
from gdiff_jax.methods import DLG, METHODS, Method
from gdiff_jax.problem import Info
from gdiff_jax.pytrees import pytree, static
from gdiff_jax.sweeping import comparison
from gdiff_jax.sweeping.plan import VictimState

# Descents of a few steps: what is tested is that they run and are told apart.
SHORT = dict(dlg_steps=3, inverting_steps=3)
CNN = dict(victims=("cnn-batchnorm",))
long = pytest.mark.long


def by(rows, *names):
    return {tuple(row[name] for name in names): row for row in attacks_of(rows)}


def is_exact(rows, sigmas=(0.0, 0.1)):
    """60 dB is the aim for a first dense layer; the table gives the analytic attack every image without noise."""
    found = by(rows, "method", "sigma", "image")
    for image in range(3):
        exact = found["analytic", sigmas[0], image]
        assert exact["psnr"] > 60
        assert exact["distance"] < 1e-3
        assert exact["psnr_at_least_distance"] > 60
        assert found["analytic", sigmas[1], image]["psnr"] < exact["psnr"] - 20
    others = [row for row in rows if row["method"] not in ("auto", "analytic-mean")]  # which solve the same layer as well
    assert "Strongest by median against mlp-narrow, untrained: analytic at sigma 0" in comparison.verdicts(others)[0]
    lines = comparison.table(others).splitlines()
    assert any("| analytic " in line and "| 0 " in line and "3/3" in line for line in lines)


def test_the_analytic_attack_is_exact_and_wins_in_a_sweep(tiny_prior):
    rows, _ = run_in_memory(plain_plan(tiny_prior, methods=("dsg", "analytic")))
    assert all(np.isfinite(row["psnr"]) for row in rows)
    assert all(row["memory_mib"] > 0 for row in attacks_of(rows))
    is_exact(rows)


@long
def test_all_methods_in_one_sweep(tiny_prior, tmp_path):
    rows = run_in_process(config(tiny_prior, tmp_path / "out", methods=("all",), **SHORT))
    found = by(rows, "method", "sigma", "image")
    assert {method for method, *_ in found} == set(METHODS)
    assert len(found) == len(METHODS) * 2 * 3
    assert all(np.isfinite(row["psnr"]) and row["memory_mib"] > 0 for row in rows)
    is_exact(rows)
    # Under noise auto is analytic-mean but for its probes, and either may be the one.
    either = r"auto at sigma 0 \(200\.0 dB\), then analytic-mean at sigma 0\.1|auto at sigma 0 to 0\.1 \(200\.0 to"
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(rf"Strongest by median against mlp-narrow, untrained: (?:{either})", summary)


@pytest.mark.parametrize(
    ("labels", "methods"),
    [("inferred", ("dsg",)), *(pytest.param(labels, ("dsg", "inverting"), marks=long) for labels in ("known", "inferred"))],
)
def test_a_group_of_images_is_one_leak_and_each_image_a_row(tiny_prior, tmp_path, labels, methods):
    """The stored image of a row is what its scores are of, and the leak is the mean gradient."""
    changes = dict(num_images=4, group=2, labels=labels, methods=methods, **SHORT)
    plan = plain_plan(tiny_prior, **changes)
    rows = run_in_process(config(tiny_prior, tmp_path / "out", **changes), plan)
    found = by(rows, "method", "sigma", "image")
    assert len(found) == len(methods) * 2 * 4
    for row in rows:
        with np.load(tmp_path / "out" / "chunks" / f"{row['chunk']:05d}.npz") as arrays:
            image = arrays["images"][row["row"]]
        assert row["psnr"] == pytest.approx(float(scores(image, plan.images[row["image"]])["psnr"]), abs=1e-3)
    for first in (0, 2):
        pair = [found["dsg", 0.1, first + k] for k in range(2)]
        assert pair[0]["trial"] == pair[1]["trial"]
        assert pair[0]["distance"] == pair[1]["distance"]
        assert [r["psnr_of_best_step"] for r in pair] == [None, None]  # which is which is not known on the way
    victim, params = plan.victims["mlp-narrow"], plan.params[VictimState("mlp-narrow", 0)]
    gradient = jax.jit(lambda x, y: gd.victim_gradient(victim.loss, params, x, y))
    grads = [gradient(plan.images[i], jnp.asarray(plan.labels[i])) for i in range(2)]
    norm = np.sqrt(sum(np.square((a + b) / 2).sum() for a, b in zip(*map(jax.tree.leaves, grads), strict=True)))
    assert found["dsg", 0.0, 0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert found["dsg", 0.0, 0]["label_accuracy"] == 1  # four distinct labels of an untrained network
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "2 to a gradient, matched to the truth by assignment" in summary
    assert "nan" not in summary
    assert ("the labels" in summary) == (labels == "known")
    assert (tmp_path / "out" / "labels.png").exists() == (labels != "known")


CLIENTS = [
    (dict(local_steps=3), "3 local steps were made and their rate"),
    (dict(local_steps=2, attacker="eavesdropper"), "local rate is guessed"),
    (dict(local_steps=2, group=2, num_images=2, local_batch=1), "after 2 local steps of 1 images"),
    (CNN, "the statistics of the BatchNorms"),
    (dict(CNN, attacker="server"), "the candidate's own are taken"),
    (dict(CNN, attacker="eavesdropper"), "those of samples of the prior"),
    (dict(CNN, methods=("calibrated-mean",), chains=2, labels="inferred"), "mean of 2 chains of calibrated"),
    (dict(labels="joint", methods=("dlg",)), "optimises the labels"),
    (dict(layer_weights="equal", distance="cosine"), "guided by cosine, layers weighted alike"),
]


def client_plan(tiny_prior, changes):
    return plain_plan(tiny_prior, **(dict(methods=("dsg",), num_images=1, sigma_grid=(0.0,)) | SHORT | changes))


def is_attacked(plan, rows):
    assert np.isfinite(rows[0]["psnr"])
    assert rows[0]["outcome"] == "finished"
    known = {"attacker": plan.attacker.attacker, **dataclasses.asdict(plan.attacker.knowledge)}
    assert {name: rows[0][name] for name in known} == known


@pytest.mark.parametrize("changes", [changes for changes, _ in CLIENTS[1:3]], ids=lambda x: str(x)[:50])
def test_clients_of_several_steps_are_attacked(tiny_prior, changes):
    """By one who guesses rate and labels, and by one who knows both of a group in batches."""
    plan = client_plan(tiny_prior, changes)
    is_attacked(plan, attack_once(plan)[0])


@long
@pytest.mark.parametrize(("changes", "words"), CLIENTS, ids=lambda x: str(x)[:50])
def test_every_client_and_attacker_runs_and_is_told(tiny_prior, tmp_path, changes, words):
    plan = client_plan(tiny_prior, changes)
    asked = dict(methods=("dsg",), num_images=1, sigma_grid=(0.0,)) | SHORT | changes
    is_attacked(plan, attacks_of(run_in_process(config(tiny_prior, tmp_path / "out", **asked), plan)))
    assert words in (tmp_path / "out" / "summary.md").read_text()
    assert (tmp_path / "out" / "labels.png").exists() == (plan.attacker.knowledge.labels != "known")


@pytree
class Says(Method):
    """An attack that finds a grey image and the same label for every leak."""

    label: int = static(default=1)
    name = "dlg"

    def __call__(self, key, problem):
        trace = jax.tree.map(lambda a: jnp.full(1, a, jnp.float32), gd.StepInfo(0.1, 0.1, 0.1))
        image = jnp.zeros(problem.shape)
        return image, Info(trace, problem.outcome(image), jax.nn.one_hot(self.label, problem.num_classes))


@pytest.mark.parametrize(
    "dlg", [Says(), pytest.param(DLG(steps=3, joint_labels=True), marks=long)], ids=lambda m: type(m).__name__
)
def test_the_distance_of_joint_labels_is_at_the_label_that_was_found(tiny_prior, dlg):
    """Not at the one read off the last layer, which dlg was not told: after three steps the two differ."""
    plan = plain_plan(tiny_prior, labels="joint", methods=("dlg",), sigma_grid=(0.0,))
    rows, arrays = attack_once(dataclasses.replace(plan, methods={"dlg": dlg}), 3)
    victim, params = plan.victims["mlp-narrow"], plan.params[VictimState("mlp-narrow", 0)]
    gradient = lambda x, y: gd.victim_gradient(victim.loss, params, x, y)

    @jax.jit
    def distances(image, truth, y):
        return jax.vmap(lambda k: gd.l2(gradient(image, k), gradient(truth, y)))(jnp.arange(10))

    accuracy = []
    for row in rows:
        image = jnp.asarray(arrays["images"][row["row"]])
        y = int(plan.labels[row["image"]])
        at = np.asarray(distances(image, jnp.asarray(plan.images[row["image"]]), jnp.asarray(y)))
        assert (np.abs(row["distance"] - at[y]) < 1e-3 * at[y]) == (row["label_accuracy"] == 1)
        assert np.min(np.abs(row["distance"] - at)) < 1e-3 * at[y]
        accuracy.append(row["label_accuracy"])
    assert len(accuracy) == 3
    assert min(accuracy) < 1
    assert dlg != Says() or accuracy == [0, 1, 0]


@long
def test_guidance_at_x0hat_runs(tiny_prior):
    rows, _ = run_in_memory(
        plain_plan(tiny_prior, through_prior=False, methods=("dsg", "dps"), num_images=1, sigma_grid=(0.0,))
    )
    assert all(np.isfinite(row["psnr"]) for row in rows)


@long
@pytest.mark.parametrize("method", ["calibrated-dsg", "calibrated-mean"])
def test_calibrated_methods_take_groups_and_leave_their_own_trace(tiny_prior, method):
    """What was measured of the guidance is in the trace of who measured it, and of nobody else."""
    plan = plain_plan(tiny_prior, methods=(method,), num_images=4, group=2, chains=2, sigma_grid=(0.1,))
    rows, arrays = attack_once(plan, 2)
    assert [r["image"] for r in rows] == [0, 1, 2, 3]
    assert not any(r["failed"] for r in rows)
    assert set(arrays) >= {"trace_signal", "trace_pull", "trace_noise_pull", "trace_curvature"}


@long
def test_every_mechanism_runs_and_is_told_in_the_summary(tiny_prior, tmp_path):
    """All in one sweep; those without noise once; the aware attacker is at distance 0 from the truth where there is none."""
    asked = dict(methods=("dsg",), num_images=1, sigma_grid=(0.1,), steps=2)
    run = lambda folder, **c: run_in_process(
        config(tiny_prior, tmp_path / folder, **{**asked, **c}), plain_plan(tiny_prior, **{**asked, **c})
    )
    rows = {r["mechanism"]: r for r in attacks_of(run("a", mechanisms=MECHANISMS))}
    assert {k: r["sigma"] for k, r in rows.items()} == {t: 0.1 if "+" in t else 0.0 for t in MECHANISMS}
    told_apart(rows)
    assert all(r["adaptive"] for r in rows.values())
    summary = (tmp_path / "a" / "summary.md").read_text()
    assert "which it matches through" in summary
    for reason in ("none: no noise", "none: no clipping", "none: uniform noise"):
        assert reason in summary
    other = {r["mechanism"]: r for r in attacks_of(run("b", mechanisms=("clip:0.1",), sigma_grid=(), adaptive=False))}
    assert other["clip:0.1"]["adaptive"] is False
    assert "The mechanism is not known: the leak is taken for the gradient" in (tmp_path / "b" / "summary.md").read_text()
