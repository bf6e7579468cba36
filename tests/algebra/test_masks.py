"""A ReLU network's gradient as equations of the image: right at the truth, and their deviations what they claim."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32, random_weights

import gdiff_jax as gd
from gdiff_jax.algebra import masks
from gdiff_jax.victims import cnn, mlp, resnet

SHAPE, CLASSES = (8, 8, 3), 4
IMAGE = float32(np.random.default_rng(0).uniform(-1, 1, SHAPE))
LABEL = jnp.asarray(2)


@functools.cache
def of(victim):
    params = random_weights(victim)
    chain = masks.relu_chain(victim.loss, params, SHAPE, LABEL)
    gradient = jax.tree.leaves(jax.jit(gd.victim_gradient, static_argnums=0)(victim.loss, params, IMAGE, LABEL))
    return chain, jax.tree.leaves((params, LABEL)), gradient


CHAINS = [
    cnn(SHAPE, CLASSES, channels=(6, 8)),
    cnn(SHAPE, CLASSES, channels=(6, 8), pooling="mean"),
    cnn(SHAPE, CLASSES, channels=(6, 8), pooling="max"),
    mlp(SHAPE, CLASSES, widths=(16, 8)),
]


@pytest.mark.parametrize("victim", CHAINS, ids=["stride", "mean", "max", "mlp"])
def test_the_equations_hold_at_the_true_image(victim):
    """With no doubt about the masks they are the gradient itself, to rounding."""
    chain, leaves, gradient = of(victim)

    @jax.jit
    def left(leaves, gradient, image):
        equations = masks.equations_at(chain, leaves, gradient, jnp.float32(1e-5), image, jnp.float32(1e-12))
        assert sorted(e.leaf for e in equations) == list(range(len(gradient)))
        hard = [e._replace(d=d) for e, d in zip(equations, true_deltas(chain, leaves, image), strict=True)]
        return [r * e.std for r, e in zip(masks.residual_of(chain, leaves, gradient, hard)(image), hard, strict=True)]

    for r in left(leaves, gradient, IMAGE):
        assert np.abs(r).max() < 1e-6


def true_deltas(chain, leaves, image):
    """Of each equation, by automatic differentiation of what follows its layer."""
    values = chain.forward(leaves, image)

    def after(at, z):
        for layer in (*chain.below[at + 1 :], *chain.top):
            z = layer(leaves, z)
        return z.reshape(())

    for at in range(len(chain.below) - 1, -1, -1):
        for _ in chain.own.intersection(chain.below[at].leaves):
            yield jax.grad(lambda z, at=at: after(at, z))(values[at + 1])


def test_deviations_are_those_of_drawn_masks():
    """A kernel's gradient, over draws of masks as likely as the chain says, scatters as its equation says."""
    chain, leaves, gradient = of(CHAINS[0])

    @jax.jit
    def drawn(leaves, gradient, image):
        """Gradients of each equation of the first layer, the one that it says, and its deviation."""
        equations = masks.equations_at(chain, leaves, gradient, jnp.float32(1e-9), image, jnp.float32(0.1))
        values = chain.forward(leaves, image)
        # The ReLU over the first layer alone is drawn: the one above is made sure by measured features without noise.
        z = values[1]
        q = jax.scipy.stats.norm.cdf(z / (jnp.std(z) * 0.1))
        above = next(e for e in equations if e.at == 2)
        back = chain.below[2].pulled_back(leaves, values[2], above.d)
        active = jax.random.bernoulli(jax.random.key(0), jnp.broadcast_to(q, (400, *q.shape))).astype(jnp.float32)
        layer, u = chain.below[0], chain.below[0].prepared(image)
        of_mask = lambda mask: [layer.gradient(leaves, mask * back, u, e.leaf) for e in equations if e.at == 0]
        said = [(layer.gradient(leaves, e.d, u, e.leaf), e.std) for e in equations if e.at == 0]
        return list(zip(jax.lax.map(of_mask, active), said, strict=True))

    for gradients, (expected, std) in jax.device_get(drawn(leaves, gradient, IMAGE)):
        np.testing.assert_allclose(gradients.mean(0), expected, atol=4 * float(std.max()) / 20)
        assert 0.85 < np.sqrt(np.mean(gradients.var(0)) / np.mean(np.square(std))) < 1.15


def test_measured_features_settle_their_masks():
    """However wrong the estimate is, where the features are measured without noise."""
    chain, leaves, gradient = of(CHAINS[0])
    assert chain.head is not None

    @jax.jit
    def features(leaves, gradient, image):
        values = chain.forward(leaves, image)
        h, s = masks._features(chain, leaves, gradient, chain.top_delta(leaves, values[-1]), jnp.float32(1e-9))
        return h, values[-2], masks._active(-values[-2] + 0.1, jnp.float32(1.0), (h, s))

    h, true, sure = features(leaves, gradient, IMAGE)
    np.testing.assert_allclose(h, true, atol=1e-5)
    assert (sure[true > 0.01] > 0.999).all()
    assert (sure[true == 0] < 0.6).all()


@pytest.mark.parametrize("victim", [CHAINS[0], CHAINS[3]], ids=["cnn", "mlp"])
def test_the_delta_is_measured_however_wrong_the_estimate_is(victim):
    """Of a network that is sure of another label at the estimate; of noise alone it makes nothing, whatever is drawn."""
    chain, leaves, _ = of(victim)
    sure = random_weights(victim)
    sure = jax.tree.map(lambda a: 20 * a if a.shape == leaves[chain.head].shape else a, sure)
    leaves = jax.tree.leaves((sure, LABEL))

    @jax.jit
    def deltas(image, other, sigma):
        gradient = jax.tree.leaves(gd.victim_gradient(victim.loss, sure, image, LABEL))
        values = chain.forward(leaves, other)

        def found(key):
            keys = jax.random.split(key, len(gradient))
            noisy = [g + sigma * jax.random.normal(key, g.shape) for g, key in zip(gradient, keys, strict=True)]
            return masks._top_delta(chain, leaves, noisy, sigma, values)

        found = jax.vmap(found)(jax.random.split(jax.random.key(0), 200))
        return chain.top_delta(leaves, chain.forward(leaves, image)[-1]), chain.top_delta(leaves, values[-1]), found

    for sigma in (1e-6, 1e-3, 1e1, 1e3):
        true, own, found = jax.device_get(deltas(IMAGE, -IMAGE, jnp.float32(sigma)))
        length = np.linalg.norm(true)
        assert np.linalg.norm(true - own) > 0.1 * length
        errors = np.linalg.norm(found - (true if sigma < 1 else own), axis=1)
        if sigma < 1:
            assert np.quantile(errors, 0.99) < 5 * sigma + 0.02 * length
        else:
            assert np.quantile(errors, 0.97) == 0


OTHERS = [resnet(SHAPE, CLASSES, channels=(8,)), cnn(SHAPE, CLASSES, channels=(6, 8), activation=jax.nn.sigmoid)]


@pytest.mark.parametrize("victim", OTHERS, ids=["resnet", "sigmoid"])
def test_what_is_no_relu_chain(victim):
    assert masks.relu_chain(victim.loss, random_weights(victim), SHAPE, LABEL) is None


def test_the_chain_is_found_in_a_traced_function():
    victim = CHAINS[0]
    params = random_weights(victim)

    @jax.jit
    def logits(params, x):
        chain = masks.relu_chain(victim.loss, params, SHAPE, LABEL)
        return chain.forward(jax.tree.leaves((params, LABEL)), x)[-1], victim.logits(params, x)

    found, expected = logits(params, IMAGE)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)
