"""Batches behind a dense layer and a ReLU come back to many digits; what else is said, and nothing is made up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax import algebra, victims
from gdiff_jax.algebra import spear
from gdiff_jax.algebra.structure import on_host
from gdiff_jax.first_dense import FirstDense

SHAPE, CLASSES = (8, 8, 3), 5
VICTIM = victims.mlp(SHAPE, CLASSES, widths=(96, 48))
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, *SHAPE)).astype(np.float32)
LABELS = jnp.array([3, 1, 1, 0, 4, 2, 2, 0])


@functools.cache
def weights(victim=VICTIM):
    return jax.jit(victim.init)(jax.random.key(1))


def leak_of(images, labels, victim=VICTIM, params=None):
    return jax.device_get(jax.jit(jax.grad(victim.loss))(params or weights(victim), jnp.asarray(images), labels))


def solved(leak, labels, victim=VICTIM, params=None, **options):
    shape = (len(labels), *SHAPE)
    return algebra.solve_batch(victim.loss, params or weights(victim), leak, shape, labels, victim.first_dense, **options)


def psnr(found, images):
    return 10 * np.log10(4 / np.mean(np.square(found - images), axis=(1, 2, 3)))


@pytest.mark.parametrize("count", [1, 8])
def test_the_images_are_solved(count):
    """Of equal labels the order is free."""
    found = solved(leak_of(IMAGES[:count], LABELS[:count]), LABELS[:count])
    assert found.exact, found.steps
    assert found.residual < 1e-5
    distances = np.square(found.images[:, None] - IMAGES[None, :count]).mean((2, 3, 4))
    assert sorted(distances.argmin(1)) == list(range(count))
    assert (LABELS[distances.argmin(1)] == LABELS[:count]).all()
    assert distances.min(1).max() < 1e-11


def test_clipping_and_dead_units_change_nothing():
    params = dict(weights())
    params["fc1.bias"] = params["fc1.bias"].at[:30].set(-100.0)
    leak = jax.tree.map(lambda g: 0.01 * g, leak_of(IMAGES[3:6], LABELS[3:6], params=params))
    found = solved(leak, LABELS[3:6], params=params)
    assert found.exact, found.steps
    assert psnr(found.images, IMAGES[3:6]).min() > 100


def test_an_image_that_is_there_twice_is_repeated():
    images, labels = IMAGES[[0, 3, 0, 5]], LABELS[jnp.array([0, 3, 0, 5])]
    found = solved(leak_of(images, labels), labels)
    assert "rank 3 for 4 images: some are alike" in found.steps[0]
    assert found.exact
    assert psnr(found.images, images).min() > 100
    assert found.residual < 1e-5


def test_wrong_labels_do_not_hide_the_images():
    found = solved(leak_of(IMAGES[3:6], LABELS[3:6]), jnp.array([1, 1, 3]))
    assert found.exact
    assert found.residual > 0.1
    assert np.square(found.images[:, None] - IMAGES[None, 3:6]).mean((2, 3, 4)).min(0).max() < 1e-10


def test_pixels_are_normalised_before_the_layer():
    scale, shift = (2.0, -1.0, 0.5), (0.1, 0.0, -0.3)

    def loss(params, x, y):
        return VICTIM.loss(params, x * jnp.array(scale).reshape(1, 1, 1, 3) + jnp.array(shift).reshape(1, 1, 1, 3), y)

    images, labels, layer = IMAGES[3:6], LABELS[3:6], FirstDense("fc1.kernel", "fc1.bias", scale, shift)
    leak = jax.device_get(jax.jit(jax.grad(loss))(weights(), jnp.asarray(images), labels))
    found = algebra.solve_batch(loss, weights(), leak, images.shape, labels, layer)
    assert found.exact
    assert psnr(found.images, images).min() > 100


def test_under_noise_the_errors_are_of_the_size_that_is_said():
    """Somewhat larger: the deltas err as well."""
    images, labels, sigma = IMAGES[3:6], LABELS[3:6], 3e-4
    rng = np.random.default_rng(3)
    leak = {k: g + sigma * rng.standard_normal(g.shape).astype(np.float32) for k, g in leak_of(images, labels).items()}
    found = solved(leak, labels, sigma=sigma)
    errors = np.sqrt(np.square(found.images - images).mean((1, 2, 3)))
    assert not found.exact
    assert (errors < 0.01).all()
    assert (found.std > 0.4 * errors).all()
    assert (found.std < 1.2 * errors).all()


def test_sparse_rows_of_a_space_are_found():
    """Of a planted dictionary, whose rows are neither orthogonal nor of one length."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 120)) * (rng.random((6, 120)) < 0.5) + 0.0
    basis = np.linalg.svd(rows, full_matrices=False)[2]
    with on_host():
        noise = jnp.full(6, 1e-12)
        q = spear.sparse_directions(basis, noise, rng.normal(size=(40, 6)))
        q, zeros = jax.device_get(spear.refined(basis, noise, q))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = np.abs(q @ basis @ unit.T)
    right = cosines.max(1) > 1 - 1e-9
    assert set(cosines[right].argmax(1)) == set(range(6))
    assert right.mean() > 0.5
    np.testing.assert_allclose(zeros[right], (rows == 0).mean(1)[cosines[right].argmax(1)])


def test_directions_that_fit_no_mask_are_no_images():
    """Sparse as they are, of units in another order."""
    order = np.random.default_rng(0).permutation(96)
    leak = leak_of(IMAGES[3:6], LABELS[3:6])
    leak = {**leak, "fc1.kernel": leak["fc1.kernel"][:, order], "fc1.bias": leak["fc1.bias"][order]}
    found = solved(leak, LABELS[3:6])
    assert found.images is None
    assert not found.exact
    assert "of units agree with the images" in found.steps[-1]


@pytest.mark.parametrize(
    ("victim", "change", "words"),
    [
        (victims.mlp(SHAPE, CLASSES, widths=(96,), activation=jnp.tanh), lambda g: g, "does not feed a ReLU"),
        (victims.mlp(SHAPE, CLASSES, widths=(96,), norm=True), lambda g: g, "does not feed a ReLU"),
        (victims.mlp(SHAPE, CLASSES, widths=(5,)), lambda g: g, "5 neurons"),
        (VICTIM, jnp.zeros_like, "is zero"),
        (VICTIM, lambda g: g * jnp.nan, "not finite"),
    ],
)
def test_why_nothing_is_solved_is_said(victim, change, words):
    found = solved(jax.tree.map(change, leak_of(IMAGES[3:6], LABELS[3:6], victim)), LABELS[3:6], victim)
    assert found.images is None
    assert words in found.steps[-1]
