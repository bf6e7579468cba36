"""What is said of arguments that an audit's call cannot use: the value and the remedy, before anything is computed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK_AUDIT, clipped

import gdiff_jax as gd
from gdiff_jax.mechanisms import Clip, GaussianNoise
from gdiff_jax.methods import DSG
from gdiff_jax.sweeping import run as engine
from gdiff_jax.sweeping.attackers import Attacker
from gdiff_jax.sweeping.config import Client
from gdiff_jax.victims import networks


@pytest.fixture(scope="module")
def victim():
    """A `Victim` with one hidden layer, and its weights."""
    victim = gd.Victim(networks.MLP, (16, 16, 3), 10, (("widths", (16,)),))
    return victim, victim.init(jax.random.key(1))


LOSS = lambda params, x, y: (params["w"] * jnp.sin(x)).sum()
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
# What is wrong, and what is said of it: the value and the remedy, in the words of the call, whose arguments are no flags.
CLASSES = lambda params, x, y: -jax.nn.log_softmax((params["w"] * jnp.sin(x)).sum((0, 1)))[y]
WRONG = [
    (dict(images=np.zeros((2, 8, 8, 3))), r"images are \(2, 8, 8, 3\).*resize"),
    (dict(images=np.full((2, 16, 16, 3), 7.0)), r"2 \* x - 1"),
    (dict(images=np.full((2, 16, 16, 3), np.nan)), r"2 \* x - 1"),
    (dict(images=IMAGES[:0]), r"images are \(0, 16, 16, 3\)"),
    (dict(images=IMAGES / 255), r"images are float64 in 0\.\.1, which is the range \[0, 1\].*2 \* x - 1"),
    (dict(images=IMAGES.astype(np.uint16) * 257), r"images are uint16 in .*0\.\.255 is needed"),
    (dict(images=IMAGES.transpose(0, 3, 1, 2)), r"\(2, 3, 16, 16\).*channels come last: images\.transpose\(0, 2, 3, 1\)"),
    (dict(images=IMAGES[..., :1]), r"np\.repeat\(images, 3, -1\)"),
    (dict(images=IMAGES[..., 0]), r"images\[\.\.\., None\]"),
    (dict(images=IMAGES[0]), r"one image is images\[None\]"),
    (dict(images=[IMAGES[0], IMAGES[1, :8]]), "several shapes|inhomogeneous"),
    (dict(images="photos"), r"images are 'photos', which is a name; give an array, such as .*load_images\('photos'\)\.images"),
    (dict(images=IMAGES.astype("U3")), "images are <U3; give uint8"),
    (dict(images=IMAGES.astype(object)), "images are ndarray of no numbers"),
    (dict(candidates=IMAGES / 255), r"candidates are float64 in 0\.\.1, which is the range \[0, 1\]"),
    (dict(labels=np.array(["cat", "dog"])), r"labels are text .*'cat'.*integers 0 \.\. classes - 1"),
    (dict(labels=["cat", "dog"]), r"labels are text"),
    (dict(labels=[0, 2**40]), "labels are int64 that do not fit into 32 bits"),  # and are not 0, their lower bits
    (dict(labels=[0, None]), "labels are list of no numbers"),
    (dict(labels=[[0, 1], [2]]), "labels cannot be made an array"),
    (dict(labels=[np.arange(2), np.arange(2)]), r"labels are a list of 2 arrays \(2,\).*np\.stack\(labels\).*tuple"),
    (dict(loss=CLASSES, labels=np.array([0, -1])), r"label -1 of image 1 is none .* leave out"),
    (dict(loss=CLASSES, labels=[3, 1]), r"label 3 of image 0 is none of the loss's classes, 0 \.\. 2; count them from 0"),
    (dict(labels=np.zeros(3)), "one for each of 2"),
    (dict(labels={}), "one for each of 2"),
    (dict(prior="no-such-prior"), "'no-such-prior' is no file or folder"),
    (dict(prior=3), "prior 3 is no name"),
    (dict(sigma_grid=()), "sigma_grid .* standard deviations"),
    (dict(sigmas=(-1,)), "standard deviations"),
    (dict(sigma_grid=(1, 1.0)), "without repeats"),
    (dict(sigmas=("much",)), "sigma_grid 'much' is not a number"),
    (dict(sigmas=(0,), sigma_grid=(0,)), "two names of one argument"),
    (dict(mechanism=GaussianNoise(1.0)), "mechanism fails.*a function of a noise level, such as GaussianNoise"),
    (dict(mechanism=lambda s: 3), "mechanism fails.*TypeError"),
    (dict(mechanism=lambda s: lambda key, g: {}), "mechanism changes the shape"),
    (dict(mechanism=lambda s: lambda key, g: g), "mechanism gives a function, which JAX knows as no pytree"),
    (dict(mechanism=lambda s: GaussianNoise(0.5)), r"mechanism\(0\) adds noise of standard deviation 0\.5; at 0"),
    (dict(mechanism=lambda s: GaussianNoise(1 - s), sigmas=(0.1, 0.2)), r"0\.9, and mechanism\(0\.2\) of 0\.8: no more"),
    (dict(mechanism=Clip, sigmas=(0.1,)), r"mechanism\(0\.1\) adds no noise: put GaussianNoise\(sigma\) into it"),
    (dict(methods=("magic",)), "method 'magic' is not known; known: dsg, .*or objects of gdiff_jax.methods"),
    (dict(methods=(3,)), "method 3 is not known"),
    (dict(methods="magic"), "method 'magic' is not known"),
    (dict(sigmas=-0.5), r"sigma_grid \[-0.5\] must be standard deviations"),
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
    (dict(seed=-1), r"seed -1 must lie in 0\.\.4294967295"),
    (dict(seed=2**32), "seed 4294967296 must lie in"),
    (dict(batch=0), "batch 0"),
    (dict(steps=0), "steps 0"),
    (dict(steps=5000), "ask for fewer"),
    (dict(threshold=np.inf), "threshold inf"),
    (dict(threshold="high"), "threshold 'high'"),
    (dict(threshold="20"), "threshold '20' is not a number but a text"),
    (dict(sigma_grid="0.1"), r"sigma_grid '0\.1' is a text; give numbers"),
    (dict(share=0), "share 0"),
    (dict(share="0.1"), "share '0.1' is not a number but a text"),
    (dict(delta=1), "delta 1"),
    (dict(candidates=np.zeros((2, 8, 8, 3))), r"candidates are \(2, 8, 8, 3\)"),
    (dict(candidate_labels=[0, 1]), "candidate_labels are of candidates; give candidates="),
    (dict(candidates=IMAGES, candidate_labels=[0]), r"candidate_labels are of shape \[\(1,\)\], one for each of 2"),
    (dict(candidates=IMAGES, candidate_labels=[[0], [1]]), r"candidate_labels are of \[\(1,\)\] an image, labels of \[\(\)\]"),
    (
        dict(loss=CLASSES, labels=[0, 1], candidates=IMAGES, candidate_labels=[0, 7]),
        r"candidate_labels: label 7 of image 1 is none .* 0 \.\. 2",
    ),
    (dict(candidates=IMAGES[:1], images=IMAGES[:1], labels=np.zeros(1)), "candidates hold nothing but the private images"),
    (dict(params={}), "no array"),
    (dict(params={"w": 1.0}), "float"),
    (dict(loss=lambda p, x, y: p["w"] * x), "floating scalar"),
    (dict(loss=lambda p, x, y: (LOSS(p, x, y), {})), "of several values give the loss alone, such as lambda"),
    (dict(loss=lambda p, x, y: (p["w"] * x.reshape(7)).sum()), r"loss\(params, x, y\) failed"),
    (dict(loss=lambda p, x, y: jnp.where(y == 0, 1, jnp.inf) * LOSS(p, x, y), labels=np.arange(2)), r"1 of 2 images \(1, "),
    (dict(folder=__file__), "no folder can be made there"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda i: f"{i}-{next(iter(WRONG[i][0]))}")
def test_the_call_says_what_is_wrong_before_anything_is_computed(number, planned):
    changes, words = WRONG[number]
    arguments = dict(loss=LOSS, params={"w": jnp.ones((16, 16, 3))}, images=IMAGES, labels=np.zeros(2), methods=("dsg",))
    arguments |= changes
    with pytest.raises(ValueError, match=words) as error:
        planned(**arguments)
    assert "--" not in str(error.value)


WRONG_OF_VICTIMS = [
    (dict(labels=np.arange(6) + 5), "labels 5..10 go beyond the victim's classes, 0..9"),
    (dict(labels=np.arange(6)[:, None]), r"integers \(N,\), or probabilities \(N, 10\); labels\.reshape\(6\)"),
    (dict(labels=np.arange(6.0), attacker="informed"), r"labels are float64 \(6,\); this victim takes integers"),
    (dict(labels=np.arange(6) > 2, attacker="informed"), r"labels are bool \(6,\); this victim takes integers"),
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
    with pytest.raises(ValueError, match=r"other statistics in each local batch of 1; .*leave local_batch at 0"):
        planned(normed, weights, *data, client=Client(group=2, local_steps=2, local_batch=1), attacker="eavesdropper")
    joint = Attacker("server", labels="joint", statistics="replaced")
    with pytest.raises(ValueError, match="dlg can optimise labels only with the candidate's own"):
        planned(normed, weights, *data, methods=("dlg",), attacker=joint)


class Large:
    """A program that no memory holds."""

    def lower(self, *_):
        return self

    def compile(self, compiler_options=None):
        return self

    def memory_analysis(self):
        return SimpleNamespace(argument_size_in_bytes=0, output_size_in_bytes=0, temp_size_in_bytes=2**60)


def test_what_the_engine_says_of_memory_names_no_flag(prior, data, monkeypatch):
    monkeypatch.setattr(engine.trials, "make_runner", lambda *_: Large())
    with pytest.raises(ValueError, match=r"one trial of prior-only needs 1073741824.00 GiB") as error:
        gd.audit(LOSS, {"w": jnp.ones((16, 16, 3))}, *data, prior=prior, methods=("dsg",), **QUICK_AUDIT)
    assert "--" not in str(error.value)
