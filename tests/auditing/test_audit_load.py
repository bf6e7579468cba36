"""An audit of what is named: models, weights and gradients of the user's files, and an error for each wrong input."""

import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tiny import MODELS, ROOT, audit_config
from written import faults_of_json

from gdiff_jax import modules
from gdiff_jax.auditing import load, page, run
from gdiff_jax.auditing.load import audit_named
from gdiff_jax.errors import ConfigError
from gdiff_jax.federated import LocalSGD
from gdiff_jax.matching import victim_gradient
from gdiff_jax.options import replace


@pytest.fixture
def plan_of(monkeypatch, tiny_prior):
    """What would be run, of changes to the usual settings."""
    monkeypatch.setattr(load, "run", lambda plan, *_: plan)
    return lambda **changes: audit_named(audit_config(tiny_prior, "unused", **changes))


def test_the_report_tells_the_label_of_each_class(monkeypatch, tiny_prior, tmp_path):
    monkeypatch.setattr(load, "run", lambda plan, question, store, attack, about, show: about)
    for k, name in enumerate(("photos/cat/0.png", "photos/dog/1.png")):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / name)
    about = audit_named(audit_config(tiny_prior, "unused", images=str(tmp_path), num_images=1))
    assert about["images_classes"] == {"cat": 0, "dog": 1}
    rows = page._settings(SimpleNamespace(about=about))["rows"]
    assert ["images_classes.dog", "1"] in rows
    about["images_classes"] = {f"kind {k}": k for k in range(100)}
    ((_, text),) = [row for row in page._settings(SimpleNamespace(about=about))["rows"] if row[0].startswith("images_classes")]
    assert text.startswith("kind 0 -> 0, kind 1 -> 1, ")


def test_groups_are_those_of_the_client(plan_of):
    plan = plan_of(victim="mlp-narrow", num_images=4, group=2, local_steps=2, local_batch=1)
    assert (plan.client.group, plan.client.local_steps, plan.client.local_batch) == (2, 2, 1)


def test_a_first_dense_layer_is_found(plan_of):
    """It gives the image away exactly, which no default may overlook."""
    assert list(plan_of(victim=f"{MODELS}:mlp", methods=()).methods) == ["auto", "analytic", "analytic-dsg"]
    assert list(plan_of(methods=()).methods) == ["auto"]
    named = plan_of(victim=f"{MODELS}:mlp", methods=("dsg",))
    assert list(named.methods) == ["dsg"]
    unknown_noise = plan_of(victim="mlp-narrow", methods=(), attacker="eavesdropper")
    assert list(unknown_noise.methods) == ["auto", "analytic"]


def test_a_first_dense_layer_is_read_off(tiny_prior, tmp_path, attacks_alone):
    """Behind a normalisation of the user's own."""
    changes = dict(victim=f"{MODELS}:mlp", methods=("inverting", "analytic"), inverting_steps=2)
    audit = audit_named(audit_config(tiny_prior, tmp_path / "out", **changes))
    assert min(r["psnr"] for r in audit.at(0.0) if r["method"] == "analytic") > 60
    assert audit.levels()[0].methods == "analytic 2"  # and the attacker chooses it


def torch_layout(tree):
    """What a torch network of the same shape saves, its flattened map in the order (C, H, W)."""
    out = np.asarray(tree["out"]["kernel"]).reshape(4, 4, 6, 10).transpose(2, 0, 1, 3).reshape(96, 10)
    conv = np.asarray(tree["conv"]["kernel"]).transpose(3, 2, 0, 1)
    arrays = {"conv.weight": conv, "conv.bias": tree["conv"]["bias"], "out.weight": out.T, "out.bias": tree["out"]["bias"]}
    return {k: np.ascontiguousarray(v) for k, v in arrays.items()}


def flattened(tree):
    return {f"{layer}.{name}": np.asarray(value) for layer, arrays in tree.items() for name, value in arrays.items()}


@pytest.fixture(scope="module")
def saved(tiny_prior, tmp_path_factory):
    """A folder with the gradient of the first image, as a flax .npz and in torch's layout, and the gradient."""
    loss, params = own_models.make()
    data, folder = np.load(tiny_prior / "images.npz"), tmp_path_factory.mktemp("saved")
    x = jnp.asarray(data["images"][0] / np.float32(127.5) - 1)
    gradient = jax.jit(lambda p, x, y: victim_gradient(loss, p, x, y))(params, x, jnp.asarray(data["labels"][0]))
    np.savez(folder / "flax.npz", **{f"params/{name.replace('.', '/')}": value for name, value in flattened(gradient).items()})
    save_file(torch_layout(gradient), folder / "torch.safetensors")
    return folder, flattened(gradient)


def test_a_saved_gradient_is_taken_whichever_layout_it_has(plan_of, saved):
    folder, gradient = saved
    common = dict(label=0, num_images=1, mechanism="none")
    leak = lambda file, *orders: plan_of(gradient=str(folder / file), flattened=orders, **common).leak
    for tree in (leak("flax.npz"), leak("torch.safetensors", "out.kernel:6x4x4")):
        assert tree.keys() == gradient.keys()
        for name, value in gradient.items():
            np.testing.assert_allclose(tree[name], value, rtol=1e-6)
    # The order of the rows matters: taken as they are they are another gradient.
    with pytest.raises(ConfigError, match=r"those of out\.kernel in another order: .*--flattened"):
        leak("torch.safetensors", "out.kernel:as-is")


def changed(gradient, how):
    """What is saved in place of a gradient; of `other weights` one of another seed."""
    return {name: how(value) for name, value in gradient.items()}


NOISE = lambda value: value + 0.1 * np.random.default_rng(value.size).normal(size=value.shape)
# What is saved, how it is said to be, and what is told of it.
ANOTHER = {
    "scaled": (lambda v: 37 * v, dict(), "37 times the model's own gradient at the image"),
    "loss scale": (lambda v: 1024 * v, dict(), "the loss scale of mixed precision"),
    "update": (lambda v: -0.01 * v, dict(), r"-0\.01 times .* an update, minus the gradient, a mean or a learning rate"),
    "other label": (lambda v: v, dict(label=3), r"with label 0, not 3: say --label=0"),
    "unsaid noise": (NOISE, dict(), r"noise of sigma about 0\.09\d?, of which 0 is said: say --sigma_grid=0\.09"),
    "no noise": (lambda v: v, dict(mechanism="gaussian", sigma_grid=(0.1,)), r"--sigma_grid says 0\.1\. Say what it holds"),
    "unclipped": (
        lambda v: v,
        dict(mechanism="clip:1+gaussian"),
        "has the norm .* --mechanism clip:1.gaussian with sigma 0 lets",
    ),
    "not through sign": (lambda v: v, dict(mechanism="sign"), "gradient at the image before --mechanism sign"),
    "shuffled": (lambda v: v.ravel()[::-1].reshape(v.shape), dict(), "conv.bias, conv.kernel.* in another order"),
    "unrelated": (
        lambda v: np.random.default_rng(v.size).normal(size=v.shape),
        dict(),
        r"is not the .* \(--weights\), another",
    ),
}


@pytest.mark.parametrize("what", ANOTHER)
def test_a_gradient_that_is_not_the_models_own_at_the_image_is_named(what, plan_of, saved, tmp_path):
    how, options, words = ANOTHER[what]
    np.savez(tmp_path / "leak.npz", **changed(saved[1], how))
    common = dict(num_images=1, label=0, mechanism="none", gradient=str(tmp_path / "leak.npz"))
    with pytest.raises(ConfigError, match=words):
        plan_of(**{**common, **options})


@pytest.mark.parametrize("what", ["float16", "bfloat16", "noise", "much noise"])
def test_rounding_and_noise_that_is_said_make_no_other_gradient(what, plan_of, saved, tmp_path, capsys):
    sigma = {"noise": 0.01, "much noise": 1.0}.get(what, 0.0)
    rounded = lambda v: v.astype(what) if sigma == 0 else v + sigma * np.random.default_rng(v.size).normal(size=v.shape)
    np.savez(tmp_path / "leak.npz", **changed(saved[1], rounded))
    plan_of(num_images=1, label=0, gradient=str(tmp_path / "leak.npz"), mechanism="gaussian", sigma_grid=(sigma,))
    assert "it is the model's own gradient at the image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "label", "words"),
    [
        (lambda v: 37 * v, -1, r"below -1: a sum, or a loss scale"),
        (lambda v: -v, -1, "it has another sign, as an update has"),
        (NOISE, -1, "entries below zero and the sum .*--sigma_grid"),
        (lambda v: v, 3, "says label 0, not 3"),
        (lambda v: 0.1 * v, -1, r"is 0\.1 times what the last layer makes of the features .*--mechanism=clip:NORM"),
        (lambda v: 1e-20 * v, -1, "is 1e-20 times what the last layer makes"),
    ],
)
def test_without_its_image_a_gradient_is_held_against_what_one_can_be(how, label, words, plan_of, saved, tmp_path):
    np.savez(tmp_path / "leak.npz", **changed(saved[1], how))
    with pytest.raises(ConfigError, match=words):
        plan_of(images="", label=label, gradient=str(tmp_path / "leak.npz"), mechanism="none")


@pytest.mark.parametrize("model", ["smoothed", "sure"])
def test_smoothed_labels_and_sure_networks_leave_no_single_negative_entry(model, plan_of, tiny_prior, tmp_path):
    loss, params = getattr(own_models, model)()
    x = jnp.asarray(np.load(tiny_prior / "images.npz")["images"][0] / np.float32(127.5) - 1)
    leak = flattened(jax.jit(lambda p: victim_gradient(loss, p, x, jnp.asarray(0)))(params))
    assert (leak["out.bias"] < 0).sum() > 1 or np.abs(leak["out.bias"]).max() < 1e-5
    np.savez(tmp_path / "leak.npz", **leak)
    plan_of(victim=f"{MODELS}:{model}", images="", label=0, gradient=str(tmp_path / "leak.npz"), mechanism="none")


def leak_of(model, tiny_prior, label, *images):
    """The mean gradient of images of one label."""
    loss, params = getattr(own_models, model)()
    pictures = jnp.asarray(np.load(tiny_prior / "images.npz")["images"] / np.float32(127.5) - 1)
    gradient = jax.jit(lambda p, x: victim_gradient(loss, p, x, jnp.asarray(label)))
    return jax.tree.map(lambda *g: sum(g) / len(g), *(flattened(gradient(params, pictures[i])) for i in images or (0,)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("from_one", "no cross-entropy of a class's number.*say the image's label with --label"),
        ("squared", "no cross-entropy of a class's number"),
        ("one_logit", "has one output.*--label"),
    ],
)
def test_a_label_is_read_off_no_loss_that_tells_it_otherwise(model, words, plan_of, tiny_prior, tmp_path):
    np.savez(tmp_path / "leak.npz", **leak_of(model, tiny_prior, 1))
    options = dict(victim=f"{MODELS}:{model}", images="", gradient=str(tmp_path / "leak.npz"), mechanism="none")
    with pytest.raises(ConfigError, match=words):
        plan_of(**options)
    assert plan_of(**options, label=1).labels == 1


@pytest.mark.parametrize("model", ["make", "smoothed", "per_class", "two"])
def test_a_label_is_read_off_losses_that_tell_it(model, plan_of, tiny_prior, tmp_path):
    label = 1 if model == "two" else 7
    np.savez(tmp_path / "leak.npz", **leak_of(model, tiny_prior, label))
    options = dict(victim=f"{MODELS}:{model}", images="", gradient=str(tmp_path / "leak.npz"), mechanism="none")
    if model == "smoothed":  # of a network that is sure of some class, and wrong, the others' entries fall below the label's
        with pytest.raises(ConfigError, match="--label"):
            plan_of(**options)
    else:
        assert plan_of(**options).labels == label


def test_a_gradient_of_one_label_is_held_against_that_of_one_example(plan_of, tiny_prior, tmp_path):
    def refused(words, model, leak):
        np.savez(tmp_path / "leak.npz", **leak)
        with pytest.raises(ConfigError, match=words):
            plan_of(victim=f"{MODELS}:{model}", images="", gradient=str(tmp_path / "leak.npz"), mechanism="none")

    one = leak_of("make", tiny_prior, 1)
    refused("matrix is not of one example.*a mean over several", "make", leak_of("make", tiny_prior, 1, 0, 1))
    decayed = {**one, "out.kernel": one["out.kernel"] + 0.1 * own_models.make()[1]["out"]["kernel"]}
    refused("such as a decay of the weights", "make", decayed)
    rows = one["out.kernel"].reshape(4, 4, 6, -1).transpose(2, 0, 1, 3).reshape(one["out.kernel"].shape)
    refused(r"is not what the last layer makes.*\(--flattened\)", "make", {**one, "out.kernel": rows})
    others = own_models.make()[1]
    others["out"]["kernel"] = others["out"]["kernel"][::-1]
    loss, x = own_models.make()[0], jnp.asarray(np.load(tiny_prior / "images.npz")["images"][0] / np.float32(127.5) - 1)
    of_others = flattened(jax.jit(lambda p: victim_gradient(loss, p, x, jnp.asarray(1)))(others))
    refused(r"is not what the last layer makes.*other weights.*\(--weights\)", "make", of_others)
    refused("is zero in conv.kernel, where", "make", {**one, "conv.kernel": 0 * one["conv.kernel"]})
    refused("a sum, or a loss scale", "two", {name: 100 * value for name, value in leak_of("two", tiny_prior, 1).items()})


@pytest.mark.parametrize("held", [0.0, 0.01])
def test_noise_that_is_said_is_in_the_last_layer(held, plan_of, saved, tmp_path):
    """Without the image: but for noise its matrix is of rank one."""
    noise = lambda v: v + held * np.random.default_rng(v.size).normal(size=v.shape)
    np.savez(tmp_path / "leak.npz", **changed(saved[1], noise))
    options = dict(images="", label=0, gradient=str(tmp_path / "leak.npz"), mechanism="gaussian")
    with pytest.raises(ConfigError, match=r"holds noise of sigma .* at most: its last layer's.*--sigma_grid says 0\.1"):
        plan_of(**options, sigma_grid=(0.1,))
    if held:
        assert plan_of(**options, sigma_grid=(held,)).labels == 0
        with pytest.raises(ConfigError, match=r"but for 0\.0\d* in each entry, of which noise of sigma 0\.005 is said"):
            plan_of(**options, sigma_grid=(held / 2,))


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (lambda own, other, weights: own + other, "another gradient, of which out.kernel is nearly of rank one"),
        (lambda own, other, weights: own + weights, "something that goes with the weights, such as a decay"),
    ],
)
def test_what_is_no_noise_is_not_taken_for_it(added, words, plan_of, tiny_prior, tmp_path):
    """Neither where none is said nor where as much is."""
    own, other = (leak_of("make", tiny_prior, 0, image) for image in (0, 1))
    weights = flattened(own_models.make()[1])
    leak = {name: added(own[name], other[name], weights[name]) for name in own}
    np.savez(tmp_path / "leak.npz", **leak)
    sigma = float(np.sqrt(np.mean(np.concatenate([np.square(leak[name] - own[name]).ravel() for name in own]))))
    options = dict(num_images=1, label=0, gradient=str(tmp_path / "leak.npz"), mechanism="gaussian")
    with pytest.raises(ConfigError, match=rf"is not the model's own.*{words}"):
        plan_of(**options)
    with pytest.raises(ConfigError, match=rf"beside it no noise: {words}"):
        plan_of(**options, sigma_grid=(sigma,))


def test_another_label_is_found_among_all_that_the_last_layer_tells_apart(plan_of, tiny_prior, tmp_path):
    """Though the model's classes are not said, and are more than are taken then."""
    np.savez(tmp_path / "leak.npz", **leak_of("many", tiny_prior, 17))
    with pytest.raises(ConfigError, match="with label 17, not 3: say --label=17"):
        plan_of(victim=f"{MODELS}:many", num_images=1, label=3, gradient=str(tmp_path / "leak.npz"), mechanism="none")


def test_an_own_loss_of_batches_is_audited_alone_and_in_groups(plan_of, tmp_path):
    np.savez(tmp_path / "w.npz", **flattened(own_models.of_batch()[1]))
    for group in (1, 2):
        common = dict(victim=f"{MODELS}:of_batch", num_images=2, group=group)
        assert plan_of(**common).client.group == group
        assert plan_of(**common, weights=str(tmp_path / "w.npz")).client.group == group


def test_weights_are_no_gradient(plan_of, tmp_path):
    np.savez(tmp_path / "w.npz", **flattened(own_models.make()[1]))
    with pytest.raises(ConfigError, match="it holds weights, not a gradient"):
        plan_of(images="", gradient=str(tmp_path / "w.npz"), mechanism="none")


@pytest.mark.long
def test_a_saved_gradient_is_attacked_as_if_it_were_the_models_own(tiny_prior, saved, tmp_path):
    folder, _ = saved
    common = dict(mechanism="gaussian", seeds=2, label=0, num_images=1)
    ways = {
        "own": dict(),
        "flax": dict(gradient=str(folder / "flax.npz")),
        "torch": dict(gradient=str(folder / "torch.safetensors"), flattened=("out.kernel:6x4x4",)),
    }
    audits = {name: audit_named(audit_config(tiny_prior, tmp_path / name, **common, **way)) for name, way in ways.items()}
    distances = {name: [r["distance"] for r in audit.attacks] for name, audit in audits.items()}
    assert distances["flax"] == pytest.approx(distances["own"], rel=1e-3)
    assert distances["torch"] == pytest.approx(distances["own"], rel=1e-3)
    assert all(len(audit.pictures) > 0 for audit in audits.values())


def test_a_saved_gradient_of_an_unknown_image(tiny_prior, saved, tmp_path, attacks_alone):
    folder, _ = saved
    cheap = dict(methods=("inverting",), inverting_steps=2, mechanism="none", label=0, seeds=3)
    c = audit_config(tiny_prior, tmp_path / "out", gradient=str(folder / "flax.npz"), **cheap)
    c = replace(c, images="")  # the default would be of another size than the prior's
    audit = audit_named(c)
    assert not audit.has_truth
    assert len(audit.attacks) == 3
    assert all(r["psnr"] is None and r["distance"] > 0 for r in audit.attacks)
    assert "explains it up to" in audit.verdict()
    assert faults_of_json(audit.to_json()) == []
    text = audit.report(tmp_path / "out").read_text()
    assert "What the attacks made of the gradient" in text
    assert "recovered" not in text.split("What this does not say")[0].split("</nav>")[1]


def test_a_saved_gradient_needs_no_label_and_no_noise_level(tiny_prior, saved, tmp_path):
    """Its label is read off it, a level that is not said is 0, and both are said."""
    folder, _ = saved
    c = audit_config(tiny_prior, tmp_path / "out", gradient=str(folder / "flax.npz"), mechanism="none", sigma_grid=())
    c = replace(c, images="").completed()
    plan, _ = load._load_plan(c, load._with_methods(c))
    assert plan.sigmas == {"none": (0.0,)}
    (label,), bias = plan.labels, next(v for v in plan.leak.values() if np.size(v) == 10)
    assert label == np.argmin(bias)
    assert "its label is the one that its last layer betrays" in c.assumed
    labelled = replace(c, label=1)
    assert load._load_plan(labelled, load._with_methods(labelled))[0].labels == 1
    assert not any("label" in text for text in labelled.assumed)


def test_weights_from_a_file_are_those_that_are_attacked(plan_of, tmp_path):
    other = jax.tree.map(lambda p: 2 * p + 0.01, own_models.make()[1])
    save_file(torch_layout(other), tmp_path / "w.safetensors")
    plan = plan_of(weights=str(tmp_path / "w.safetensors"), flattened=("out.kernel:6x4x4",))
    (params,) = plan.params.values()
    assert params.keys() == flattened(other).keys()
    for name, value in flattened(other).items():
        np.testing.assert_allclose(params[name], value, rtol=1e-6)
    assert plan.identity["sha256"]["weights"] == modules.digest(params)  # an audit of others does not go on from theirs


def test_weights_drawn_at_random_go_on_only_from_a_file(monkeypatch, tiny_prior, tmp_path):
    """A run is of its weights: a function that is not seeded makes others in the next process."""
    made = "from own_models import *\nimport numpy as np\ndef drawn():\n    loss, params = make()\n"
    made += "    params['out']['bias'] = np.random.default_rng().normal(size=10).astype(np.float32)\n    return loss, params\n"
    (tmp_path / "random_model.py").write_text(made)
    np.savez(tmp_path / "w.npz", **flattened(own_models.make()[1]))
    monkeypatch.setattr(load, "run", lambda plan, question, store, *_: store.open({}))
    usual = dict(victim=f"{tmp_path / 'random_model.py'}:drawn", num_images=1)
    again = lambda out, **changes: audit_named(audit_config(tiny_prior, tmp_path / out, **usual, **changes))
    again("drawn")
    words = (
        r"holds another configuration .* where weights are drawn at random at each call, seed them, .* --weights does, or give"
    )
    with pytest.raises(ConfigError, match=words):
        again("drawn")
    with pytest.raises(ConfigError, match=r"holds another configuration \(.*\); give another folder"):
        again("drawn", seeds=2)
    for _ in range(2):
        again("from a file", weights=str(tmp_path / "w.npz"))


@pytest.mark.parametrize("steps", [1, 2])
def test_an_update_is_given_by_the_weights_at_its_ends(steps, plan_of, tiny_prior, tmp_path, capsys):
    """Of FedAvg: in the units in which `LocalSGD` releases what a client did."""
    loss, params = own_models.make()
    with np.load(tiny_prior / "images.npz") as data:
        x, y = jnp.asarray(data["images"][0] / np.float32(127.5) - 1), jnp.asarray(data["labels"][0])
    release = jax.jit(LocalSGD(0.1, steps, None).__call__, static_argnums=0)(loss, params, x, y)
    after = jax.tree.map(lambda w, g: w - 0.1 * steps * g, params, release)
    for name, weights in (("before", params), ("after", after)):
        np.savez(tmp_path / f"{name}.npz", **flattened(weights))
    files = dict(weights=str(tmp_path / "before.npz"), gradient=str(tmp_path / "after.npz"), update=True)
    given = dict(**files, label=0, num_images=1, mechanism="none", local_steps=steps)
    leak = plan_of(**given, local_learning_rate=0.1).leak
    for name, value in flattened(release).items():
        np.testing.assert_allclose(leak[name], value, atol=1e-5)
    assert "it is the model's own gradient at the image" in capsys.readouterr().out
    other = "the client had another learning rate than 0.01" + "; say --local_learning_rate=0.1$" * (steps == 1)
    with pytest.raises(ConfigError, match=other):
        plan_of(**given, local_learning_rate=0.01)
    config = audit_config(tiny_prior, "unused", **given)
    what = "1 local step" if steps == 1 else "2 local steps"
    assert f"it is of {what} at the learning rate 0.01" in config.assumed


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    _, params = own_models.make()
    flat = flattened(params)
    np.savez(folder / "missing.npz", **{k: v for k, v in flat.items() if k != "out.bias"})
    np.savez(folder / "zero.npz", **{k: np.zeros_like(v) for k, v in flat.items()})
    save_file(torch_layout(params), folder / "torch.safetensors")
    (folder / "empty").mkdir()
    return folder


G = dict(sigma_grid=(0.0,), label=0)
UNKNOWN = dict(images="")
# What is wrong, and words of the one line that says so: the value and the remedy. What may be wrong with a function, a loss, a
# file of weights or an order is in test_own_victims.py and test_saved_trees.py; here, that the command says it.
WRONG = [
    (dict(victim="resnet99"), ["resnet99", "known:"]),
    (dict(victim="{d}/nowhere.py:make"), ["nowhere.py", "cannot be imported"]),
    (dict(victim="{m}:nothing"), ["nothing", "it has", "make"]),
    (dict(victim="{m}:no_pair"), ["must return (loss, params)"]),
    (dict(victim="{m}:blind"), ["{m}:blind", "does not depend on the image"]),
    (dict(victim="{m}:sometimes", num_images=3), ["2 of 3 images (1, 2, counted from 0)"]),
    (dict(training_steps=5), ["--training_steps", "--victim {m}:make", "weights that its function returns"]),
    (dict(attacker="server"), ["--labels=inferred", "--victim {m}:make", "built-in networks only"]),
    (dict(mechanism="soteria:0.5"), ["--mechanism soteria:0.5", "built-in networks only"]),
    (dict(attacker="friend"), ["friend", "informed"]),
    (dict(mechanism="blur:3"), ["--mechanism: ", "blur", "gaussian"]),
    (dict(mechanism="clip"), ["the norm, above 0", "clip:1"]),
    (dict(methods=("magic",)), ["magic", "dsg"]),
    (dict(sigma_grid=(-1.0,)), ["-1.0", ">= 0"]),
    (dict(mechanism="gaussian", epsilon_grid=(1.0,)), ["--epsilon_grid", "clip:1+gaussian"]),
    (dict(delta=2.0), ["2.0", "(0, 1)"]),
    (dict(threshold=float("nan")), ["nan", "such as 20"]),
    (dict(share=1.5), ["1.5", "such as 0.1"]),
    (dict(spectra=-1), ["-1", "0 leaves"]),
    (dict(seeds=0), ["--seeds 0", "at least 1"]),
    (dict(num_images=99), ["99", "holds 6", "fewer"]),
    (dict(num_images=3, group=2), ["not a multiple", "4"]),
    (dict(label=99), ["99", "--num_classes"]),
    (dict(steps=5000), ["5000", "fewer"]),
    (dict(images="{d}/nowhere"), ["nowhere", "do not exist"]),
    (dict(images="{d}/empty"), ["empty", "no picture"]),
    (dict(prior="{d}/nowhere"), ["--prior", "nowhere"]),
    (dict(prior="cifar10-32"), ["(16, 16, 3)", "(32, 32, 3)", "--prior"]),
    (dict(candidates="{d}/nowhere"), ["--candidates", "nowhere"]),
    (dict(candidates="{one}", num_images=1), ["--candidates {one}", "nothing but the private images", "more images"]),
    (dict(data="{d}/nowhere"), ["--data", "nowhere"]),
    (dict(weights="{d}/nowhere.npz"), ["--weights", "nowhere.npz", "give a"]),
    (dict(weights="{d}/missing.npz"), ["--weights", "missing: out.bias"]),
    (dict(weights="{d}/torch.safetensors"), ["--weights", "flattened=out.kernel:CxHxW"]),
    (dict(weights="{d}/torch.safetensors", flattened=("out.kernel",)), ["--flattened", "out.kernel", "such as"]),
    (dict(weights="{d}/torch.safetensors", training_steps=3), ["leave one away"]),
    (dict(flattened=("out.kernel:6x4x4",)), ["--flattened", "give --weights or --gradient"]),
    (dict(update=True), ["--update", "--gradient"]),
    (dict(update=True, gradient="{d}/zero.npz"), ["--update", "--weights before"]),
    (dict(gradient="{d}/zero.npz", **G), ["zero everywhere"]),
    (dict(gradient="{d}/missing.npz", **G), ["--gradient", "missing: out.bias"]),
    (dict(gradient="{d}/zero.npz", label=99, **UNKNOWN), ["--label 99", "0..9"]),
    (dict(gradient="{d}/zero.npz", label=0, mechanism="soteria:0.5", **UNKNOWN), ["soteria:0.5", "give --images"]),
    (dict(gradient="{d}/zero.npz", label=0, sigma_grid=(0.0, 0.1)), ["--sigma_grid names 2", "--sigma_grid=0"]),
    (dict(gradient="{d}/zero.npz", epsilon_grid=(1.0,), **G), ["one noise level", "--sigma_grid=0"]),
    (dict(gradient="{d}/zero.npz", group=3, **G), ["--group 3"]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda i: f"{i}-{next(iter(WRONG[i][0]))}")
def test_a_wrong_input_is_named_with_its_remedy_before_anything_is_computed(number, tiny_prior, bad_files, tmp_path):
    changes, words = WRONG[number]
    with np.load(tiny_prior / "images.npz") as data:
        np.savez(tmp_path / "one.npz", images=data["images"][:1], labels=data["labels"][:1])
    put = lambda v: v.format(d=bad_files, m=MODELS, one=tmp_path / "one.npz") if isinstance(v, str) else v
    c = audit_config(tiny_prior, tmp_path / "out", **{k: put(v) for k, v in changes.items()})
    with pytest.raises(ConfigError) as error:
        audit_named(c)
    for word in map(put, words):
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def documented(tmp_path):
    """The file that docs/audit.md shows, as it is but for the size of the test's images."""
    text = (ROOT / "docs" / "audit.md").read_text()
    code = textwrap.dedent(re.search(r"```python\n(# my_model.py.*?)```", text, re.DOTALL)[1])
    assert "8 * 8 * 32" in code
    Path(tmp_path / "my_model.py").write_text(code.replace("8 * 8 * 32", "4 * 4 * 32"))
    return f"{tmp_path / 'my_model.py'}:make"


PARAMETERS = 27 * 16 + 16 + 9 * 16 * 32 + 32 + 512 * 10 + 10


def test_the_model_of_the_documentation_is_taken(plan_of, documented):
    plan = plan_of(victim=documented)
    assert plan.size(documented) == PARAMETERS
    assert sys.modules["my_model"].Net is not None


@pytest.mark.long
def test_the_model_of_the_documentation_is_audited(tiny_prior, documented, tmp_path):
    audit = audit_named(audit_config(tiny_prior, tmp_path / "out", victim=documented))
    assert audit.about["parameters"] == PARAMETERS
    assert np.isfinite([r["psnr"] for r in audit.attacks]).all()


def test_what_other_images_would_tell_is_left_out_where_there_are_none(tiny_prior, tmp_path, monkeypatch, capsys):
    """Only `--candidates` that were named, and hold nothing else, are an error."""
    with np.load(tiny_prior / "images.npz") as data:
        np.savez(tmp_path / "one.npz", images=data["images"][:1], labels=data["labels"][:1])
    asked = {}
    monkeypatch.setattr(load, "run", lambda plan, question, *_: asked.update(question=question))
    audit_named(audit_config(tiny_prior, tmp_path / "out", images=str(tmp_path / "one.npz"), num_images=1))
    assert len(asked["question"].candidates) == 1
    assert "left out; --candidates names others" in capsys.readouterr().out


def test_a_part_of_the_report_that_fails_is_named_and_the_rest_is_there(tiny_prior, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")

    monkeypatch.setattr(run, "_theory", fail)
    monkeypatch.setattr(run, "_film", lambda *_: [])
    audit = audit_named(audit_config(tiny_prior, tmp_path / "out"))
    assert np.isfinite([r["psnr"] for r in audit.attacks]).all()
    assert audit.theory is None
    (line,) = [text for text in audit.warnings() if "Left out" in text]
    assert line == "Left out, because it failed: theory (RuntimeError: RESOURCE_EXHAUSTED: out of memory)."
    page = audit.report(tmp_path / "page").read_text(encoding="utf-8")
    assert "RESOURCE_EXHAUSTED" in page
