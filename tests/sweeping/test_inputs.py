"""From names to a plan: what is loaded is what was asked for, and what cannot be had is refused."""

import dataclasses
import json
import shutil

import dp_accounting
import numpy as np
import pytest
from PIL import Image
from tiny import config, plan_of

from gdiff_jax.errors import ConfigError
from gdiff_jax.methods import DPS, DSG, METHODS, MeanOfChains
from gdiff_jax.options import replace
from gdiff_jax.sweeping import inputs, trials
from gdiff_jax.sweeping.plan import VictimState
from gdiff_jax.training.prior import SCHEDULER
from gdiff_jax.victims import checkpoints, zoo


def test_bad_pictures_are_refused(tiny_prior, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "a.png").write_text("no picture")
    for name, value in (("empty", "holds no picture"), ("corrupt", "a.png")):
        with pytest.raises(ConfigError, match=value):
            plan_of(tiny_prior, images=str(tmp_path / name), num_images=1)


def test_images_without_labels_get_label_0_and_the_user_is_told(tiny_prior, tmp_path, capsys):
    (tmp_path / "unlabelled").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "unlabelled" / "a.png")
    c = config(tiny_prior, "unused", images=str(tmp_path / "unlabelled"), num_images=1)
    assert inputs.load(c).labels.tolist() == [0]
    assert "every image gets label 0" in capsys.readouterr().out
    assert inputs.load(replace(c, label=3)).labels.tolist() == [3]


def test_clip_is_the_priors_unless_the_user_says_otherwise(tiny_prior, tmp_path):
    shutil.copytree(tiny_prior / "prior", tmp_path / "prior")
    scheduler = tmp_path / "prior" / "scheduler_config.json"
    scheduler.write_text(json.dumps(SCHEDULER | dict(clip_sample=False)))
    for clip, expected in (("prior", False), ("yes", True), ("no", False)):
        assert plan_of(tiny_prior, prior=str(tmp_path / "prior"), clip=clip).prior.clip is expected


def test_checkpoint_of_another_shape_is_refused(tiny_prior, tmp_path):
    victim = zoo.make_victim("lenet", (16, 16, 3), 7)
    params = zoo.init_params("lenet", victim, 0)
    manager = checkpoints.manager(tmp_path / "victims", "lenet")
    checkpoints.save(manager, 5, params, {"shapes": {k: list(v.shape) for k, v in params.items()}})
    manager.wait_until_finished()
    changes = dict(victims=("lenet",), training_steps=(5,), checkpoints=str(tmp_path / "victims"))
    with pytest.raises(ConfigError, match=r"another shape.*fc.*7.*10"):
        plan_of(tiny_prior, **changes)
    plan = plan_of(tiny_prior, num_classes=7, **changes)
    np.testing.assert_array_equal(plan.params[VictimState("lenet", 5)]["fc.kernel"], params["fc.kernel"])


def test_epsilons_become_sigmas_of_the_clipped_gaussian(tiny_prior):
    changes = dict(epsilon_grid=(10.0, 1.0), mechanisms=("clip:2+gaussian",), methods=("dsg",), num_images=1)
    plan = plan_of(tiny_prior, sigma_grid=(0.5,), **changes)
    of_epsilons = sorted(2 * dp_accounting.get_sigma_gaussian(e, plan.delta) for e in (1.0, 10.0))
    assert plan.sigmas == {"clip:2+gaussian": (0.5, *of_epsilons)}
    grid = [trial.sigma for trial in trials.make_grid(plan) if trial.group.method == "dsg"]
    assert grid == [0.5, *of_epsilons]
    assert plan_of(tiny_prior, sigma_grid=(), **changes).sigmas == {"clip:2+gaussian": tuple(of_epsilons)}


def test_a_victim_is_attacked_by_what_applies_to_it(tiny_prior):
    plan = plan_of(tiny_prior, methods=("all",), victims=("mlp-narrow", "lenet"))
    dense = {name for name, method in METHODS.items() if method.needs_first_dense}
    pairs = {(t.group.victim, t.group.method) for t in trials.make_grid(plan) if t.group.victim}
    expected = {"mlp-narrow": set(METHODS), "lenet": set(METHODS) - dense}
    assert pairs == {(victim, method) for victim, methods in expected.items() for method in methods}


def test_options_reach_the_methods(tiny_prior):
    guidance = dict(guidance_rate=0.3, interval=2, through_prior=False, zeta=3.0)
    plan = plan_of(tiny_prior, methods=("dsg-mean", "dps", "dlg"), chains=3, labels="joint", dlg_steps=7, **guidance)
    assert plan.methods["dsg-mean"] == MeanOfChains(DSG(0.3, interval=2, through_prior=False), chains=3)
    assert plan.methods["dps"] == DPS(3.0, through_prior=False)
    assert plan.methods["dlg"] == dataclasses.replace(METHODS["dlg"], steps=7, joint_labels=True)


def test_what_changes_results_changes_the_identity_and_nothing_else_does(tiny_prior):
    identity = lambda **changes: plan_of(tiny_prior, num_images=1, **changes).identity
    same = identity()
    assert identity(memory_gib=1.0, checkpoints="elsewhere") == same
    for changes in (
        dict(steps=4),
        dict(seed=1),
        dict(methods=("dsg",)),
        dict(attacker="server"),
        dict(batch=5),
        dict(clip="no"),
    ):
        assert identity(**changes) != same, changes
    assert identity(attacker="informed", labels="known")["labels"] == same["labels"] == "known"
    assert {"prior", "prior_settings", "images"} <= same["sha256"].keys()
