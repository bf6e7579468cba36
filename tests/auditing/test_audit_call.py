"""An audit by its call: the same trials as by the command, a folder to go on from, other clients, attackers and methods."""

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
from tiny import QUICK_AUDIT, Still, clipped, without_time

import gdiff_jax as gd
from gdiff_jax.auditing import run as auditing
from gdiff_jax.auditing.own_mechanism import code_of
from gdiff_jax.mechanisms import Chain, Clip, GaussianNoise
from gdiff_jax.methods import DPS, DSG, InvertingGradients
from gdiff_jax.pytrees import pytree
from gdiff_jax.sweeping import run as engine
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.config import Client
from gdiff_jax.theory.summary import summarise
from gdiff_jax.victims import networks


def test_the_call_and_the_command_find_the_same(small, prior, data):
    (loss, params), (images, labels) = own_models.make(), data
    options = dict(prior=prior, sigmas=(0.1, 0, 1), mechanism=clipped, candidates=images, more=(images[3:], labels[3:]))
    methods = (InvertingGradients(steps=3), "calibrated-mean")
    audit = gd.audit(loss, params, images[:3], labels[:3], methods=methods, **options, **QUICK_AUDIT)
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
    assert (audit.worst["measured"], audit.worst["places"]) == (6, theirs.worst["places"])
    np.testing.assert_allclose(audit.worst["expected"], theirs.worst["expected"], rtol=1e-3)
    assert "<table>" in audit._repr_html_()
    assert "Audit of the model" in repr(audit)


def fail(*_):
    raise AssertionError("computed again")


@pytest.fixture(scope="module")
def kept(plain_prior, data, tmp_path_factory):
    """An audit with a folder, to be called again with other arguments, and its first answer."""
    (loss, params), (images, labels) = own_models.make(), data
    usual = dict(loss=loss, params=params, images=images[:2], labels=labels[:2], sigmas=(0, 1), mechanism=clipped)
    usual |= dict(prior=plain_prior, methods=[Still()], folder=tmp_path_factory.mktemp("audit") / "kept", **QUICK_AUDIT)
    again = lambda **changes: gd.audit(**{**usual, **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "_theory", lambda *_: None)
        patch.setattr(auditing, "_film", lambda *_: [])
        patch.setattr(auditing, "measured", lambda *_: None)
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


@pytree
class Halved(Clip):
    """Another mechanism that is written as the first one is."""

    def simulate(self, gradient, leak):
        return jax.tree.map(lambda g: g / 2, super().simulate(gradient, leak))

    def __repr__(self):
        return repr(Clip(self.norm))


def test_a_folder_of_another_audit_is_refused_and_what_changed_is_named(kept, monkeypatch):
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
        with pytest.raises(ValueError, match=rf"holds another configuration \(.*sha256 of {name} is another\)") as error:
            again(**changes)
        assert "--" not in str(error.value)
        assert ("seed them, as by torch.manual_seed(0), or load" in str(error.value)) == (name == "params")
    with pytest.raises(ValueError, match="sha256 of images and labels is another"):
        again(labels=labels)
    with pytest.raises(ValueError, match="sha256 of mechanism is another"):  # of the same name and numbers
        again(mechanism=lambda s: Chain((Halved(1.0), GaussianNoise(s))))
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
    return float(np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(jax.device_get(gradient)))))


def test_groups_are_scored_image_by_image_whatever_their_labels(plain_prior, data, tmp_path):
    images, _ = data
    options = dict(prior=plain_prior, sigmas=(0,), methods=[Still()], **QUICK_AUDIT)
    audit = gd.audit(mean_loss, PARAMS, images[:4], TREE, client=gd.sweeping.config.Client(group=2), **options)
    assert [r["leak"] for r in audit.at(0.0)] == [0, 0, 2, 2]
    assert [r["image"] for r in audit.at(0.0)] == [0, 1, 2, 3]
    assert [r["label"] for r in audit.at(0.0)] == [[i, pytest.approx(w)] for i, w in enumerate(TREE["weight"].tolist())]
    gradient_of = jax.jit(jax.grad(mean_loss))
    for first, row in zip((0, 0, 2, 2), audit.at(0.0), strict=True):
        pair = slice(first, first + 2)
        x = jnp.asarray(images[pair] / np.float32(127.5) - 1)
        gradient = gradient_of(PARAMS, x, jax.tree.map(lambda a, pair=pair: jnp.asarray(a[pair]), TREE))
        assert row["gradient_norm"] == pytest.approx(norm_of(gradient), rel=1e-4)
    assert audit.theory is None
    audit.report(tmp_path / "out")
    assert "4 images" not in audit.verdict()
    assert "2 groups of 2 images" in audit.verdict()


def test_labels_of_one_image_may_be_a_pytree_too(plain_prior, data, attacks_alone):
    two = jax.tree.map(lambda a: a[:2], TREE)
    audit = gd.audit(single_loss, PARAMS, data[0][:2], two, prior=plain_prior, sigmas=(0,), methods=[Still()], **QUICK_AUDIT)
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


def test_a_client_may_make_local_steps(plain_prior, data, attacks_alone):
    (loss, params), (images, labels) = own_models.make(), data
    client = Client(local_steps=2, local_learning_rate=0.5)
    options = dict(prior=plain_prior, sigmas=(0,), methods=[Still()], client=client, **QUICK_AUDIT)
    audit = gd.audit(loss, params, images[:2], labels[:2], **options)
    assert "2 local steps" in audit.about["threat_model"]
    gradient_of, params = jax.jit(jax.grad(loss)), jax.device_get(params)
    for row in audit.attacks:
        x, y = jnp.asarray(images[row["image"]] / np.float32(127.5) - 1), jnp.asarray(labels[row["image"]])
        first = jax.device_get(gradient_of(params, x, y))
        second = jax.device_get(gradient_of(jax.tree.map(lambda p, g: p - 0.5 * g, params, first), x, y))
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        assert row["gradient_norm"] == pytest.approx(norm_of(mean), rel=1e-4)
        assert row["gradient_norm"] != pytest.approx(norm_of(first), rel=1e-2)


@pytest.fixture(scope="module")
def victim():
    """A `Victim` with one hidden layer, and its weights."""
    victim = gd.Victim(networks.MLP, (16, 16, 3), 10, (("widths", (16,)),))
    return victim, victim.init(jax.random.key(1))


def test_of_a_victim_labels_are_inferred(victim, plain_prior, data, attacks_alone):
    """Right without noise, and not under much of it: they are read off the leak."""
    images, labels = data
    options = dict(prior=plain_prior, sigmas=(0, 1e4), methods=[Still()], attacker="server", **QUICK_AUDIT)
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
    assert methods(*own_models.make()) == ["auto"]
    assert methods(*own_models.mlp()) == ["auto", "analytic", "analytic-dsg"]
    assert methods(*victim, client=Client(group=2)) == ["auto"]
    assert methods(*victim, attacker="eavesdropper") == ["auto", "analytic"]
    assert methods(*victim, client=Client(local_steps=2)) == ["auto", "analytic", "analytic-dsg"]
    search = lambda **options: planned(*victim, images, labels, **options).methods["auto"].search.name
    assert search() == "calibrated-mean"
    assert search(attacker="eavesdropper") == search(client=Client(local_steps=2)) == "dsg-mean"
    assert methods(*victim, methods=("dsg",)) == ["dsg"]


def test_dlg_looks_for_the_labels_where_the_attacker_is_to(planned, victim, data):
    plan = planned(*victim, *data, methods=("dlg",), attacker=Attacker("server", labels="joint"))
    assert plan.methods["dlg"].joint_labels
    assert not planned(*victim, *data, methods=("dlg",)).methods["dlg"].joint_labels


def test_an_attacker_knows_the_noise_and_not_the_level_that_a_mechanism_calls_it(plain_prior, data):
    """Which has units of its own, such as multiples of the norm to which it clips."""
    seen = []

    @pytree
    class Seen(Still):
        def __call__(self, key, problem):
            jax.debug.callback(lambda sigma: seen.append(float(sigma)), problem.sigma)
            return super().__call__(key, problem)

    (loss, params), (images, labels) = own_models.make(), data
    mechanism = lambda z: Chain((Clip(4.0), GaussianNoise(4 * z)))
    options = dict(prior=plain_prior, methods=[Seen()], **QUICK_AUDIT)
    gd.audit(loss, params, images[:1], labels[:1], sigmas=(0.5,), mechanism=mechanism, **options)
    jax.effects_barrier()
    assert set(seen) == {2.0}


def test_a_method_is_another_where_its_source_or_its_arrays_are():
    one, other = (code_of([Still(shade)]) for shade in (np.zeros(3000), np.eye(1, 3000, 1500)[0]))  # elided in its text
    assert one != other
    assert code_of([DSG()]) == code_of([DSG()]) != code_of([DSG(), Still()])


def test_folders_are_not_compared_in_place_of_audits():
    with pytest.raises(ValueError, match=r"Audit\.load\('runs/a/audit\.json'\)"):
        gd.compare("runs/a", "runs/b")
