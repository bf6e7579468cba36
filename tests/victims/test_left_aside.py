"""Trained statistics that lie beside the params in a file of weights: what the loss has of them is what its function made."""

import re
import textwrap

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from tiny import ROOT, audit_config

from gdiff_jax.auditing import load
from gdiff_jax.auditing.load import audit_named
from gdiff_jax.matching import victim_gradient

MODEL = """
import flax, jax, jax.numpy as jnp, optax
from flax import linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), strides=4)(x))
        return nn.Dense(10)(nn.tanh(x).reshape(x.shape[0], -1))

def make():
    net = Net()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
{loads}
    def loss(params, x, y):
        logits = net.apply({{**variables, "params": params}}, x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return loss, variables["params"]
"""
(LOADS,) = re.findall(r"```python\n(    with open.*?)```", (ROOT / "docs" / "jax_models.md").read_text(), re.S)


@pytest.fixture
def trained(tmp_path):
    """The variables of a file, whose statistics are not those of a new network, and the network."""
    names = {}
    exec(MODEL.format(loads=""), names)
    net = names["Net"]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        variables = net.init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))
        variables |= {"batch_stats": jax.tree.map(lambda a: 2 * a + 0.3, variables["batch_stats"])}
        state = {**variables, "opt_state": optax.adam(0.1).init(variables["params"])}
    (tmp_path / "variables.msgpack").write_bytes(serialization.to_bytes(variables))
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(state))
    (tmp_path / "params.msgpack").write_bytes(serialization.to_bytes({"params": variables["params"], "step": 3}))
    return net, variables


@pytest.fixture
def run_of(tmp_path, tiny_prior, monkeypatch):
    """The plan that would be run, and what its page is told, of a model that loads what is said and of a file of weights."""
    monkeypatch.setattr(load, "run", lambda plan, question, store, attack, about, show: (plan, about))

    def run(loads="", **changes):
        (tmp_path / "model.py").write_text(MODEL.format(loads=loads.replace("/path/to", str(tmp_path))))
        usual = dict(victim=f"{tmp_path / 'model.py'}:make", mechanism="none", num_images=1, methods=("dsg",))
        return audit_named(audit_config(tiny_prior, "unused", **{**usual, **changes}))

    return run


@pytest.mark.parametrize("file", ["variables.msgpack", "state.msgpack"])
def test_statistics_that_are_left_aside_are_a_warning(file, trained, run_of, tmp_path, capsys):
    _, about = run_of(weights=str(tmp_path / file))
    words = r"holds arrays beside the params, of which the loss has other values \(left aside: batch_stats\.BatchNorm_0\.mean, "
    words += r"batch_stats\.BatchNorm_0\.var\): trained statistics of BatchNorms are no params"
    assert re.search(words, about["doubt"])
    assert about["doubt"] in capsys.readouterr().out


def test_without_statistics_in_the_file_nothing_is_said(trained, run_of, tmp_path):
    assert run_of(weights=str(tmp_path / "params.msgpack"))[1]["doubt"] == ""


@pytest.mark.long
def test_statistics_that_make_loads_as_the_page_says_are_those_of_the_loss(trained, run_of, tmp_path):
    net, variables = trained
    loads = textwrap.indent(textwrap.dedent(LOADS), "    ")
    plan, about = run_of(loads, weights=str(tmp_path / "variables.msgpack"))
    assert about["doubt"] == ""
    alone, _ = run_of(loads)
    image, label = plan.images[0], plan.labels[0]

    def loss(params):
        logits = net.apply({**variables, "params": params}, jnp.asarray(image)[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = flax.traverse_util.flatten_dict(jax.grad(loss)(variables["params"]), sep=".")
    for found in (plan, alone):
        ((state, params),) = found.params.items()
        gradient = victim_gradient(found.victims[state.name].loss, params, image, label)
        assert gradient.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(gradient[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
