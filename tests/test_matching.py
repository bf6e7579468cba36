"""One mixed partial is the derivative of every distance: against two reverse passes, and against differences, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax import GaussianNoise, GradientMatching, LocalSGD, cosine, l2, squared_l2, victim_gradient
from gdiff_jax.conv import conv_victim
from gdiff_jax.matching import equal_layers, l1
from gdiff_jax.theory import jacobian


def clipped_l2(gradient, leak):
    """An attacker who knows that the client clips its gradient to a norm of 1/2."""
    norm = l2(gradient, jax.tree.map(jnp.zeros_like, gradient))
    scale = jnp.minimum(1.0, 0.5 / norm)
    return l2(jax.tree.map(lambda g: scale * g, gradient), leak)


DISTANCES = [l2, squared_l2, cosine, l1, clipped_l2]
each_distance = pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: d.__name__)


def mlp_loss(params, x, y):
    """A smooth victim of the user's own: any scalar function of (params, x, y)."""
    h = jnp.tanh(params["w1"] @ x.ravel() + params["b1"])
    return -jax.nn.log_softmax(params["w2"] @ h)[y]


def convnet_loss(params, x, y):
    """A convolution of stride 2, a sigmoid, a dense layer."""
    h = jax.nn.sigmoid(conv_victim(x[None], params["kernel"], 2, ((1, 1), (1, 1))))
    return -jax.nn.log_softmax(params["w"] @ h.ravel())[y]


@jax.custom_vjp
def tanh_in_reverse(h):
    """tanh with a rule of its own, of which JAX takes no forward derivative."""
    return jnp.tanh(h)


tanh_in_reverse.defvjp(lambda h: (jnp.tanh(h), h), lambda h, g: (g * (1 - jnp.square(jnp.tanh(h))),))


def custom_loss(params, x, y):
    h = tanh_in_reverse(params["w1"] @ tanh_in_reverse(x).ravel() + params["b1"])
    return -jax.nn.log_softmax(params["w2"] @ h)[y]


def plain_loss(params, x, y):
    return mlp_loss(params, jnp.tanh(x), y)


SHAPES = {"mlp": {"w1": (5, 16), "b1": (5,), "w2": (3, 5)}, "convnet": {"kernel": (3, 3, 1, 4), "w": (3, 16)}}


@functools.cache
def private(victim: str):
    """What an attacker of a private image of 4 x 4 pixels has, with noise on the leak, in float64."""
    rng = np.random.default_rng(4)
    loss = {"mlp": mlp_loss, "convnet": convnet_loss}[victim]
    params = {name: jax.device_put(rng.uniform(-1, 1, s)) for name, s in SHAPES[victim].items()}
    image, label = jax.device_put(rng.uniform(-1, 1, (4, 4, 1))), jnp.array(1)
    return params, label, released(loss, params, image, label), loss


@functools.partial(jax.jit, static_argnums=0)
def released(loss, *private):
    return GaussianNoise(0.01)(jax.random.key(1), victim_gradient(loss, *private))


def make_match(victim: str, distance=l2) -> GradientMatching:
    return GradientMatching(*private(victim), distance)


def candidate() -> jax.Array:
    return jax.device_put(np.random.default_rng(5).uniform(-1, 1, (4, 4, 1)))


def double_reverse(match: GradientMatching, x: jax.Array) -> jax.Array:
    return match.distance(jax.grad(match.loss)(match.params, x, match.label), match.leak)


# Compiled whole: operation by operation each is a program of its own.
value_of = jax.jit(lambda match, x: match(x))
value_and_grad = jax.jit(lambda match, x: jax.value_and_grad(match)(x))
gradient_of = jax.jit(victim_gradient, static_argnums=0)


@pytest.mark.usefixtures("x64")
@each_distance
@pytest.mark.parametrize("victim", SHAPES)
def test_gradient_is_that_of_double_reverse(victim: str, distance) -> None:
    match, x = make_match(victim, distance), candidate()
    value, grad = value_and_grad(match, x)
    expected_value, expected = jax.jit(lambda m, x: jax.value_and_grad(double_reverse, argnums=1)(m, x))(match, x)
    assert np.linalg.norm(expected) > 1e-4  # a vanished gradient would agree with anything
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-11 * np.linalg.norm(expected))


@pytest.mark.usefixtures("x64")
@each_distance
@pytest.mark.parametrize("victim", SHAPES)
def test_gradient_is_that_of_central_differences(victim: str, distance) -> None:
    """Every pixel; a step of 1e-4 leaves an error of order 1e-8 by truncation."""
    match, x, h = make_match(victim, distance), candidate(), 1e-4

    @jax.jit
    def both(match, x):
        pixels = jnp.eye(x.size).reshape(x.size, *x.shape)
        difference = jax.vmap(lambda e: (match(x + h * e) - match(x - h * e)) / (2 * h))(pixels)
        return jax.grad(match)(x).ravel(), difference

    grad, difference = both(match, x)
    np.testing.assert_allclose(grad, difference, rtol=0, atol=1e-6 * np.linalg.norm(difference))


def linear_loss(params, x, y):
    """<W, M x>: its gradient in W is M x, so that every distance has a closed form. y holds M."""
    return params @ (y @ x.ravel())


@pytest.mark.usefixtures("x64")
def test_linear_victim_has_the_gradient_of_least_squares() -> None:
    """|| M x - g ||: value and gradient M^T (M x - g) / || M x - g ||; twice M^T (M x - g) where squared."""
    rng = np.random.default_rng(6)
    m, x, leak = rng.normal(size=(5, 4)), rng.normal(size=(2, 2, 1)), rng.normal(size=5)
    r = m @ x.ravel() - leak
    for distance, value, grad in (
        (l2, np.linalg.norm(r), m.T @ r / np.linalg.norm(r)),
        (squared_l2, r @ r, 2 * m.T @ r),
    ):
        match = GradientMatching(jnp.zeros(5), jnp.asarray(m), jnp.asarray(leak), linear_loss, distance)
        found, slope = value_and_grad(match, x)
        np.testing.assert_allclose(found, value, rtol=1e-13)
        np.testing.assert_allclose(np.asarray(slope).ravel(), grad, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_norm_is_over_the_whole_gradient() -> None:
    """One norm of all leaves, not a sum of one a leaf."""
    g, leak = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}, {"a": jnp.array([0.0]), "b": jnp.array([[0.0]])}
    assert l2(g, leak) == 5
    assert squared_l2(g, leak) == 25
    assert cosine(g, {"a": jnp.array([-4.0]), "b": jnp.array([[3.0]])}) == 1
    assert l1(g, leak) == 7


@pytest.mark.usefixtures("x64")
@each_distance
@pytest.mark.parametrize("kind", ["one a layer", "one a coordinate"])
def test_weights_multiply_both_gradients(distance, kind: str) -> None:
    match, x = make_match("mlp", distance), candidate()
    rng = np.random.default_rng(9)
    shape = lambda a: () if kind == "one a layer" else a.shape
    weights = jax.tree.map(lambda a: jax.device_put(rng.uniform(0, 2, shape(a))), match.leak)
    scaled = lambda g: jax.tree.map(jnp.multiply, g, weights)

    def by_hand(x):
        return distance(scaled(jax.grad(match.loss)(match.params, x, match.label)), scaled(match.leak))

    value, grad = value_and_grad(dataclasses.replace(match, weights=weights), x)
    expected, expected_grad = jax.jit(jax.value_and_grad(by_hand))(x)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=1e-11 * np.linalg.norm(expected_grad))


@pytest.mark.usefixtures("x64")
def test_what_has_weight_zero_cannot_be_seen() -> None:
    """Coordinates that a client did not send: whatever the leak holds there."""
    match, x = make_match("mlp"), candidate()
    masked = dataclasses.replace(match, weights={"w1": jnp.ones((5, 16)).at[2].set(0), "b1": jnp.zeros(()), "w2": jnp.ones(())})
    other = dataclasses.replace(masked, leak=match.leak | {"w1": match.leak["w1"].at[2].add(7.0), "b1": match.leak["b1"] - 3})
    (value, grad), (other_value, other_grad) = (value_and_grad(m, x) for m in (masked, other))
    assert value == other_value < value_of(match, x)
    np.testing.assert_array_equal(grad, other_grad)


@pytest.mark.usefixtures("x64")
def test_equal_layers_gives_every_array_the_norm_one() -> None:
    leak = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[1e-9]]), "zero": jnp.zeros(3)}
    weights = equal_layers(leak)
    norms = jax.tree.map(lambda g, w: float(jnp.linalg.norm(g * w)), leak, weights)
    assert norms == pytest.approx({"a": 1, "b": 1, "zero": 0})
    assert all(w.shape == () for w in weights.values())


@pytest.mark.usefixtures("x64")
@each_distance
def test_a_client_of_local_steps_is_differentiated_through_its_path(distance) -> None:
    """Against central differences, every pixel; one step of it is the gradient."""
    match, x, h = dataclasses.replace(make_match("mlp", distance), client=LocalSGD(0.3, 3)), candidate(), 1e-5
    pixels = np.eye(x.size).reshape(x.size, *x.shape)
    difference = jax.jit(jax.vmap(lambda e: (match(x + h * e) - match(x - h * e)) / (2 * h)))(pixels)
    value, grad = value_and_grad(match, x)
    np.testing.assert_allclose(grad.ravel(), difference, rtol=0, atol=1e-6 * np.linalg.norm(difference))
    one, one_grad = value_and_grad(dataclasses.replace(match, client=LocalSGD(0.3, 1)), x)
    plain, plain_grad = value_and_grad(make_match("mlp", distance), x)
    assert abs(value - plain) > 1e-6
    np.testing.assert_allclose(one, plain, rtol=1e-12)
    np.testing.assert_allclose(one_grad, plain_grad, rtol=1e-10, atol=1e-13)


def soft_label_loss(params, candidate, y):
    """A candidate that is an image and its label's logits."""
    x, logits = candidate
    h = jnp.tanh(params["w1"] @ x.ravel() + params["b1"])
    return -jax.nn.softmax(logits) @ jax.nn.log_softmax(params["w2"] @ h)


@pytest.mark.usefixtures("x64")
@each_distance
def test_a_candidate_may_be_a_pytree(distance) -> None:
    match = dataclasses.replace(make_match("mlp", distance), loss=soft_label_loss)
    z = (candidate(), jnp.array([0.3, -1.0, 0.5]))
    expected = jax.jit(lambda m, z: jax.grad(double_reverse, argnums=1)(m, z))(match, z)
    for a, b in zip(value_and_grad(match, z)[1], expected, strict=True):
        assert np.linalg.norm(b) > 1e-5
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.linalg.norm(b))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("distance", [l2, squared_l2], ids=lambda d: d.__name__)
def test_exact_match_asks_for_no_change(distance) -> None:
    """Small integers, so that M x is exact."""
    m, x = jnp.array([[1.0, 2.0], [0.0, -3.0], [4.0, 1.0]]), jnp.array([[[2.0], [-1.0]]])
    match = GradientMatching(jnp.zeros(3), m, m @ x.ravel(), linear_loss, distance)
    value, grad = value_and_grad(match, x)
    assert value == 0
    assert np.all(np.asarray(grad) == 0)


@pytest.mark.parametrize("distance", [l2, cosine])
def test_a_gradient_that_is_not_finite_is_not_told_as_near(distance) -> None:
    """Its distance would else be 0, the least of all iterates."""
    ones = {"w": jnp.ones(3)}
    assert jnp.isnan(distance({"w": jnp.array([1.0, jnp.nan, 1.0])}, ones))


@pytest.mark.usefixtures("x64")
def test_cosine_of_zero_is_one_without_nan() -> None:
    zero, one = jnp.zeros(3), jnp.ones(3)
    for g, leak in ((zero, one), (one, zero), (zero, zero)):
        value, grad = jax.value_and_grad(cosine)(g, leak)
        assert value == 1
        assert np.all(np.isfinite(grad))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_cosine_ignores_the_scale_of_the_leak(scale: float) -> None:
    match, x = make_match("mlp", cosine), candidate()
    scaled = dataclasses.replace(match, leak=jax.tree.map(lambda g: scale * g, match.leak))
    for a, b in zip(value_and_grad(match, x), value_and_grad(scaled, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_cosine_runs_from_0_to_2() -> None:
    g = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
    np.testing.assert_allclose(cosine(g, jax.tree.map(lambda a: 3 * a, g)), 0, atol=1e-6)
    np.testing.assert_allclose(cosine(g, jax.tree.map(lambda a: -3 * a, g)), 2, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("field", ["params", "leak"])
def test_differentiating_in_anything_but_the_image_is_refused(field: str) -> None:
    """Its derivative rule knows the image only: a silent zero would be worse than an error."""
    match, x = make_match("mlp"), candidate()
    with pytest.raises(TypeError, match="in the image only"):
        jax.grad(lambda value: dataclasses.replace(match, **{field: value})(x))(getattr(match, field))


@jax.jit
def three_leaks(gradient):
    return jax.vmap(lambda k: GaussianNoise(0.1)(k, gradient))(jax.random.split(jax.random.key(2), 3))


@pytest.mark.usefixtures("x64")
@each_distance
def test_vmap_over_leaks_equals_one_at_a_time(distance) -> None:
    match, x = make_match("mlp", distance), candidate()
    leaks = three_leaks(match.leak)
    run = jax.jit(lambda leak: jax.value_and_grad(dataclasses.replace(match, leak=leak))(x))
    values, grads = jax.jit(jax.vmap(run))(leaks)
    assert len(set(np.asarray(values))) == 3
    for i in range(3):
        value, grad = run(jax.tree.map(lambda a, i=i: a[i], jax.device_get(leaks)))
        np.testing.assert_allclose(values[i], value, rtol=1e-13)
        np.testing.assert_allclose(grads[i], grad, rtol=1e-11, atol=1e-13)


def precisions(jaxpr) -> list:
    """Precision of every matmul and convolution of a jaxpr, nested ones too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(eqn.params["precision"])
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    found += precisions(inner)
    return found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("distance", [l2, squared_l2, cosine], ids=lambda d: d.__name__)
def test_every_matmul_of_the_victim_and_the_distance_is_at_full_precision(distance) -> None:
    """On a GPU or TPU the default is tf32 or bfloat16: 1 - cosine would lose all its digits in a dot product of 3."""
    match, x = make_match("convnet", distance), candidate()
    found = precisions(jax.make_jaxpr(lambda m, x: jax.value_and_grad(m)(x))(match, x).jaxpr)
    found += precisions(jax.make_jaxpr(lambda m, x: m(x))(match, x).jaxpr)
    assert len(found) > 10
    highest = jax.lax.Precision.HIGHEST
    assert all(p in (highest, (highest, highest)) for p in found), found


def test_noise_of_a_key_is_the_same_at_every_sigma() -> None:
    """Common random numbers: leak(s2) - g = s2 / s1 (leak(s1) - g)."""
    g = {"a": jnp.zeros((4, 5)), "b": jnp.zeros(7)}
    one, three = (GaussianNoise(s)(jax.random.key(3), g) for s in (0.5, 1.5))
    for name in g:
        np.testing.assert_allclose(three[name], 3 * one[name], rtol=1e-6)


def test_noise_is_added_to_the_gradient() -> None:
    g = {"a": jnp.arange(6.0).reshape(2, 3), "b": -jnp.ones(4)}
    silent, loud = GaussianNoise(0.0)(jax.random.key(3), g), GaussianNoise(0.1)(jax.random.key(3), g)
    noise = GaussianNoise(0.1)(jax.random.key(3), jax.tree.map(jnp.zeros_like, g))
    for name in g:
        np.testing.assert_array_equal(silent[name], g[name])
        np.testing.assert_allclose(loud[name], g[name] + noise[name], rtol=1e-6)


def test_sigma_is_the_standard_deviation_of_each_coordinate() -> None:
    """Moments of 40,000 draws within five standard errors; the fourth tells a normal from a uniform."""
    n, sigma = 40_000, 0.3
    noise = np.asarray(GaussianNoise(sigma)(jax.random.key(4), jnp.zeros(n)), np.float64) / sigma
    assert abs(noise.mean()) < 5 / np.sqrt(n)
    assert abs((noise**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_leaves_get_independent_noise() -> None:
    """Equal shapes must not share a draw; correlations within five standard errors."""
    n = 10_000
    noise = GaussianNoise(1.0)(jax.random.key(5), {"a": jnp.zeros(n), "b": jnp.zeros(n), "c": jnp.zeros((n, 1))})
    correlation = np.corrcoef([np.ravel(leaf) for leaf in noise.values()])
    assert np.all(np.abs(correlation - np.eye(3)) < 5 / np.sqrt(n))


def test_keys_give_other_noise() -> None:
    g = jnp.zeros(50)
    assert not np.any(np.asarray(GaussianNoise(1.0)(jax.random.key(6), g) == GaussianNoise(1.0)(jax.random.key(7), g)))


@pytest.mark.usefixtures("x64")
def test_a_loss_with_a_custom_vjp_has_the_derivatives_of_the_plain_one():
    match, x = make_match("mlp"), candidate()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: custom_loss(match.params, x, match.label), (x,), (x,))
    custom, plain = (dataclasses.replace(match, loss=loss) for loss in (custom_loss, plain_loss))
    for a, b in zip(*(jax.jit(jax.value_and_grad(m))(x) for m in (custom, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    v = candidate()[::-1]
    along = [jax.jit(jacobian.push, static_argnums=0)(m.loss, m.params, x, m.label, v) for m in (custom, plain)]
    for name in along[0]:
        np.testing.assert_allclose(along[0][name], along[1][name], rtol=1e-11, atol=1e-14)


SMALL = 1 / 4096  # of a trained network's gradients


def dense_loss(scale=SMALL, dtype=None):
    """Of a dense network in its params' dtype, or in `dtype` alone, as mixed precision has it."""

    def loss(params, x, y):
        kind = dtype or params["w"].dtype
        cast = lambda a: a.astype(kind)
        h = jnp.tanh(cast(x).reshape(-1) @ cast(params["w"]) + cast(params["b"]))
        return -scale * jax.nn.log_softmax((h @ cast(params["v"])).astype(jnp.float32))[y]

    return loss


def dense_params(dtype):
    rng = np.random.default_rng(5)
    shapes = {"w": (48, 8), "b": (8,), "v": (8, 10)}
    return {name: jnp.asarray((0.2 * rng.normal(size=shape)).astype(dtype)) for name, shape in shapes.items()}


DENSE_IMAGE = np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 4, 3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [SMALL, 1024.0])
def test_a_model_of_few_bits_is_matched_in_float32(dtype, scale):
    """The same numbers in float32 give the same distance and derivative, bit for bit; in fewer bits squares vanish."""
    half, x = dense_params(dtype), DENSE_IMAGE
    loss = dense_loss(scale)
    leak = gradient_of(loss, half, x[::-1], 3)
    assert leak["w"].dtype == dtype
    full = jax.tree.map(lambda a: np.asarray(a, np.float32), (half, leak))
    of_half, of_full = (value_and_grad(GradientMatching(p, 3, g, loss), x) for p, g in ((half, leak), full))
    jax.tree.map(np.testing.assert_array_equal, of_half, of_full)
    assert of_half[0] > 0


def test_mixed_precision_keeps_small_derivatives():
    """Weights in float32 and layers in float16: the derivative in the image is that of float32 but for float16's rounding."""
    params, x = dense_params(jnp.float32), DENSE_IMAGE
    of_mixed, of_full = dense_loss(1.0, jnp.float16), dense_loss(1.0)
    leak = jax.device_get(gradient_of(of_full, params, x[::-1], 3))
    slope = lambda loss, leak: jax.device_get(value_and_grad(GradientMatching(params, 3, leak, loss, l2), x)[1])
    mixed, full = slope(of_mixed, leak), slope(of_full, leak)
    assert np.abs(mixed - full).max() < 0.02 * np.abs(full).max()
    tiny = jax.tree.map(lambda g: g * 1e-6, leak)  # a residual that float16 would round to zero
    off = lambda loss: slope(loss, jax.tree.map(np.add, jax.device_get(gradient_of(loss, params, x, 3)), tiny))
    mixed, full = off(of_mixed), off(of_full)
    assert np.abs(mixed - full).max() < 0.05 * np.abs(full).max()


def of_another_shape(leak):
    return {
        r"leak\['w'\] is \(1, 8\), its parameter \(48, 8\)": leak | {"w": leak["w"][:1]},
        r"leak\['b'\] is \(\), its parameter \(8,\)": leak | {"b": leak["b"][0]},
        r"leak\['b'\] is \(1, 8\), its parameter \(8,\)": jax.tree.map(lambda a: a[None], {"b": leak["b"]})
        | {"v": leak["v"], "w": leak["w"]},
        r"leak\['v'\] is \(10, 8\)": leak | {"v": leak["v"].T},
        r"leak\['b'\] is int8; give floats": leak | {"b": np.ones(8, np.int8)},
        "leak is a .*, params a .*; give it as victim_gradient returns it": {"w": leak["w"]},
    }


def test_a_leak_that_is_not_shaped_as_the_parameters_is_refused():
    params, x = dense_params(jnp.float32), DENSE_IMAGE
    loss = dense_loss(1.0)
    leak = gradient_of(loss, params, x, 3)
    for words, other in of_another_shape(leak).items():
        with pytest.raises(ValueError, match=words):
            GradientMatching(params, 3, other, loss)(x)
    with pytest.raises(ValueError, match=r"weights\['w'\] is \(8,\)"):
        GradientMatching(params, 3, leak, loss, weights=leak | {"w": leak["b"]})(x)
    as_numpy = jax.tree.map(np.asarray, leak)
    assert value_of(GradientMatching(params, 3, as_numpy, loss), x) == value_of(GradientMatching(params, 3, leak, loss), x)
