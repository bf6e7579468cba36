"""BatchNorm and the three choices of its statistics: known values, the client's gradient, exact derivatives, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from objectives import float32

from gdiff_jax import GradientMatching, modules, victim_gradient
from gdiff_jax.federated import LocalSGD
from gdiff_jax.victims import cnn, mlp, resnet, zoo

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(12)
# The CNN is smooth, so that differences mean something.
VICTIMS = {
    "cnn": cnn((6, 6, 2), 4, channels=(3, 4), activation=jnp.tanh, norm="batch"),
    "resnet": resnet((6, 6, 2), 4, channels=(3,), norm="batch"),
}
every = pytest.mark.parametrize("name", VICTIMS)
x64 = pytest.mark.usefixtures("x64")
LOSSES = ("loss", "loss_known_statistics", "loss_replaced_statistics")
each_loss = pytest.mark.parametrize("loss", LOSSES)


def normal(*shape):
    return jax.device_put(RNG.normal(size=shape))


# Compiled whole, and once for the tests of one program.
value_of = quick_jit(lambda match, x: match(x))
value_and_grad = quick_jit(lambda match, x: jax.value_and_grad(match)(x))
loss_and_gradient = quick_jit(lambda loss, *a: jax.value_and_grad(loss)(*a), static_argnums=0)
gradient_of = quick_jit(victim_gradient, static_argnums=0)


@functools.cache
def example(name, single=False):
    """Parameters of which none is zero, three images and labels, and the statistics of those images; float64."""
    victim = VICTIMS[name]
    params = {
        n: jax.device_put(
            n.endswith("scale") + RNG.normal(size=s) / (max(1, np.prod(s[:-1])) ** 0.5 if n.endswith("kernel") else 5)
        )
        for n, s in modules.param_shapes(victim).items()
    }
    x, y = normal(3, 6, 6, 2), jnp.array([1, 3, 0])
    x, y = (x[0], y[0]) if single else (x, y)
    return victim, params, x, y, quick_jit(victim.batch_statistics)(params, x)


def match_of(name, loss):
    """The objective of an attack with this loss on the client's own gradient, and a candidate."""
    victim, params, x, y, statistics = example(name)
    label = y if loss == "loss" else (y, statistics)
    leak = gradient_of(victim.loss, params, x, y)
    return GradientMatching(params, label, leak, getattr(victim, loss)), jnp.asarray(
        0.7 * np.asarray(x) + 0.3 * RNG.normal(size=x.shape)
    )


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(jax.device_get(tree)))


def difference(a, b):
    return largest(jax.tree.map(np.subtract, jax.device_get(a), jax.device_get(b)))


# The layer


def test_output_has_mean_0_and_variance_1():
    """Also far from the origin, where one pass over E[x^2] - E[x]^2 would lose all digits of float32."""
    x = float32(1000 + RNG.normal(size=(4, 6, 5, 3)))
    y = np.asarray(modules.BatchNorm(3)(x), np.float64)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-3)


@x64
def test_batch_norm_is_that_of_the_formula():
    layer, scale, bias, x = modules.BatchNorm(3), normal(3), normal(3), 2 + 3 * normal(4, 6, 5, 3)
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(bias)
    a = np.asarray(x)
    expected = (a - a.mean((0, 1, 2))) / np.sqrt(a.var((0, 1, 2)) + 1e-5) * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(layer(x), expected, atol=1e-12)


def test_statistics_of_bfloat16_are_in_float32():
    seen = []
    layer = modules.BatchNorm(3)
    layer.policy = lambda mean, var: seen.append((mean.dtype, var.dtype)) or (mean, var)
    assert layer(jnp.ones((2, 4, 4, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert seen == [(jnp.float32, jnp.float32)]


# The networks


@x64
def test_the_names_of_statistics_are_the_dotted_names_of_the_layers():
    names = {name: set(example(name)[4]) for name in VICTIMS}
    assert names["cnn"] == {"norm1", "norm2"}
    assert names["resnet"] == {"norm", "blocks.0.norm1", "blocks.0.norm2"}
    assert {f"{n}.scale" for n in names["resnet"]} <= set(modules.param_shapes(VICTIMS["resnet"]))


def test_group_norm_stays_what_it_was_and_has_the_weights_of_batch_norm():
    """Norms draw no numbers: all three choices have one network's kernels, bit for bit."""
    plain, true, group, batch = (cnn((6, 6, 2), 4, channels=(8, 8), norm=n) for n in (False, True, "group", "batch"))
    inits = [quick_jit(v.init)(jax.random.key(0)) for v in (plain, true, group, batch)]
    for params in inits[1:]:
        assert params.keys() == inits[1].keys()
        for name in inits[0]:
            np.testing.assert_array_equal(params[name], inits[0][name])
    x = normal(2, 6, 6, 2).astype(jnp.float32)
    of_true, of_group, of_batch = (np.asarray(quick_jit(v.logits)(inits[1], x)) for v in (true, group, batch))
    np.testing.assert_array_equal(of_true, of_group)
    assert np.abs(of_batch - of_group).max() > 1e-3
    assert modules.param_shapes(resnet(norm="batch")) == modules.param_shapes(resnet())


@pytest.mark.parametrize("make", [cnn, resnet])
def test_an_unknown_norm_is_refused(make):
    with pytest.raises(ValueError, match="norm='layer' is not known; it is 'group' or 'batch'"):
        modules.param_shapes(make(norm="layer"))


@pytest.mark.parametrize("name", ["cnn-batchnorm", "resnet-batchnorm"])
def test_the_study_knows_them_by_name_at_the_end(name):
    """A victim's weights are drawn from its place."""
    victim = zoo.make_victim(name, (16, 16, 3), 10)
    norms = set(jax.eval_shape(victim.batch_statistics, *shapes(victim)))
    assert norms
    assert name in list(zoo.VICTIMS)[34:]


def shapes(victim):
    struct = lambda s: jax.ShapeDtypeStruct(s, jnp.float32)
    return {n: struct(s) for n, s in modules.param_shapes(victim).items()}, struct(victim.image_shape)


# The statistics


@x64
def test_statistics_are_those_of_the_layers_inputs():
    """By hand: the second layer is fed by what the first normalised with the batch's statistics."""
    _, params, x, _, statistics = example("cnn")
    conv = lambda h, i: (
        jax.lax.conv_general_dilated(
            h, params[f"conv{i}.kernel"], (i, i), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + params[f"conv{i}.bias"].reshape(1, 1, 1, -1)
    )
    first = np.asarray(conv(x, 1))
    normed = (first - first.mean((0, 1, 2))) / np.sqrt(first.var((0, 1, 2)) + 1e-5)
    second = np.asarray(conv(jnp.tanh(normed * np.asarray(params["norm1.scale"]) + np.asarray(params["norm1.bias"])), 2))
    for name, h in (("norm1", first), ("norm2", second)):
        mean, var = statistics[name]
        np.testing.assert_allclose(mean, h.mean((0, 1, 2)), atol=1e-12)
        np.testing.assert_allclose(var, h.var((0, 1, 2)), atol=1e-12)


@x64
@every
@pytest.mark.parametrize("single", [False, True])
def test_known_statistics_give_the_clients_gradient_at_the_private_batch(name, single):
    """And at another batch with them not that batch's own."""
    victim, params, x, y, statistics = example(name, single)
    run = loss_and_gradient
    value, gradient = run(victim.loss, params, x, y)
    known_value, known = run(victim.loss_known_statistics, params, x, (y, statistics))
    np.testing.assert_allclose(known_value, value, rtol=1e-12)
    assert difference(known, gradient) < 1e-10 * largest(gradient)
    other = 2 * x + 1
    assert difference(
        run(victim.loss, params, other, y), run(victim.loss_known_statistics, params, other, (y, statistics))
    ) > 1e-2 * largest(gradient)


@x64
@every
def test_replaced_statistics_give_the_value_but_not_the_gradient(name):
    victim, params, x, y, statistics = example(name)
    run = loss_and_gradient
    value, gradient = run(victim.loss, params, x, y)
    replaced_value, replaced = run(victim.loss_replaced_statistics, params, x, (y, statistics))
    np.testing.assert_allclose(replaced_value, value, rtol=1e-12)
    assert difference(replaced, gradient) > 1e-2 * largest(gradient)


@x64
@every
def test_values_of_both_follow_the_given_statistics_and_not_the_candidates(name):
    """At any candidate known and replaced statistics give one value; images do not look at each other."""
    victim, params, x, y, statistics = example(name)
    other = 2 * x + 1
    known = quick_jit(victim.loss_known_statistics)(params, other, (y, statistics))
    replaced = quick_jit(victim.loss_replaced_statistics)
    np.testing.assert_allclose(known, replaced(params, other, (y, statistics)), rtol=1e-12)
    singles = [replaced(params, other[i], (y[i], statistics)) for i in range(3)]
    np.testing.assert_allclose(known, np.mean(singles), rtol=1e-12)
    assert abs(known - quick_jit(victim.loss)(params, other, y)) > 1e-3


@x64
@each_loss
@every
def test_gradient_of_the_objective_is_that_of_double_reverse(name, loss):
    match, x = match_of(name, loss)
    double = lambda m, x: m.distance(jax.grad(m.loss)(m.params, x, m.label), m.leak)
    value, grad = value_and_grad(match, x)
    expected_value, expected = quick_jit(lambda m, x: jax.value_and_grad(double, argnums=1)(m, x))(match, x)
    assert np.linalg.norm(expected) > 1e-4
    np.testing.assert_allclose(value, expected_value, rtol=1e-11)
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-10 * np.linalg.norm(expected))


@x64
@each_loss
def test_gradient_of_the_objective_is_that_of_central_differences(loss):
    """In twenty random directions: nothing that moves with the image counts as constant."""
    match, x = match_of("cnn", loss)
    h = 1e-5

    @quick_jit
    def both(match, x, directions):
        along = jax.lax.map(lambda e: (match(x + h * e) - match(x - h * e)) / (2 * h), directions)
        return jnp.einsum("nbhwc,bhwc->n", directions, jax.grad(match)(x)), along

    grad, along = both(match, x, normal(20, *x.shape))
    np.testing.assert_allclose(grad, along, rtol=0, atol=1e-6 * np.abs(along).max())


@x64
@every
def test_the_objective_is_zero_at_the_truth_unless_statistics_are_replaced(name):
    for loss in LOSSES:
        match, candidate = match_of(name, loss)
        at_truth = float(value_of(match, example(name)[2]))
        elsewhere = float(value_of(match, candidate))
        if loss == "loss_replaced_statistics":
            assert at_truth > 1e-2
        else:
            assert at_truth < 1e-12
            assert elsewhere > 1e-2


@x64
@each_loss
def test_vmap_over_trials_equals_one_at_a_time(loss):
    """Trials with leaks, statistics and candidates of their own; nothing of a trial is kept in the network."""
    match, x = match_of("cnn", loss)
    match, x = jax.device_get((match, x))
    two = jax.tree.map(lambda a: np.stack([a, 1.2 * a if a.dtype.kind == "f" else a]), match)
    starts = np.stack([x, 0.9 * x])
    run = value_and_grad
    values, grads = quick_jit(jax.vmap(lambda m, x: jax.value_and_grad(m)(x)))(two, starts)
    assert abs(values[0] - values[1]) > 1e-3
    for i in range(2):
        value, grad = run(jax.tree.map(lambda a, i=i: a[i], two), starts[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-11)
        np.testing.assert_allclose(grads[i], grad, rtol=1e-9, atol=1e-12)


@x64
def test_a_client_of_several_steps_takes_the_batchs_statistics_in_each():
    victim, params, x, y, _ = example("cnn")
    client = LocalSGD(0.1, 2)
    leak = quick_jit(lambda params, x, y: client(victim.loss, params, x, y))(params, x, y)
    match, run = GradientMatching(params, y, leak, victim.loss, client=client), value_and_grad
    value, grad = run(match, x + 0.3 * normal(*x.shape))
    assert value > 1e-2
    assert 1e-3 < np.linalg.norm(grad) < np.inf
    assert run(match, x)[0] < 1e-12


@x64
def test_without_batch_norm_the_three_are_one_and_statistics_are_empty():
    victim = mlp((4, 4, 1), 3, widths=(5,))
    params = {n: normal(*s) for n, s in modules.param_shapes(victim).items()}
    x, y = normal(2, 4, 4, 1), jnp.array([0, 2])
    assert victim.batch_statistics(params, x) == {}
    expected = victim.loss(params, x, y)
    assert victim.loss_known_statistics(params, x, (y, {})) == expected
    assert victim.loss_replaced_statistics(params, x, (y, {})) == expected


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_statistics_of_other_layers_are_refused_with_the_remedy(loss):
    victim = VICTIMS["cnn"]
    params, x = shapes(victim)
    wrong = {"norm1": (jnp.zeros(3), jnp.ones(3))}
    with pytest.raises(ValueError, match=r"of \['norm1'\], .* are \['norm1', 'norm2'\]; make them with batch_statistics"):
        jax.eval_shape(getattr(victim, loss), params, x, (0, wrong))


# Labels as probabilities


@x64
def test_probabilities_for_labels():
    """One-hot is the integer label; the loss is linear in y; a joint attack differentiates in both."""
    victim, params, x, y, _ = example("cnn")
    onehot = jax.nn.one_hot(y, 4, dtype=x.dtype)
    loss = quick_jit(victim.loss)
    np.testing.assert_allclose(loss(params, x, onehot), loss(params, x, y), rtol=1e-12)
    soft = jnp.full_like(onehot, 0.25)
    log_p = quick_jit(lambda params, x: jax.nn.log_softmax(victim.logits(params, x)))(params, x)
    np.testing.assert_allclose(loss(params, x, soft), -log_p.mean(), rtol=1e-12)
    single = loss(params, x[0], onehot[0])
    np.testing.assert_allclose(single, loss(params, x[0], y[0]), rtol=1e-12)

    joint = lambda params, pair, _: victim.loss(params, pair[0], jax.nn.softmax(pair[1]))
    match = GradientMatching(params, None, gradient_of(victim.loss, params, x, y), joint)
    pair, h = (x + 0.1, normal(3, 4)), 1e-5
    along = (normal(*x.shape), normal(3, 4))
    run = value_and_grad
    grad = run(match, pair)[1]
    ahead, behind = (run(match, jax.tree.map(lambda a, e, s=s: a + s * h * e, pair, along))[0] for s in (1, -1))
    expected = sum(jnp.vdot(g, e) for g, e in zip(grad, along, strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * h), expected, rtol=1e-6)


def test_floating_labels_that_are_no_probabilities_are_refused():
    victim = dataclasses.replace(VICTIMS["cnn"])
    params, x = shapes(victim)
    with pytest.raises(ValueError, match=r"shape \(4,\), not \(\); make labels integers"):
        jax.eval_shape(victim.loss, params, x, jnp.float32(1))


def test_the_names_of_victims_tell_which_have_batch_norms():
    for name in zoo.VICTIMS:
        assert zoo.has_batch_norm(name) == zoo.make_victim(name, (32, 32, 3), 10).has_batch_norm
