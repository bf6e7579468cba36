"""From names to a plan: what is loaded is what was asked for, and what cannot be had is refused."""

import dataclasses
import json
import shutil

import dp_accounting
import numpy as np
import pytest
from PIL import Image
from tiny import MODELS, config, plan_of

from gdiff_jax.errors import ConfigError
from gdiff_jax.images import pictures
from gdiff_jax.methods import DPS, DSG, METHODS, MeanOfChains
from gdiff_jax.options import replace
from gdiff_jax.sweeping import inputs, trials
from gdiff_jax.sweeping.plan import VictimState
from gdiff_jax.training.start import SCHEDULER
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


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)).save(path)


def test_only_the_pictures_that_are_used_are_decoded(tiny_prior, tmp_path, monkeypatch):
    for k in range(9):
        picture(tmp_path / "set" / "ab"[k % 2] / f"{k}.png", k)
    (tmp_path / "set" / "b" / "7.png").write_bytes(b"broken")
    seen, decode = [], pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *a: seen.append(a) or decode(*a))
    plan = plan_of(tiny_prior, images=str(tmp_path / "set"), num_images=3)
    assert plan.names == ("a/0.png", "a/2.png", "a/4.png")
    assert len(seen) == 3
    with pytest.raises(ConfigError, match=r"b/7\.png cannot be read as a picture"):
        plan_of(tiny_prior, images=str(tmp_path / "set"), num_images=9)
    picture(tmp_path / "set" / "b" / "7.png")
    with pytest.raises(ConfigError, match=r"--num_images 10: .*set holds 9; ask for fewer"):
        plan_of(tiny_prior, images=str(tmp_path / "set"), num_images=10)


def test_of_a_set_smaller_than_is_taken_by_default_all_is_taken(tiny_prior, tmp_path, capsys):
    for k in range(3):
        picture(tmp_path / "set" / f"{k}.png", k)
    assert len(plan_of(tiny_prior, images=str(tmp_path / "set"), num_images=4).names) == 3
    assert "holds 3 images, fewer than the 4" in capsys.readouterr().out


def test_the_label_of_each_class_and_how_pictures_were_read_are_told_and_recorded(tiny_prior, tmp_path, capsys):
    for k, name in enumerate(("zebra/0.png", "äffin/1.png", "ant/\udce9.png")):
        picture(tmp_path / "set" / name, k)
    (tmp_path / "set" / "eel").mkdir()
    plan = plan_of(tiny_prior, images=str(tmp_path / "set"), num_images=3)
    classes = {"ant": 0, "zebra": 1, "äffin": 2}
    notes = ["folders without a picture are no class: eel", "3 of 3 pictures shrunk to 16 pixels"]
    assert plan.reading == {"classes": classes, "notes": notes}
    assert plan.labels.tolist() == [0, 1, 2]
    said = capsys.readouterr().out
    assert "by folder, to be held against the model's: ant -> 0, zebra -> 1, äffin -> 2" in said
    assert "set: folders without a picture are no class: eel" in said
    labelled = plan_of(tiny_prior, images=str(tmp_path / "set"), num_images=3, label=7)
    assert "classes" not in labelled.reading
    assert plan.identity.keys() == plan_of(tiny_prior).identity.keys()  # what is told decides nothing


def test_pictures_beside_the_folders_of_classes_need_a_label(tiny_prior, tmp_path):
    for name in ("cat/0.png", "dog/1.png", "loose.png"):
        picture(tmp_path / "set" / name)
    with pytest.raises(ConfigError, match=r"pictures lie beside the folders of classes \(cat, dog\).*or give --label"):
        plan_of(tiny_prior, images=str(tmp_path / "set"))
    assert plan_of(tiny_prior, images=str(tmp_path / "set"), label=3).labels.tolist() == [3, 3, 3]


def test_pictures_have_the_channels_of_the_prior(tmp_path):
    picture(tmp_path / "set" / "0.png")
    for channels in (1, 3):
        data = inputs.read_images("images", str(tmp_path / "set"), "test", "prior", (16, 16, channels))
        assert data.images.shape == (1, 16, 16, channels)


def test_labels_that_a_users_loss_does_not_have_are_refused(tiny_prior):
    with pytest.raises(ConfigError, match=r"make': label 12 of image 0 is none of the loss's classes, 0 \.\. 9; .*--label"):
        plan_of(tiny_prior, victims=(f"{MODELS}:make",), methods=("dsg",), label=12, num_classes=20)
    with pytest.raises(ConfigError, match="--label -2 must be at least -1"):
        plan_of(tiny_prior, label=-2)


def test_folders_have_the_labels_that_the_victim_was_trained_with(tiny_prior, tmp_path):
    victim = zoo.make_victim("lenet", (16, 16, 3), 10)
    params = zoo.init_params("lenet", victim, 0)
    about = {"shapes": {k: list(v.shape) for k, v in params.items()}, "classes": ["ant", "bee", "cat"]}
    manager = checkpoints.manager(tmp_path / "victims", "lenet")
    checkpoints.save(manager, 5, params, about)
    manager.wait_until_finished()
    changes = dict(victims=("lenet",), training_steps=(5,), checkpoints=str(tmp_path / "victims"), num_images=1)
    picture(tmp_path / "same" / "ant" / "0.png")
    assert plan_of(tiny_prior, images=str(tmp_path / "same"), **changes).labels.tolist() == [0]
    picture(tmp_path / "other" / "cat" / "0.png")
    words = r"folder cat has label 0, lenet after 5 steps was trained with 2 for it; .*\(ant, bee, cat\), or --label"
    with pytest.raises(ConfigError, match=words):
        plan_of(tiny_prior, images=str(tmp_path / "other"), **changes)
    assert plan_of(tiny_prior, images=str(tmp_path / "other"), label=2, **changes).labels.tolist() == [2]


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
