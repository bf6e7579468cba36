"""One trial in its parts: what a client lets out, what an attacker makes of it, and what that attacker knows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import plan_of

from gdiff_jax.federated import LocalSGD
from gdiff_jax.matching import cosine, l2
from gdiff_jax.mechanisms import GaussianNoise
from gdiff_jax.sweeping import trials
from gdiff_jax.sweeping.plan import VictimState
from gdiff_jax.victims import cnn

MECHANISMS = (
    "none",
    "clip:0.1",
    "topk:0.2",
    "random:0.5",
    "sign",
    "qsgd:4",
    "soteria:0.5",
    "topk:0.5+laplace",
    "clip:1+uniform",
)


def parts(plan, victim="mlp-narrow", sigma=0.0, mechanism="gaussian"):
    """The arguments that the functions of a trial take: of the first image, seed 0."""
    group = trials.Group("dsg", victim, 0, mechanism)
    own = jax.tree.map(lambda a: a[0], trials.own_arguments(plan, [trials.Trial(group, sigma, 0, 0)]))
    return group, trials.shared_arguments(plan, group), own


def released(plan, group, shared, own):
    """What the client lets out, and the objective of its attacker."""
    k_noise, _ = jax.random.split(own.key)
    out = trials.release(plan, group, shared, own, k_noise)
    return out, trials.attacker_match(plan, group, shared, own, out, trials.guess_labels(plan, group, shared, own, out.leak))


def objective(plan):
    """An attacker's distance at the private image, over that at a grey one."""
    group, shared, own = parts(plan)

    @jax.jit
    def ratio(shared, own):
        _, match = released(plan, group, shared, own)
        return match(own.images[0]) / match(jnp.zeros_like(own.images[0]))

    return float(ratio(shared, own))


def test_who_knows_the_client_is_at_distance_0_from_the_truth_and_who_does_not_is_not(tiny_prior):
    local = dict(num_images=1, local_steps=3, local_learning_rate=0.3)
    assert objective(plan_of(tiny_prior, **local)) < 1e-4
    assert 1e-3 < objective(plan_of(tiny_prior, **local, local_rate="guessed")) < 1


@pytest.mark.parametrize(("statistics", "low", "high"), [("known", 0, 1e-4), ("batch", 0, 1e-4), ("replaced", 1e-2, 10)])
def test_who_knows_the_statistics_is_at_distance_0_from_the_truth_and_who_does_not_is_not(tiny_prior, statistics, low, high):
    """Of one image the candidate's own statistics are the batch's."""
    plan = plan_of(tiny_prior, num_images=1, statistics=statistics)
    victim = cnn((16, 16, 3), 10, channels=(8,), norm="batch")
    params = {VictimState("mlp-narrow", 0): victim.init(jax.random.key(0))}
    assert low <= objective(dataclasses.replace(plan, victims={"mlp-narrow": victim}, params=params)) < high


@pytest.mark.parametrize("sigma", [0.0, 0.01])
@pytest.mark.parametrize(
    "name", ["mlp", "lenet", "lenet-sigmoid", "cnn", "cnn-batchnorm", "vit", pytest.param("resnet", marks=pytest.mark.long)]
)
def test_labels_of_untrained_victims_are_always_inferred_right(tiny_prior, name, sigma):
    """As the sweep infers them, without noise and under little: every class."""
    plan = plan_of(tiny_prior, victims=(name,), labels="inferred")
    group, shared, own = parts(plan, name)

    def infer(x, y):
        private = own._replace(images=x[None], labels=y[None], sigma=jnp.float32(sigma))
        out = trials.release(plan, group, shared, private, jax.random.key(0))
        return trials.guess_labels(plan, group, shared, private, out.leak)

    found = jax.jit(jax.vmap(jax.vmap(infer, (None, 0)), (0, None)))(jnp.asarray(plan.images), jnp.arange(10))
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(10), (len(plan.images), 10)))


def test_a_combined_image_leans_on_the_priors_mean(tiny_prior):
    """And not on the samples that stand in for the statistics of a neighbour's BatchNorms."""
    victims = ("mlp-narrow", "cnn-batchnorm")
    plan = plan_of(tiny_prior, num_images=1, victims=victims, attacker="eavesdropper", labels="known", steps=2)
    for victim in victims:
        group, shared, own = parts(plan, victim)
        problem = trials.problem_of(plan, group, shared, own, match=None)
        np.testing.assert_array_equal(problem.expected_image, plan.prior.mean_image)
    assert np.abs(plan.proxy.mean(0) - plan.prior.mean_image).max() > 0.1


def told_apart(rows):
    """By mechanism: which of them change a gradient, and in what."""
    assert rows["none"]["noise_norm"] == 0
    assert rows["clip:0.1"]["leak_cosine"] == pytest.approx(1, abs=1e-5)
    assert all(0 < rows[t]["leak_cosine"] < 0.9999 for t in MECHANISMS if t not in ("none", "clip:0.1"))


def test_every_mechanism_releases_something_of_its_own(tiny_prior):
    """Who matches through a mechanism without noise is at distance 0 from the truth."""
    plan = plan_of(tiny_prior, num_images=1, mechanisms=MECHANISMS, sigma_grid=(0.1,))
    assert plan.sigmas == {text: (0.1,) if "+" in text else (0.0,) for text in MECHANISMS}
    assert all(plan.mechanisms[text].text == text for text in MECHANISMS)

    @jax.jit
    def release(shared, own):
        rows = {}
        for text in MECHANISMS:
            private = own._replace(sigma=jnp.float32(plan.sigmas[text][0]), key=jax.random.clone(own.key))
            out, match = released(plan, parts(plan, mechanism=text)[0], shared, private)
            rows[text] = {
                "noise_norm": l2(out.leak, out.gradient),
                "leak_cosine": 1 - cosine(out.leak, out.gradient),
                "leak_norm": l2(out.leak, jax.tree.map(jnp.zeros_like, out.leak)),
                "distance": match(own.images[0]),
            }
        return rows

    _, shared, own = parts(plan)
    rows = release(shared, own)
    told_apart(rows)
    assert rows["clip:0.1"]["leak_norm"] == pytest.approx(0.1, rel=1e-5)
    for text in ("none", "clip:0.1", "topk:0.2", "random:0.5", "soteria:0.5"):
        assert rows[text]["distance"] < 1e-4 * rows[text]["leak_norm"], text
    assert all(rows[text]["distance"] > 1e-2 for text in MECHANISMS if "+" in text)


def test_what_is_asked_for_reaches_the_objective(tiny_prior):
    """Nothing is computed: what does not depend on numbers is known after tracing."""

    def match(**changes):
        plan = plan_of(tiny_prior, num_images=2, **changes)
        group, shared, own = parts(plan)
        return jax.eval_shape(lambda shared, own: released(plan, group, shared, own)[1], shared, own)

    plain = match()
    assert plain.distance is l2
    assert plain.weights is None
    assert plain.client is None
    assert isinstance(plain.mechanism, GaussianNoise)
    assert match(adaptive=False).mechanism is None
    assert match(distance="cosine").distance is cosine
    assert match(layer_weights="equal").weights.keys() == plain.leak.keys()
    local = match(local_steps=3, group=2, local_batch=1).client
    assert isinstance(local, LocalSGD)
    assert (local.steps, local.batch_size) == (3, 1)
    assert match(group=2).label.shape == (2,)


def test_a_trained_state_is_attacked_with_its_own_weights(tiny_prior):
    plan = plan_of(tiny_prior)
    params = plan.params[VictimState("mlp-narrow", 0)]
    assert trials.shared_arguments(plan, trials.Group("dsg", "mlp-narrow", 0)).params is params
    assert trials.shared_arguments(plan, trials.Group(trials.PRIOR_ONLY, "", 0, "")).params is None
