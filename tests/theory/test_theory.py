"""RV, spectrum, I2F and shares against brute-force Jacobians in float64; estimates against exact values."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import QUICK_RUN
from objectives import float32

from gdiff_jax import modules, victim_gradient, victims
from gdiff_jax.theory import jacobian, spectrum

SMALL = {
    "mlp, d = 192": victims.mlp((8, 8, 3), 10, widths=(16, 12), activation=jax.nn.tanh),
    "lenet, d = 192": victims.lenet((8, 8, 3), 10, width=4),
    "vit, d = 192": victims.vit_tiny((8, 8, 3), 10, dim=8, heads=2, depth=1),
    "cnn, d = 256": victims.cnn((16, 16, 1), 10, channels=(4, 8), activation=jax.nn.tanh),
}

# Attention in float64 is slow to compile, and differentiates as everything else does.
EACH = [pytest.param(name, marks=pytest.mark.long) if "vit" in name else name for name in SMALL]


@functools.cache
def case(name):
    """(loss, params, x, y, J) in float64, J by differentiating the gradient with reverse mode, an array at a time."""
    with jax.enable_x64(True):
        victim = SMALL[name]
        rng = np.random.default_rng(0)
        params = {
            k: jnp.asarray(k.endswith("scale") + rng.normal(size=shape) / math.sqrt(max(np.prod(shape[:-1]), 1)))
            for k, shape in modules.param_shapes(victim).items()
        }
        x, y = jnp.asarray(rng.uniform(-1, 1, victim.image_shape)), jnp.array(3)
        full = jax.jit(jax.jacrev(lambda x: jax.grad(victim.loss)(params, x, y)))(x)
        blocks = {k: np.asarray(b).reshape(-1, x.size) for k, b in full.items()}
        return victim.loss, params, x, y, blocks


frobenius_exact = jax.jit(jacobian.frobenius_exact, static_argnums=0)
gram_vector = jax.jit(jacobian.gram_vector, static_argnums=0)


@pytest.mark.parametrize("name", EACH)
def test_exact_values_are_those_of_the_jacobian(x64, name):
    loss, params, x, y, blocks = case(name)
    full = np.concatenate(list(blocks.values()))
    gram = np.asarray(jax.jit(jacobian.gram, static_argnums=0)(loss, params, x, y))
    np.testing.assert_allclose(gram, full.T @ full, rtol=1e-8, atol=1e-8 * np.abs(gram).max())
    norm, shares = frobenius_exact(loss, params, x, y)
    assert float(norm) == pytest.approx(np.linalg.norm(full), rel=1e-8)
    for k, block in blocks.items():
        assert float(shares[k]) == pytest.approx(np.square(block).sum() / np.square(full).sum(), abs=1e-8)
    v = np.random.default_rng(1).normal(size=x.size)
    product = gram_vector(loss, params, x, y, v.reshape(x.shape))
    np.testing.assert_allclose(np.asarray(product).ravel(), full.T @ (full @ v), rtol=1e-8, atol=1e-8)
    # The Jacobian itself, against differences of the gradient.
    step = (v / np.linalg.norm(v)).reshape(x.shape) * 1e-6
    gradient = jax.jit(functools.partial(victim_gradient, loss))
    ahead, behind = (jax.device_get(gradient(params, np.asarray(x) + s, y)) for s in (step, -step))
    moved = np.concatenate([(a - b).ravel() for a, b in zip(jax.tree.leaves(ahead), jax.tree.leaves(behind), strict=True)])
    ordered = np.concatenate([blocks[k] for k in sorted(blocks)])
    if "lenet" not in name:  # whose ReLU has kinks
        np.testing.assert_allclose(moved / 2e-6, ordered @ (v / np.linalg.norm(v)), atol=1e-6)


# Of dense layers and of convolutions; the derivatives of every victim are those of the exact values above.
@pytest.mark.parametrize("name", ["mlp, d = 192", "lenet, d = 192"])
def test_hutchinson_is_right_within_its_standard_error(x64, name):
    """Over many keys: within two standard errors as often as a normal estimate is, and not by a too large error."""
    loss, params, x, y, blocks = case(name)
    truth = math.sqrt(sum(np.square(b).sum() for b in blocks.values()))
    keys = jax.random.split(jax.random.key(0), 200)
    estimate = lambda keys: jax.lax.map(lambda k: jacobian.frobenius(k, loss, params, x, y, 64), keys)
    found, shares = jax.device_get(jax.jit(estimate, compiler_options=QUICK_RUN)(keys))
    score = (np.asarray(found.value) - truth) / np.asarray(found.standard_error)
    assert (np.abs(score) < 2).mean() > 0.9
    assert 0.85 < score.std() < 1.15
    assert np.abs(score[0]) < 2
    largest = max(blocks, key=lambda k: np.square(blocks[k]).sum())
    share = np.square(blocks[largest]).sum() / truth**2
    score = (np.asarray(shares[largest].value) - share) / np.asarray(shares[largest].standard_error)
    assert (np.abs(score) < 2).mean() > 0.9
    assert np.asarray(sum(s.value for s in shares.values())) == pytest.approx(1.0)


def test_rv_is_the_largest_of_a_set(random_params):
    """Definition 3 over four images, one of which is made the worst."""
    victim = SMALL["mlp, d = 192"]
    params = random_params(victim)
    rng = np.random.default_rng(2)
    x = float32(rng.uniform(-1, 1, (4, 8, 8, 3)))
    y = jnp.array([1, 2, 3, 4])
    estimate = lambda key, params: jacobian.reconstruction_vulnerability(key, victim.loss, params, x, y, probes=128)
    rv = jax.device_get(jax.jit(estimate)(jax.random.key(0), params))
    exact = np.array([float(frobenius_exact(victim.loss, params, a, b)[0]) for a, b in zip(x, y, strict=True)])
    assert rv.per_image.value.shape == (4,)
    assert np.all(np.abs(np.asarray(rv.per_image.value) - exact) < 4 * np.asarray(rv.per_image.standard_error))
    assert float(rv.rv.value) == float(rv.per_image.value.max())
    assert {s.value.shape for s in rv.shares.values()} == {(4,)}


def matrix(d, values, seed=0):
    """Symmetric, with these eigenvalues."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return q @ np.diag(values) @ q.T


def lanczos(a, start, steps):
    return jax.device_get(jax.jit(lambda a, start: spectrum.lanczos(lambda v: a @ v, start, steps))(a, start))


def test_power_iteration_and_lanczos_find_the_extremes(x64):
    values = np.concatenate([np.linspace(0.1, 1, 40), [3.0, 7.0]])
    a = matrix(42, values)
    power = jax.jit(lambda key: spectrum.power_iteration(key, lambda v: a @ v, 42, 200, jnp.float64))
    largest, residual = power(jax.random.key(0))
    assert abs(float(largest) - 7) <= float(residual) + 1e-12 < 1e-6
    ritz = lanczos(a, np.random.default_rng(3).normal(size=42), 42)
    np.testing.assert_allclose(ritz.values, np.sort(values), atol=1e-9)
    assert float(ritz.weights.sum()) == pytest.approx(1)
    few = lanczos(a, np.ones(42), 12)
    assert np.all((np.asarray(few.values) > 0.1 - 1e-9) & (np.asarray(few.values) < 7 + 1e-9))
    for value, radius in zip(few.values, few.residuals, strict=True):
        assert np.abs(values - float(value)).min() <= float(radius) + 1e-9


def test_lanczos_survives_an_exhausted_krylov_space(x64):
    """Three different eigenvalues only: after three steps there is nothing left, and no spurious zero appears."""
    a = matrix(20, np.repeat([1.0, 2.0, 5.0], [10, 6, 4]))
    ritz = lanczos(a, np.random.default_rng(1).normal(size=20), 15)
    heavy = ritz.values[ritz.weights > 1e-9]
    np.testing.assert_allclose(np.unique(heavy.round(6)), [1, 2, 5])
    assert 1 - 1e-9 <= float(ritz.values.min()) <= float(ritz.values.max()) <= 5 + 1e-9
    assert ritz.weights @ ritz.values**2 == pytest.approx(ritz.weights[ritz.weights > 1e-9] @ heavy**2)


def test_full_reorthogonalisation_keeps_single_precision_honest():
    """Without it, float32 Lanczos repeats the outlier as ghosts: here it must appear once."""
    a = matrix(200, np.concatenate([np.linspace(0, 1, 199), [1000.0]])).astype(np.float32)
    ritz = lanczos(a, np.random.default_rng(0).normal(size=200).astype(np.float32), 100)
    assert (ritz.values > 500).sum() == 1
    assert float(ritz.values[-1]) == pytest.approx(1000, rel=1e-5)


@pytest.mark.parametrize("name", ["mlp, d = 192", "cnn, d = 256"])
def test_matrix_free_spectrum_agrees_with_the_full_one(x64, name):
    loss, params, x, y, blocks = case(name)
    full = np.concatenate(list(blocks.values()))
    values = np.linalg.eigvalsh(full.T @ full)
    matvec = lambda v: jacobian.gram_vector(loss, params, x, y, v.reshape(x.shape)).ravel()
    run = jax.jit(lambda k: spectrum.spectrum(k, matvec, x.size, steps=48, probes=12, dtype=jnp.float64))
    found = run(jax.random.key(0))
    rank = float(spectrum.effective_rank(jnp.asarray(values)))
    assert abs(float(found.largest) - values[-1]) <= float(found.largest_error) + 1e-9 * values[-1]
    assert values[0] - 1e-9 * values[-1] <= float(found.smallest)
    assert np.abs(values - float(found.smallest)).min() <= float(found.smallest_error) + 1e-9 * values[-1]
    assert abs(float(found.trace.value) - values.sum()) < 2 * float(found.trace.standard_error)
    assert abs(float(found.effective_rank.value) - rank) < 2 * float(found.effective_rank.standard_error)


def test_effective_rank_in_cases_known_by_hand():
    assert float(spectrum.effective_rank(jnp.ones(7))) == pytest.approx(7, rel=1e-6)
    assert float(spectrum.effective_rank(jnp.array([0.0, 0.0, 3.0]))) == pytest.approx(1)
    shares = np.array([0.5, 0.25, 0.25])
    assert float(spectrum.effective_rank(jnp.asarray(4 * shares))) == pytest.approx(math.exp(scipy.stats.entropy(shares)))


def test_i2f_is_a_lower_bound_where_the_gradient_is_linear(x64):
    """A(x) = M x: the least-squares inversion of a moved gradient misses by || M^+ delta || >= || M^T delta || / lambda_max."""
    rng = np.random.default_rng(0)
    m = jnp.asarray(rng.normal(size=(9, 4)))
    linear = lambda w, x, y: w @ (y @ x.ravel())
    x, w = jnp.asarray(rng.normal(size=(2, 2, 1))), jnp.zeros(9)
    largest = jnp.linalg.eigvalsh(m.T @ m)[-1]
    i2f = jax.jit(lambda delta: jacobian.i2f(linear, w, x, m, delta, largest))
    for seed in range(20):
        delta = np.random.default_rng(seed).normal(size=9)
        miss = np.linalg.norm(np.linalg.pinv(m) @ delta)
        bound = float(i2f(delta))
        assert bound == pytest.approx(float(np.linalg.norm(np.asarray(m).T @ delta) / largest), rel=1e-9)
        assert bound <= miss
    deltas = 0.3 * rng.normal(size=(20_000, 9))
    rms = np.sqrt(np.square(deltas @ np.asarray(m)).sum(1).mean()) / float(largest)
    assert float(jacobian.i2f_of_noise(0.3, jnp.linalg.norm(m.ravel()), largest)) == pytest.approx(rms, rel=0.02)


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda: spectrum.lanczos(lambda v: v, jnp.ones(4), 5), "5"),
        (lambda: spectrum.lanczos(lambda v: v, jnp.ones(4), 0), "0"),
        (lambda: spectrum.spectrum(jax.random.key(0), lambda v: v, 4, probes=1), "probes 1"),
        (
            lambda: jacobian.frobenius(jax.random.key(0), SMALL["mlp, d = 192"].loss, {}, jnp.ones(1), jnp.array(0), 1),
            "probes 1",
        ),
    ],
)
def test_bad_numbers_are_refused(call, value):
    with pytest.raises(ValueError, match=value):
        call()


def test_an_image_without_a_gradient_takes_no_part_in_the_shares_of_the_gradient():
    from gdiff_jax.theory.summary import summarise

    loss = lambda p, x, y: y * jnp.sin(p["a"] * x.sum() + p["b"])
    params, x = (
        {"a": jnp.float32(0.3), "b": jnp.float32(0.1)},
        np.random.default_rng(0).normal(size=(2, 2, 2, 1)).astype(np.float32),
    )
    shares = lambda y: summarise(jax.random.key(0), loss, params, x, y, [0.0], spectra=0, probes=2)["gradient_shares"]
    of_first = x[0].sum() ** 2 / (x[0].sum() ** 2 + 1)
    assert shares(np.array([1.0, 0.0], np.float32))["a"] == pytest.approx(of_first, rel=1e-5)
    assert shares(np.zeros(2, np.float32)) == {"a": 0.0, "b": 0.0}
