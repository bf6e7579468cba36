"""Federated clients: the steps against a loop written out, the attack against differences, the guessed rate against eta."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_matching import mlp_loss

from gdiff_jax import GradientMatching, images, victim_gradient
from gdiff_jax.federated import LocalSGD, guess_learning_rate
from gdiff_jax.matching import released
from gdiff_jax.victims import cnn, lenet

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(11)


def normal(*shape):
    return jax.device_put(RNG.normal(size=shape))


def batch_loss(params, x, y):
    return jax.vmap(mlp_loss, in_axes=(None, 0, 0))(params, x, y).mean()


def example(count=4):
    """The smooth network of test_matching in float64, `count` images of 4 x 4 and labels."""
    params = {"w1": normal(5, 16), "b1": normal(5), "w2": normal(3, 5)}
    return params, normal(count, 4, 4, 1), jnp.asarray(RNG.integers(0, 3, count))


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(jax.device_get(tree)))


def difference(a, b):
    return largest(jax.tree.map(np.subtract, jax.device_get(a), jax.device_get(b)))


# Compiled whole: operation by operation each is a program of its own.
release_of = quick_jit(lambda client, loss, *a: client(loss, *a), static_argnums=1)
gradient_of = quick_jit(victim_gradient, static_argnums=0)
value_of = quick_jit(lambda match, x: match(x))


@pytest.mark.parametrize("single", [True, False])
def test_one_step_is_the_gradient(single, random_params):
    """Bit for bit but for compilation, also of a victim in float32, with a rate as array."""
    victim = lenet((8, 8, 1), 4, width=3)
    params = random_params(victim)
    x, y = RNG.normal(size=(2, 8, 8, 1)).astype(np.float32), np.array([1, 3])
    x, y = (x[0], y[0]) if single else (x, y)
    release = release_of(LocalSGD(jnp.asarray(0.3), 1), victim.loss, params, x, y)
    gradient = gradient_of(victim.loss, params, x, y)
    assert difference(release, gradient) < 1e-6 * largest(gradient)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch_size", [None, 4, 2, 1])
@pytest.mark.parametrize("steps", [3, 5])
def test_steps_are_those_of_a_loop(steps, batch_size):
    """Against W <- W - eta grad L(W; the images k b ..), cyclically, and (W_0 - W_K) / (eta K)."""
    params, x, y = jax.device_get(example())
    eta, size = 0.2, batch_size or 4
    here, gradient = params, lambda *a: jax.device_get(gradient_of(batch_loss, *a))
    for k in range(steps):
        chosen = np.arange(k * size, (k + 1) * size) % 4
        here = jax.tree.map(lambda w, g: w - eta * g, here, gradient(here, x[chosen], y[chosen]))
    expected = jax.tree.map(lambda a, b: (a - b) / (eta * steps), params, here)
    release = release_of(LocalSGD(eta, steps, batch_size), batch_loss, params, x, y)
    assert difference(release, expected) < 1e-12
    assert difference(release, gradient(params, x, y)) > 1e-2  # the steps matter


@pytest.mark.usefixtures("x64")
def test_labels_may_be_a_pytree():
    params, x, y = example()
    weights = normal(4)
    loss = lambda p, x, y: (y["w"] * jax.vmap(mlp_loss, in_axes=(None, 0, 0))(p, x, y["y"])).mean()
    x, y, weights = jax.device_get((x, y, weights))
    a = release_of(LocalSGD(0.1, 2, 2), loss, params, x, {"y": y, "w": weights})
    swap = np.array([1, 0, 3, 2])  # within a step the order is nothing
    b = release_of(LocalSGD(0.1, 2, 2), loss, params, x[swap], {"y": y[swap], "w": weights[swap]})
    assert difference(a, b) < 1e-14


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch_size", [None, 2])
def test_gradient_of_the_objective_is_that_of_central_differences(batch_size):
    """All 64 pixels of four images; a step of 1e-4 leaves an error of order 1e-8 by truncation."""
    params, x, y = example()
    client = LocalSGD(jnp.asarray(0.3), 3, batch_size)
    leak = quick_jit(lambda *a: released(client, batch_loss, *a))(params, x, y)
    match, there, h = GradientMatching(params, y, leak, batch_loss, client=client), x + 0.3 * normal(*x.shape), 1e-4

    @quick_jit
    def both(match, x):
        pixels = jnp.eye(x.size).reshape(x.size, *x.shape)
        return jax.grad(match)(x).ravel(), jax.lax.map(lambda e: (match(x + h * e) - match(x - h * e)) / (2 * h), pixels)

    grad, differences = both(match, there)
    assert np.linalg.norm(grad) > 1e-2
    np.testing.assert_allclose(grad, differences, rtol=0, atol=1e-6 * np.linalg.norm(grad))


@pytest.mark.usefixtures("x64")
def test_only_the_right_rate_and_number_of_steps_explain_the_leak():
    """A leak divided by a guessed rate, as the docstring has it, is explained at the truth where the guess is right."""
    params, x, y = example()
    eta = 0.3
    release = jax.device_get(release_of(LocalSGD(eta, 3), batch_loss, params, x, y))

    def at_truth(guess, client):
        leak = jax.tree.map(lambda g: eta / guess * g, release)
        return float(value_of(GradientMatching(params, y, leak, batch_loss, client=client), x))

    assert at_truth(eta, LocalSGD(eta, 3)) == 0
    size = np.sqrt(sum(np.vdot(r, r) for r in release.values()))
    for guess, client in ((0.15, LocalSGD(0.15, 3)), (0.6, LocalSGD(0.6, 3)), (eta, LocalSGD(eta, 2)), (eta, None)):
        assert at_truth(guess, client) > 0.02 * size, (guess, client)


@pytest.mark.usefixtures("x64")
def test_vmap_over_trials_equals_one_at_a_time():
    """Rates, labels, leaks and candidates of three trials in one program."""
    params, x, y = example(3)
    rates, start = jnp.array([0.1, 0.2, 0.4]), x + 0.3 * normal(*x.shape)

    def run(rate, x, y, start):
        client = LocalSGD(rate, 3)
        leak = released(client, mlp_loss, params, x, y)
        return jax.value_and_grad(GradientMatching(params, y, leak, mlp_loss, client=client))(start)

    values, grads = quick_jit(jax.vmap(run))(rates, x, y, start)
    one = quick_jit(run)
    for i in range(3):
        value, grad = one(rates[i], x[i], y[i], start[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-12)
        np.testing.assert_allclose(grads[i], grad, rtol=1e-9, atol=1e-12)


def test_the_rate_is_a_leaf_and_compiles_once():
    params, x, y = example()
    traces = []

    @quick_jit
    def run(client):
        traces.append(None)
        return client(batch_loss, params, x, y)["w2"]

    assert float(jnp.abs(run(LocalSGD(0.1, 3)) - run(LocalSGD(0.2, 3))).max()) > 1e-4
    assert len(traces) == 1
    assert jax.tree.map(lambda _: 0, LocalSGD(0.1, 3)) == LocalSGD(0, 3)  # axes of a vmap


@pytest.mark.parametrize("steps", [0, -1])
def test_a_client_takes_a_step(steps):
    with pytest.raises(ValueError, match=f"steps={steps}: .* at least one local step"):
        LocalSGD(0.1, steps)


def test_a_batch_size_that_cannot_be_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="batch_size=0: give at least 1, or None"):
        LocalSGD(0.1, 1, 0)
    params, x, y = example()
    for wrong in ((x, y), (x[0], y[0]), (x, y[:3])):
        with pytest.raises(ValueError, match=r"batch_size=3 needs .* shapes .*; batch_size=None takes all"):
            LocalSGD(0.1, 1, 3)(batch_loss, params, *wrong)


# The guessed rate


@functools.cache
def guessing(make, count, steps):
    """The function of eta that is the guesses, for sixteen untrained networks, each on `count` CIFAR-10 images of its own."""
    victim, data = make(), images.load_images("cifar10-test-64")
    x = jnp.asarray(images.to_model(data.images)).reshape(-1, count, 32, 32, 3)[:16]
    y = jnp.asarray(data.labels).reshape(-1, count)[:16]

    def one(eta, key, x, y):
        release = LocalSGD(eta, steps)(victim.loss, victim.init(key), x, y)
        return guess_learning_rate(eta * steps * release["fc.bias"], count, victim.num_classes, steps)

    keys = jax.random.split(jax.random.key(0), 16)
    return quick_jit(lambda eta: jax.lax.map(lambda example: one(eta, *example), (keys, x, y)))


@pytest.mark.parametrize(
    ("steps", "eta", "low", "high"), [(1, 0.01, 0.9, 1.1), (4, 0.001, 0.9, 1.1), (4, 0.1, 0.2, 0.9)], ids=str
)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("make", [lenet, cnn])
def test_the_guessed_rate_is_as_close_as_its_docstring_says(make, count, steps, eta, low, high):
    ratio = np.asarray(guessing(make, count, steps)(jnp.float32(eta))) / eta
    assert low < ratio.min() <= ratio.max() < high, (ratio.min(), ratio.max())


def test_the_guess_is_exact_where_p_is_uniform():
    """Counts 3, 1 and 1 of five images in ten classes, K = 2: eta K (1 / C - n / B); noise adds no sixth class."""
    counts = np.array([0, 3, 0, 1, 0, 0, 1, 0, 0, 0])
    update = 0.05 * 2 * (0.1 - counts / 5)
    np.testing.assert_allclose(guess_learning_rate(jnp.asarray(update), 5, 10, 2), 0.05, rtol=1e-5)
    assert guess_learning_rate(jnp.zeros(10), 5, 10, 2) == 0
    with pytest.raises(ValueError, match=r"10 classes has an update of shape \(10,\), not \(12,\)"):
        guess_learning_rate(jnp.zeros(12), 5, 10, 2)


def test_a_client_is_replaced_like_any_field():
    match = GradientMatching({}, 0, {}, mlp_loss)
    assert match.client is None
    assert dataclasses.replace(match, client=LocalSGD(0.1, 2)).client == LocalSGD(0.1, 2)
