"""An audit by its call: the same trials as by the command, a folder to go on from, other clients, attackers and methods."""

import ast
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
from tiny import Still, without_time

import gdiff_jax as gd
from gdiff_jax.auditing import call
from gdiff_jax.auditing import run as auditing
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise
from gdiff_jax.methods import DPS, DSG, InvertingGradients
from gdiff_jax.sweeping import run as engine
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.config import Client
from gdiff_jax.theory.summary import summarise
from gdiff_jax.victims import networks

QUICK = dict(steps=3, batch=4, seeds=1, progress=False)


def clipped(sigma):
    return Chain((Clip(1.0), GaussianNoise(sigma)))


@pytest.fixture(scope="module")
def prior(tiny_prior):
    return gd.load_prior(tiny_prior / "prior")


@pytest.fixture(scope="module")
def data(tiny_prior):
    """Six images, labelled 0 .. 5."""
    with np.load(tiny_prior / "images.npz") as file:
        return file["images"], file["labels"]


@pytest.fixture
def attacks_alone(monkeypatch):
    monkeypatch.setattr(auditing, "_theory", lambda *_: None)
    monkeypatch.setattr(auditing, "_film", lambda *_: [])


@pytest.fixture
def planned(monkeypatch, prior):
    """What would be run, of the call's arguments."""
    monkeypatch.setattr(call, "run", lambda plan, *_: plan)
    return lambda *arguments, **options: gd.audit(*arguments, **{"prior": prior, **QUICK, **options})


def test_the_call_and_the_command_find_the_same(small, prior, data):
    (loss, params), (images, labels) = own_models.make(), data
    options = dict(prior=prior, sigmas=(0.1, 0, 1), mechanism=clipped, candidates=images)
    methods = (InvertingGradients(steps=3), "calibrated-mean")
    audit = gd.audit(loss, params, images[:3], labels[:3], methods=methods, **options, **QUICK)
    theirs = gd.Audit.load(small / "audit.json")
    key = lambda r: (r["method"], r["sigma"] or 0, r["image"], r["seed"])
    ours, other = (sorted(a.trials, key=key) for a in (audit, theirs))
    assert [key(r) for r in ours] == [key(r) for r in other]
    assert len(ours) == 3 * (1 + 2 * 3)
    for a, b in zip(ours, other, strict=True):
        for name in ("psnr", "ssim", "mse", "rank", "leak", "failed"):
            assert a[name] == pytest.approx(b[name], rel=2e-3), name
        if a["method"] != "prior-only":
            assert a["distance"] == pytest.approx(b["distance"], rel=2e-3)
    assert audit.guarantees == theirs.guarantees
    assert audit.about["clip_norm"] == theirs.about["clip_norm"] == 1
    assert "Clip(norm=1.0), GaussianNoise(sigma=sigma)" in audit.about["mechanism"]
    assert audit.guarantees[1]["epsilon"] > 0
    assert audit.theory["rv"] == pytest.approx(theirs.theory["rv"], rel=1e-4)
    assert audit.theory["spectra"][0]["lambda_max"] == pytest.approx(theirs.theory["spectra"][0]["lambda_max"], rel=1e-6)
    assert audit.pictures.keys() == theirs.pictures.keys()
    assert "<table>" in audit._repr_html_()
    assert "Audit of the model" in repr(audit)


def fail(*_):
    raise AssertionError("computed again")


@pytest.fixture(scope="module")
def kept(prior, data, tmp_path_factory):
    """An audit with a folder, to be called again with other arguments, and its first answer."""
    (loss, params), (images, labels) = own_models.make(), data
    usual = dict(loss=loss, params=params, images=images[:2], labels=labels[:2], sigmas=(0, 1), mechanism=clipped)
    usual |= dict(prior=prior, methods=[Still()], folder=tmp_path_factory.mktemp("audit") / "kept", **QUICK)
    again = lambda **changes: gd.audit(**{**usual, **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "_theory", lambda *_: None)
        patch.setattr(auditing, "_film", lambda *_: [])
        yield again, again()


def test_a_call_with_a_folder_goes_on_from_there(kept, monkeypatch, tmp_path):
    again, first = kept
    assert without_time(again(folder=None).trials) == without_time(first.trials)
    describe = engine.describe
    monkeypatch.setattr(engine, "describe", interrupted_after(1, describe))
    with pytest.raises(KeyboardInterrupt) as interrupt:  # which is kept, with all that it holds, as in a notebook
        again(folder=tmp_path / "interrupted")
    monkeypatch.setattr(engine, "describe", describe)
    done = [path.name for path in (tmp_path / "interrupted" / "chunks").glob("*.jsonl")]
    assert done == ["00000.jsonl"]
    assert without_time(again(folder=tmp_path / "interrupted").trials) == without_time(first.trials)
    del interrupt
    monkeypatch.setattr(engine, "compute", fail)
    # Also where another threshold is asked for, or the same in other objects: they change no trial.
    asked = dict(threshold=5.0, share=0.5, delta=1e-6, name="it", methods=(Still(0.0),), mechanism=lambda s: clipped(s))
    second = again(**asked)
    assert second.trials == [{**row, "victim": row["victim"]} for row in first.trials]
    assert (second.about["threshold"], second.about["victim"]) == (5.0, "it")


def interrupted_after(chunks, describe):
    calls = []

    def describe_some(*arguments):
        calls.append(arguments)
        if len(calls) > chunks:
            raise KeyboardInterrupt
        return describe(*arguments)

    return describe_some


def test_a_folder_of_another_audit_is_refused_with_both_values(kept, monkeypatch):
    again, first = kept
    monkeypatch.setattr(engine, "compute", fail)
    loss, params = own_models.make()
    images, labels = np.zeros((2, 16, 16, 3), np.uint8), np.array([3, 4])
    other = {
        "loss": dict(loss=lambda p, x, y: 2 * loss(p, x, y)),
        "params": dict(params=jax.tree.map(lambda p: 2 * p + 0.1, params)),
        "images and labels": dict(images=images),
    }
    for name, changes in other.items():
        with pytest.raises(ValueError, match="holds another configuration") as error:
            again(**changes)
        was, now = map(ast.literal_eval, re.search(r"sha256 was (\{.*?\}), is (\{.*?\})", str(error.value)).groups())
        assert [key for key in was if was[key] != now[key]] == [name]
        assert re.fullmatch("[0-9a-f]{64} [0-9a-f]{64}", f"{was[name]} {now[name]}")
        assert "--" not in str(error.value)
    with pytest.raises(ValueError, match="sha256 was"):
        again(labels=labels)
    for changes, words in (
        (dict(seed=7), "seed was 0, is 7"),
        (dict(seeds=2), "seeds was 1, is 2"),
        (dict(steps=2), "steps was 3, is 2"),
        (dict(batch=1), "batch was 4, is 1"),
        (dict(sigmas=(0, 0.5)), r"sigmas was \{.*: \[0.0, 1.0\]\}, is \{.*: \[0.0, 0.5\]\}"),
        (dict(mechanism=lambda s: Chain((Clip(2.0), GaussianNoise(s)))), r"sigmas was \{.*norm=1.0.*is \{.*norm=2.0"),
        (dict(methods=[Still(0.3)]), r"methods was .*shade=0.0.*is .*shade=0.3"),
        (dict(attacker=Attacker(adaptive=False)), "adaptive was True, is False"),
        (dict(client=Client(local_steps=2)), "local_steps was 1, is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            again(**changes)
    assert again().trials == first.trials  # and is left alone


def mean_loss(params, x, y):
    """Of a batch; labels are a pytree."""
    logits = jnp.tanh(x.reshape(len(x), -1) @ params["w"])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y["class"][:, None], 1)[:, 0]
    return -(y["weight"] * chosen).mean()


def single_loss(params, x, y):
    return mean_loss(params, x[None], jax.tree.map(lambda a: a[None], y))


PARAMS = {"w": jax.random.normal(jax.random.key(0), (768, 10)) / 30}
TREE = {"class": np.arange(4), "weight": np.linspace(0.5, 1, 4, dtype=np.float32)}


def norm_of(gradient):
    return float(jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))))


def test_groups_are_scored_image_by_image_whatever_their_labels(prior, data, tmp_path):
    images, _ = data
    options = dict(prior=prior, sigmas=(0,), methods=[Still()], **QUICK)
    audit = gd.audit(mean_loss, PARAMS, images[:4], TREE, client=gd.sweeping.config.Client(group=2), **options)
    assert [r["leak"] for r in audit.at(0.0)] == [0, 0, 2, 2]
    assert [r["image"] for r in audit.at(0.0)] == [0, 1, 2, 3]
    assert [r["label"] for r in audit.at(0.0)] == [[i, pytest.approx(w)] for i, w in enumerate(TREE["weight"].tolist())]
    for first, row in zip((0, 0, 2, 2), audit.at(0.0), strict=True):
        pair = slice(first, first + 2)
        x = jnp.asarray(images[pair] / np.float32(127.5) - 1)
        gradient = jax.grad(mean_loss)(PARAMS, x, jax.tree.map(lambda a, pair=pair: jnp.asarray(a[pair]), TREE))
        assert row["gradient_norm"] == pytest.approx(norm_of(gradient), rel=1e-4)
    assert audit.theory is None
    audit.report(tmp_path / "out")
    assert "4 images" not in audit.verdict()
    assert "2 groups of 2 images" in audit.verdict()


def test_labels_of_one_image_may_be_a_pytree_too(prior, data, attacks_alone):
    two = jax.tree.map(lambda a: a[:2], TREE)
    audit = gd.audit(single_loss, PARAMS, data[0][:2], two, prior=prior, sigmas=(0,), methods=[Still()], **QUICK)
    assert [r["label"][0] for r in audit.attacks] == [0, 1]


def test_theory_takes_such_labels():
    """As it takes integers: the same loss, of a label and a weight of 1 or of the label alone."""
    x = np.random.default_rng(0).uniform(-1, 1, (2, 2, 2, 3)).astype(np.float32)
    params, labels = {"w": PARAMS["w"][:12]}, np.array([3, 1])
    tree = {"class": labels, "weight": np.ones(2, np.float32)}
    plain = lambda p, x, y: single_loss(p, x, {"class": y, "weight": jnp.ones(())})
    both = ((plain, labels), (single_loss, tree))
    summaries = [summarise(jax.random.key(0), loss, params, x, y, (0.1,), probes=2) for loss, y in both]
    for name, value in summaries[1].items():
        if name != "spectra":
            assert value == pytest.approx(summaries[0][name], rel=1e-4), name
    expected, eigenvalues = (summary["spectra"][0]["eigenvalues"] for summary in summaries)
    np.testing.assert_allclose(eigenvalues, expected, atol=1e-12)


def test_a_client_may_make_local_steps(prior, data, attacks_alone):
    (loss, params), (images, labels) = own_models.make(), data
    client = Client(local_steps=2, local_learning_rate=0.5)
    options = dict(prior=prior, sigmas=(0,), methods=[Still()], client=client, **QUICK)
    audit = gd.audit(loss, params, images[:2], labels[:2], **options)
    assert "2 local steps" in audit.about["threat_model"]
    for row in audit.attacks:
        x, y = jnp.asarray(images[row["image"]] / np.float32(127.5) - 1), jnp.asarray(labels[row["image"]])
        first = jax.grad(loss)(params, x, y)
        second = jax.grad(loss)(jax.tree.map(lambda p, g: p - 0.5 * g, params, first), x, y)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        assert row["gradient_norm"] == pytest.approx(norm_of(mean), rel=1e-4)
        assert row["gradient_norm"] != pytest.approx(norm_of(first), rel=1e-2)


@pytest.fixture(scope="module")
def victim():
    """A `Victim` with one hidden layer, and its weights."""
    victim = gd.Victim(networks.MLP, (16, 16, 3), 10, (("widths", (16,)),))
    return victim, victim.init(jax.random.key(1))


def test_of_a_victim_labels_are_inferred(victim, prior, data, attacks_alone):
    """Right without noise, and not under much of it: they are read off the leak."""
    images, labels = data
    options = dict(prior=prior, sigmas=(0, 1e4), methods=[Still()], attacker="server", **QUICK)
    audit = gd.audit(*victim, images, labels, **options)
    assert {r["labels"] for r in audit.trials} == {"inferred"}
    assert [r["label_accuracy"] for r in audit.at(0.0)] == [1] * 6
    assert np.mean([r["label_accuracy"] for r in audit.at(1e4)]) < 1
    assert "Labels are inferred from the last layer's gradient" in audit.about["threat_model"]
    assert "'server'" in audit.about["threat_model"]


def test_methods_are_names_or_objects(planned, data):
    (loss, params), (images, labels) = own_models.make(), data
    mine = DPS(zeta=3.0)
    plan = planned(loss, params, images, labels, methods=("dsg", mine))
    assert list(plan.methods) == ["dsg", "dps"]
    assert plan.methods["dsg"] == DSG()
    assert plan.methods["dps"] is mine


def test_without_methods_the_call_runs_what_its_attacker_can(planned, victim, data):
    images, labels = data
    methods = lambda *model, **options: list(planned(*model, images, labels, **options).methods)
    assert methods(*own_models.make()) == ["dsg", "calibrated-mean"]
    assert methods(*own_models.mlp()) == ["dsg", "calibrated-mean", "analytic", "analytic-dsg"]
    assert methods(*victim, client=Client(group=2)) == ["dsg", "calibrated-mean"]
    assert methods(*victim, attacker="eavesdropper") == ["dsg", "dps", "analytic"]
    assert methods(*victim, client=Client(local_steps=2)) == ["dsg", "dps", "analytic", "analytic-dsg"]
    assert methods(*victim, methods=("dsg",)) == ["dsg"]


def test_dlg_looks_for_the_labels_where_the_attacker_is_to(planned, victim, data):
    plan = planned(*victim, *data, methods=("dlg",), attacker=Attacker("server", labels="joint"))
    assert plan.methods["dlg"].joint_labels
    assert not planned(*victim, *data, methods=("dlg",)).methods["dlg"].joint_labels


LOSS = lambda params, x, y: (params["w"] * jnp.sin(x)).sum()
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
# What is wrong, and what is said of it: the value and the remedy, in the words of the call, whose arguments are no flags.
WRONG = [
    (dict(images=np.zeros((2, 8, 8, 3))), r"images are \(2, 8, 8, 3\).*resize"),
    (dict(images=np.full((2, 16, 16, 3), 7.0)), r"2 \* x - 1"),
    (dict(images=np.full((2, 16, 16, 3), np.nan)), r"2 \* x - 1"),
    (dict(images=IMAGES[:0]), r"images are \(0, 16, 16, 3\)"),
    (dict(labels=np.zeros(3)), "one for each of 2"),
    (dict(labels={}), "one for each of 2"),
    (dict(prior="no-such-prior"), "'no-such-prior' is no file or folder"),
    (dict(prior=3), "prior 3 is no name"),
    (dict(sigmas=()), "standard deviations"),
    (dict(sigmas=(-1,)), "standard deviations"),
    (dict(sigmas=(1, 1.0)), "without repeats"),
    (dict(sigmas=("much",)), "sigmas 'much' is not a number"),
    (dict(mechanism=GaussianNoise(1.0)), "mechanism fails.*a function of a noise level, such as GaussianNoise"),
    (dict(mechanism=lambda s: 3), "mechanism fails.*TypeError"),
    (dict(mechanism=lambda s: lambda key, g: {}), "mechanism changes the shape"),
    (dict(methods=("magic",)), "method 'magic' is not known; known: dsg, .*or objects of gdiff_jax.methods"),
    (dict(methods=(3,)), "method 3 is not known"),
    (dict(methods="dsg"), "method 'd' is not known"),
    (dict(methods=("dsg", DSG(0.3))), "methods name dsg more than once"),
    (dict(methods=("analytic",)), "method analytic needs a first layer that is dense"),
    (dict(methods=("calibrated-mean",), attacker=Attacker(adaptive=False)), "method calibrated-mean draws from the mechanism"),
    (dict(methods=("calibrated-dsg",), client=Client(local_steps=2)), "method calibrated-dsg draws from the mechanism"),
    (dict(methods=(gd.methods.DLG(joint_labels=True),)), r'attacker=Attacker\("server", labels="joint"\)'),
    (dict(attacker="friend"), "attacker 'friend' is not known; known: informed, server, eavesdropper"),
    (dict(attacker=Attacker(labels="some")), "labels 'some' is not known; known: known, inferred, joint"),
    (dict(attacker="server"), r"'server' infers labels.*gdiff_jax.Victim only; give one in place of the loss, or Attacker\("),
    (dict(client=2), r"client 2 is no .*such as Client\(group=2\)"),
    (dict(client=Client(group=0)), "group 0 must be at least 1"),
    (dict(client=Client(group=3)), "2 images do not divide into groups of 3; give a multiple"),
    (dict(client=Client(local_learning_rate=0.0)), "local_learning_rate 0.0 must be finite and above 0"),
    (dict(client=Client(group=2, local_batch=1)), "ask for more local_steps, or leave local_batch at 0"),
    (dict(seeds=0), "seeds 0"),
    (dict(seeds=1.5), "seeds 1.5 must be a whole number"),
    (dict(seed="a"), "seed 'a' must be a whole number"),
    (dict(batch=0), "batch 0"),
    (dict(steps=0), "steps 0"),
    (dict(steps=5000), "ask for fewer"),
    (dict(threshold=np.inf), "threshold inf"),
    (dict(threshold="high"), "threshold 'high'"),
    (dict(share=0), "share 0"),
    (dict(delta=1), "delta 1"),
    (dict(candidates=np.zeros((2, 8, 8, 3))), r"candidates are \(2, 8, 8, 3\)"),
    (dict(candidates=IMAGES[:1], images=IMAGES[:1], labels=np.zeros(1)), "candidates hold nothing but the private images"),
    (dict(params={}), "no array"),
    (dict(params={"w": 1.0}), "float"),
    (dict(loss=lambda p, x, y: p["w"] * x), "floating scalar"),
    (dict(loss=lambda p, x, y: (p["w"] * x.reshape(7)).sum()), r"loss\(params, x, y\) failed"),
    (dict(loss=lambda p, x, y: jnp.where(y == 0, 1, jnp.inf) * LOSS(p, x, y), labels=np.arange(2)), r"1 of 2 images \(1, "),
    (dict(folder=__file__), "is not a sweep's output; give another folder"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda i: f"{i}-{next(iter(WRONG[i][0]))}")
def test_the_call_says_what_is_wrong_before_anything_is_computed(number, planned):
    changes, words = WRONG[number]
    arguments = dict(loss=LOSS, params={"w": jnp.ones((16, 16, 3))}, images=IMAGES, labels=np.zeros(2), methods=("dsg",))
    arguments |= changes
    with pytest.raises(ValueError, match=words) as error:
        planned(**arguments)
    assert "--" not in str(error.value)


SERVER = Attacker("server")
WRONG_OF_VICTIMS = [
    (dict(labels=np.arange(6) + 5), "labels 5..10 go beyond the victim's classes, 0..9"),
    (dict(labels=np.eye(10, dtype=np.float32)[:6]), r"float32 \(6, 10\); this attacker infers integers"),
    (dict(params={}), "no array"),
    (dict(client=Client(local_steps=2), attacker="eavesdropper", methods=("analytic-dsg",)), "analytic-dsg draws from"),
    (
        dict(client=Client(local_steps=2), attacker=Attacker("server", local_rate="guessed"), mechanism=clipped),
        r'which this attacker guesses; give Attacker\("...", local_rate="known"\)',
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG_OF_VICTIMS)))
def test_so_it_does_of_a_victim(number, planned, victim, data):
    changes, words = WRONG_OF_VICTIMS[number]
    arguments = dict(loss=victim[0], params=victim[1], images=data[0], labels=data[1], attacker="server") | changes
    with pytest.raises(ValueError, match=words) as error:
        planned(**arguments)
    assert "--" not in str(error.value)


def test_so_it_does_of_batch_norms(planned, data):
    normed = gd.victims.zoo.make_victim("cnn-batchnorm", (16, 16, 3), 10)
    weights = normed.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r'2 local steps; give Attacker\("...", statistics="batch"\)'):
        planned(normed, weights, *data, client=Client(local_steps=2))
    joint = Attacker("server", labels="joint", statistics="replaced")
    with pytest.raises(ValueError, match="dlg can optimise labels only with the candidate's own"):
        planned(normed, weights, *data, methods=("dlg",), attacker=joint)


class Large:
    """A program that no memory holds."""

    def lower(self, *_):
        return self

    compile = lower

    def memory_analysis(self):
        return SimpleNamespace(argument_size_in_bytes=0, output_size_in_bytes=0, temp_size_in_bytes=2**60)


def test_what_the_engine_says_of_memory_names_no_flag(prior, data, monkeypatch):
    monkeypatch.setattr(engine.trials, "make_runner", lambda *_: Large())
    with pytest.raises(ValueError, match=r"one trial of prior-only needs 1073741824.00 GiB") as error:
        gd.audit(LOSS, {"w": jnp.ones((16, 16, 3))}, *data, prior=prior, methods=("dsg",), **QUICK)
    assert "--" not in str(error.value)
