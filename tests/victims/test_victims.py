"""The attacked networks and their loss against closed forms, and a victim of the user's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from objectives import float32

import gdiff_jax as gd
from gdiff_jax import modules
from gdiff_jax.victims import cnn, lenet, lenet_sigmoid, mlp, resnet, vit_tiny

VICTIMS = dict(mlp=mlp, lenet=lenet, lenet_sigmoid=lenet_sigmoid, cnn=cnn, resnet=resnet, vit=vit_tiny)
every = pytest.mark.parametrize("name", VICTIMS)
RNG = np.random.default_rng(0)
# The result is what is tested: without optimisation it compiles in a half to a tenth of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jit = functools.partial(quick_jit, static_argnums=0)
init = jit(lambda victim, key: victim.init(key))
loss_and_gradient = jit(lambda victim, params, x, y: jax.value_and_grad(victim.loss)(params, x, y))
loss_and_gradients = jit(
    lambda victim, params, x, y: jax.vmap(jax.value_and_grad(victim.loss), in_axes=(None, 0, 0))(params, x, y)
)
logits = jit(lambda victim, params, x: victim.logits(params, x))


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """Which test runs first on a worker must not decide what the others draw."""
    global RNG
    RNG = np.random.default_rng(0)


def normal(*shape):
    return float32(RNG.normal(size=shape))


def example(name, batch=3, image_shape=(8, 8, 1), num_classes=4):
    """A small victim, random parameters (of a size that keeps signals alive, biases too), images and labels."""
    victim = VICTIMS[name](image_shape, num_classes)
    params = {n: normal(*s) / max(1, np.prod(s[:-1])) ** 0.5 for n, s in modules.param_shapes(victim).items()}
    return victim, params, normal(batch, *image_shape), jnp.asarray(RNG.integers(0, num_classes, batch))


def count(victim):
    return sum(int(np.prod(shape)) for shape in modules.param_shapes(victim).values())


# Sizes


@pytest.mark.parametrize(
    ("name", "size"),
    [("mlp", 1_640_330), ("lenet", 15_826), ("lenet_sigmoid", 15_826), ("cnn", 97_290), ("resnet", 78_186), ("vit", 74_954)],
)
def test_parameter_count_for_cifar10(name, size):
    assert count(VICTIMS[name]()) == size


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mlp", 13 * 10 * 2 * 512 + 512 + 512 * 128 + 128 + 128 * 3 + 3),
        ("lenet", (25 * 2 * 12 + 12) + 2 * (25 * 12 * 12 + 12) + 4 * 3 * 12 * 3 + 3),  # 13 x 10 -> 7 x 5 -> 4 x 3
        ("cnn", (9 * 2 * 32 + 32) + (9 * 32 * 64 + 64) + (9 * 64 * 64 + 64) + 4 * 3 * 64 * 3 + 3),
    ],
)
def test_other_image_shapes_and_classes(name, size):
    victim, params, x, _ = example(name, 2, (13, 10, 2), 3)
    assert count(victim) == size
    assert logits(victim, params, x).shape == (2, 3)
    assert logits(victim, params, x[0]).shape == (3,)


# The loss


@every
def test_loss_of_a_batch_is_the_mean_of_single_losses_and_so_is_its_gradient(name):
    """Also that no example looks at another: there are no batch statistics."""
    victim, params, x, y = example(name)
    loss, gradient = loss_and_gradient(victim, params, x, y)
    losses, gradients = loss_and_gradients(victim, params, x, y)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    for leaf, value in gradient.items():
        mean = gradients[leaf].mean(0)
        assert np.abs(mean).max() > 0
        np.testing.assert_allclose(value, mean, atol=1e-5 * np.abs(mean).max())


@every
def test_loss_is_the_mean_cross_entropy_of_the_logits(name):
    victim, params, x, y = example(name)
    z = np.asarray(logits(victim, params, x), np.float64)
    assert np.ptp(z) > 0.1
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(3), y]
    np.testing.assert_allclose(loss_and_gradient(victim, params, x, y)[0], expected.mean(), rtol=1e-5)


def test_logits_of_an_image_ignore_the_rest_of_the_batch():
    victim, params, x, _ = example("resnet")
    other = x.at[1:].set(100 * normal(2, 8, 8, 1))
    a, b = logits(victim, params, x), logits(victim, params, other)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    assert np.abs(a[1:] - b[1:]).max() > 0.1


# The networks


def plain_lenet(params, x, activation):
    for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
        kernel, bias = params[f"{name}.kernel"], params[f"{name}.bias"]
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, kernel, (stride, stride), ((2, 2), (2, 2)), dimension_numbers=numbers)
        x = activation(x + bias.reshape(1, 1, 1, -1))
    return x.reshape(len(x), -1) @ params["fc.kernel"] + params["fc.bias"].reshape(1, -1)


@pytest.mark.parametrize(("name", "activation"), [("lenet", jax.nn.relu), ("lenet_sigmoid", jax.nn.sigmoid)])
def test_lenet_is_three_plain_convolutions_and_a_dense_layer(name, activation):
    victim, params, x, y = example(name, image_shape=(12, 8, 3))
    np.testing.assert_allclose(logits(victim, params, x), plain_lenet(params, x, activation), atol=1e-5)

    def plain_loss(params):
        z = plain_lenet(params, x, activation)
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()

    expected = quick_jit(jax.grad(plain_loss))(params)
    for leaf, value in loss_and_gradient(victim, params, x, y)[1].items():
        np.testing.assert_allclose(value, expected[leaf], atol=1e-5 * np.abs(expected[leaf]).max())


def test_mlp_is_three_dense_layers():
    victim, params, x, _ = example("mlp")
    h = np.asarray(x).reshape(3, -1)
    for name in ("fc1", "fc2"):
        h = np.maximum(h @ params[f"{name}.kernel"] + params[f"{name}.bias"][None], 0)
    expected = h @ params["fc3.kernel"] + params["fc3.bias"][None]
    np.testing.assert_allclose(logits(victim, params, x), expected, atol=1e-5)


# Initial weights


def test_initial_weights_follow_from_the_key():
    victim = lenet((8, 8, 1), 4)
    a, b, c = (init(victim, jax.random.key(seed)) for seed in (0, 0, 1))
    assert a.keys() == modules.param_shapes(victim).keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        if name.endswith("kernel"):
            assert np.abs(a[name] - c[name]).min() > 0  # every single weight
            assert abs(np.std(a[name]) * np.sqrt(np.prod(a[name].shape[:-1])) - 1) < 0.25  # LeCun: variance 1 / fan-in
        else:
            np.testing.assert_array_equal(a[name], 0)


def test_sigmoid_lenet_starts_as_in_dlg_and_its_gradient_does_not_vanish():
    victim = lenet_sigmoid((8, 8, 1), 4)
    params = init(victim, jax.random.key(0))
    for value in params.values():
        assert -0.5 <= value.min() < value.max() <= 0.5
    pooled = np.concatenate([v.ravel() for v in params.values()])
    np.testing.assert_allclose(pooled.std(), 12**-0.5, rtol=0.02)  # uniform on an interval of length 1
    assert len({float(v.ravel()[0]) for v in params.values()}) == len(params)  # every leaf has a key of its own
    gradient = loss_and_gradient(victim, params, normal(8, 8, 1), jnp.asarray(1))[1]
    assert min(np.linalg.norm(g) for g in gradient.values()) > 1e-3


# A victim that is only a function


def softmax_regression(params, x, y):
    w, b = params
    return -jax.nn.log_softmax(x.reshape(-1) @ w + b)[y]


def test_a_loss_of_plain_jax_guides_a_sampler():
    """Softmax regression leaks its input up to a factor (the rows of grad_w are multiples of x); the sampler must find it."""
    params = normal(16, 4), normal(4)
    truth, y = jnp.clip(normal(4, 4, 1), -1.0, 1.0), jnp.asarray(2)
    leak = gd.victim_gradient(softmax_regression, params, truth, y)
    match = gd.GradientMatching(params, y, leak, softmax_regression)
    assert match(truth) == 0
    schedule = gd.Schedule.create(num_steps=100)
    denoise = jax.tree_util.Partial(lambda scale, x, t: (scale * x, None), jnp.float32(0.5))

    @quick_jit
    def sample(key, denoise, match):
        return gd.dsg_sample(key, denoise, match, schedule, truth.shape, guidance_rate=0.8, truth=truth)

    image, trace = sample(jax.random.key(0), denoise, match)
    unguided, _ = gd.unguided_sample(jax.random.key(0), denoise, schedule, truth.shape)
    assert trace.distance.shape == (100,)
    assert match(image) < 0.3 * match(unguided)
    assert trace.distance[-1] < 0.3 * trace.distance[0]
    assert trace.x0_error[-1] < 0.3 * trace.x0_error[0]


# Options of the architecture study


def test_layer_norm_is_flaxs():
    x = normal(3, 5, 16)
    ours, theirs = modules.LayerNorm(16), nnx.LayerNorm(16, epsilon=1e-5, rngs=nnx.Rngs(0))
    for layer in (ours, theirs):
        layer.scale[...] = jnp.linspace(0.5, 2, 16)
        layer.bias[...] = jnp.linspace(-1, 1, 16)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


def test_vit_is_a_strided_convolution_attention_and_two_dense_layers():
    """Against jax.nn's attention, a convolution for the patches, and the mean over tokens."""
    victim = vit_tiny((8, 12, 2), 4, patch=4, dim=16, depth=1, heads=2)
    p = {n: normal(*s) / max(1, np.prod(s[:-1])) ** 0.5 for n, s in modules.param_shapes(victim).items()}
    x = normal(3, 8, 12, 2)

    def norm(v, name):
        centred = v - v.mean(-1, keepdims=True)
        return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.scale"] + p[f"{name}.bias"]

    with jax.numpy_rank_promotion("allow"):
        kernel = p["embed.kernel"].reshape(4, 4, 2, 16)
        h = lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = h.reshape(3, 6, 16) + p["embed.bias"] + p["position"]
        qkv = norm(h, "blocks.0.norm1") @ p["blocks.0.qkv.kernel"] + p["blocks.0.qkv.bias"]
        q, k, v = (qkv.reshape(3, 6, 2, 3, 8)[:, :, :, i] for i in range(3))  # a head's q, k, v lie together
        attended = jax.nn.dot_product_attention(q, k, v).reshape(3, 6, 16)
        h = h + attended @ p["blocks.0.out.kernel"] + p["blocks.0.out.bias"]
        inner = norm(h, "blocks.0.norm2") @ p["blocks.0.mlp1.kernel"] + p["blocks.0.mlp1.bias"]
        h = h + jax.nn.gelu(inner) @ p["blocks.0.mlp2.kernel"] + p["blocks.0.mlp2.bias"]
        expected = norm(h, "norm").mean(1) @ p["fc.kernel"] + p["fc.bias"]
    np.testing.assert_allclose(logits(victim, p, x), expected, atol=1e-4)


def test_a_vit_needs_whole_patches():
    with pytest.raises(ValueError, match="10 x 8"):
        modules.param_shapes(vit_tiny((10, 8, 3), 4))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_is_that_of_2_by_2_windows(pooling):
    """An odd last row is left out, as `lax.reduce_window` does without padding."""
    victim = cnn((9, 8, 2), 3, channels=(4, 5), pooling=pooling)
    p = {n: normal(*s) for n, s in modules.param_shapes(victim).items()}
    x = normal(2, 9, 8, 2)
    h = x
    with jax.numpy_rank_promotion("allow"):
        for i in (1, 2):
            h = lax.conv_general_dilated(h, p[f"conv{i}.kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            h = jax.nn.relu(h + p[f"conv{i}.bias"])
        one, start = (lax.add, 0.0) if pooling == "mean" else (lax.max, -jnp.inf)
        h = lax.reduce_window(h, start, one, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / (4 if pooling == "mean" else 1)
        expected = h.reshape(2, -1) @ p["fc.kernel"] + p["fc.bias"]
    np.testing.assert_allclose(logits(victim, p, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        (mlp((8, 8, 1), 4, widths=(6,)), mlp((8, 8, 1), 4, widths=(6,), activation=jax.nn.tanh)),
        (mlp((8, 8, 1), 4, widths=(6,)), mlp((8, 8, 1), 4, widths=(6,), norm=True)),
        (cnn((8, 8, 1), 4, channels=(8, 8)), cnn((8, 8, 1), 4, channels=(8, 8), norm=True)),
        (cnn((8, 8, 1), 4, channels=(8, 8)), cnn((8, 8, 1), 4, channels=(8, 8), activation=jax.nn.sigmoid)),
        (resnet((8, 8, 1), 4, channels=(8, 16)), resnet((8, 8, 1), 4, channels=(8, 16), residual=False)),
        (lenet((8, 8, 1), 4, width=4), lenet((8, 8, 1), 4, width=4, activation=jax.nn.tanh)),
    ],
    ids=lambda v: ",".join(k for k, _ in v.options),
)
def test_each_option_changes_the_network(plain, changed):
    """With the shared weights equal the logits differ; features and last layer are the whole network."""
    shapes = modules.param_shapes(plain) | modules.param_shapes(changed)
    p = {n: normal(*s) / max(1, np.prod(s[:-1])) ** 0.5 for n, s in shapes.items()}
    x = normal(2, 8, 8, 1)
    of = lambda v: {n: p[n] for n in modules.param_shapes(v)}
    assert np.abs(logits(plain, of(plain), x) - logits(changed, of(changed), x)).max() > 1e-2
    assert plain != changed
    last = changed.last_kernel
    whole = changed.features(of(changed), x[0]) @ p[last] + p[last.replace("kernel", "bias")]
    np.testing.assert_allclose(whole, logits(changed, of(changed), x)[0], atol=1e-4)


def test_a_deeper_or_wider_network_has_the_layers_that_were_asked_for():
    deep = modules.param_shapes(mlp((4, 4, 1), 3, widths=(5, 6, 7)))
    assert [deep[f"fc{i}.kernel"] for i in (1, 2, 3, 4)] == [(16, 5), (5, 6), (6, 7), (7, 3)]
    wide = modules.param_shapes(cnn((8, 8, 1), 3, channels=(2, 3, 4, 5)))
    assert wide["conv4.kernel"] == (3, 3, 4, 5)
    assert wide["fc.kernel"] == (5, 3)
