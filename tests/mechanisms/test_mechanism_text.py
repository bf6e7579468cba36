"""Mechanisms as they are written: what each text builds, and what is said of those that build nothing."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax.mechanisms import (
    Chain,
    Clip,
    GaussianNoise,
    PruneRepresentation,
    RandomSparsification,
    Sign,
    StochasticQuantisation,
    TopK,
    UniformNoise,
    soteria_mask,
)
from gdiff_jax.mechanisms.text import NOISES, parse
from gdiff_jax.theory import privacy
from gdiff_jax.victims import mlp


@pytest.mark.parametrize(
    ("text", "mechanism"),
    [
        ("none", Chain(())),
        ("gaussian", GaussianNoise(0.3)),
        ("clip:2", Clip(2.0)),
        ("sign", Sign()),
        ("qsgd:4", StochasticQuantisation(4)),
        ("random:0.5", RandomSparsification(0.5)),
        ("clip:1+gaussian", Chain((Clip(1.0), GaussianNoise(0.3)))),
        ("topk:0.1 + uniform", Chain((TopK(0.1), UniformNoise(0.3)))),
    ],
)
def test_a_text_builds_its_stages_in_order(text, mechanism):
    spec = parse(text)
    assert spec.text == text
    assert spec.build(0.3, lambda fraction: pytest.fail("no stage prunes")) == mechanism
    assert spec.noisy == any(name in text for name in NOISES)
    assert not spec.hides_mask


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blur:3", "'blur' is not known; known: gaussian, .*clip:NUMBER"),
        ("gaussian:1", "gaussian takes no number"),
        ("sign:1", "sign takes no number"),
        ("clip", "'clip' needs the norm, above 0, such as clip:1"),
        ("gaussian+clip:0", "'clip:0' needs the norm"),
        ("clip:inf", "'clip:inf' needs the norm"),
        ("topk:1.5", "needs the share of coordinates that is kept"),
        ("random:none", "needs the share of coordinates that is kept"),
        ("qsgd:1.5", "needs the number of levels"),
        ("qsgd:0", "needs the number of levels"),
        ("soteria:1", r"needs the share of features that is pruned, in \[0, 1\), such as soteria:0.5"),
        ("", "'' is not known"),
    ],
)
def test_a_text_that_is_no_mechanism_is_refused_with_what_its_stage_takes(text, words):
    with pytest.raises(ValueError, match=f"^mechanism '{text.replace('+', '[+]')}': .*{words}"):
        parse(text)


def test_sigma_follows_from_epsilon_for_the_clipped_gaussian_alone():
    assert parse("clip:2+gaussian").clip_norm == 2
    assert all(parse(text).clip_norm is None for text in ("gaussian", "clip:2", "clip:2+laplace", "sign+clip:2+gaussian"))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [("soteria:0.5", False), ("soteria:0.5+clip:1", False), ("soteria:0.5+gaussian", True), ("gaussian+soteria:0.5", False)],
)
def test_a_mask_is_hidden_by_what_comes_after_it(text, hidden):
    assert parse(text).hides_mask is hidden


def test_soteria_prunes_by_the_image():
    victim = mlp((4, 4, 1), 3, widths=(8,))
    params = victim.init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 4, 1)), jnp.float32)
    key = jax.random.key(1)
    spec = parse("soteria:0.25+gaussian")
    prune, noise = spec.for_image(jax.random.clone(key), 0.5, victim, params, x).stages
    assert noise == GaussianNoise(0.5)
    assert isinstance(prune, PruneRepresentation)
    assert prune.kernel == victim.last_kernel
    np.testing.assert_array_equal(prune.kept, soteria_mask(key, lambda x: victim.features(params, x), x, 0.25))


def test_a_text_guarantees_what_its_mechanism_does():
    expected = privacy.guarantee(Chain((Clip(2.0), GaussianNoise(1.0))), 100, 1e-5)
    assert parse("clip:2+gaussian").guarantee(1.0, 100, 1e-5) == expected
    assert parse("clip:2+soteria:0.5+gaussian").guarantee(1.0, 100, 1e-5) == expected  # pruning lets norms shrink only


def test_texts_are_read_without_the_second_that_dp_accounting_takes():
    script = "import sys; from gdiff_jax.mechanisms.text import parse; parse('clip:1'); print('dp_accounting' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
