"""Labels beyond a loss's classes are found, however the loss takes its label; losses that take it as a number may have any."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdiff_jax.victims.label_range import check_label_range

CLASSES = 5
X = jnp.linspace(-1.0, 1.0, 12).reshape(2, 2, 3)
WEIGHTS = {"w": jnp.zeros((12, CLASSES)), "b": jnp.zeros(CLASSES)}  # untrained: at these all classes have one loss


def logits(params, x):
    return x.reshape((*x.shape[:-3], 12)) @ params["w"] + params["b"]


def index(params, x, y):
    return -jax.nn.log_softmax(logits(params, x))[y]


def one_hot(params, x, y):
    return -(jax.nn.one_hot(y, CLASSES) * jax.nn.log_softmax(logits(params, x))).sum(-1).mean()


def with_optax(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def clipped(params, x, y):
    return -jnp.take(jax.nn.log_softmax(logits(params, x)), y, axis=-1, mode="clip")


def filled(params, x, y):
    return -jnp.take(jax.nn.log_softmax(logits(params, x)), y, axis=-1)


def in_16_bits(params, x, y):
    return index(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16), y)


@pytest.mark.parametrize("loss", [index, one_hot, with_optax, filled, in_16_bits])
def test_a_label_beyond_the_classes_is_named(loss):
    for fine in ([0, 4], [4, 4], [1], [0, 0]):
        check_label_range(loss, WEIGHTS, X, np.array(fine))
    for wrong, first in (([0, 5], 5), ([5, 4], 5), ([1, 2, 6], 6), ([0, 255], 255), ([0, 1440764], 1440764)):
        where = wrong.index(first)
        with pytest.raises(ValueError, match=rf"label {first} of image {where} is none of the loss's classes, 0 \.\. 4; count"):
            check_label_range(loss, WEIGHTS, X, np.array(wrong))
    for wrong in ([0, -1], [3, -1], [-2, -2]):
        with pytest.raises(ValueError, match=r"label -\d of image \d is none .* leave out images without a label"):
            check_label_range(loss, WEIGHTS, X, np.array(wrong))


def squared(params, x, y):
    return jnp.square(logits(params, x).sum() - y)


def hinge(params, x, y):
    return jax.nn.relu(1 - y * logits(params, x).sum())


def logistic(params, x, y):
    return jax.nn.softplus(-y * logits(params, x).sum())


def without_label(params, x, y):
    return jnp.square(logits(params, x)).sum()


def of_two_classes(params, x, y):
    p = jax.nn.sigmoid(logits(params, x).sum())
    return -jnp.log(jnp.where(y == 0, 1 - p, p))


def above(params, x, y):
    return of_two_classes(params, x, (y > 4).astype(jnp.int32))


def coarse(params, x, y):
    return index(params, x, jnp.array([0, 0, 1, 1, 2, 2, 3, 3])[y])


def capped(params, x, y):
    return squared(params, x, jnp.clip(y, 0, 4))


def saturated(params, x, y):
    return squared(params, x, jnp.tanh(y))


@pytest.mark.parametrize(
    "loss", [squared, hinge, logistic, without_label, of_two_classes, clipped, above, coarse, capped, saturated]
)
def test_a_label_that_is_no_index_may_be_any_number(loss):
    for labels in ([-1, 1], [40, 7], [-3, 9], [2, 3]):
        check_label_range(loss, WEIGHTS, X, np.array(labels))


def test_a_loss_of_several_images_is_asked_as_it_is_called():
    batch = jnp.stack([X, -X])
    check_label_range(with_optax, WEIGHTS, batch, np.array([0, 4, 1, 2]))
    with pytest.raises(ValueError, match="label 5 of image 2"):
        check_label_range(with_optax, WEIGHTS, batch, np.array([0, 4, 5, 2]))


def test_no_two_classes_of_many_are_taken_for_one():
    weights = {"w": jnp.zeros((12, 2000)), "b": jnp.zeros(2000)}
    for label in (998, 999, 1000, 1998, 1999):
        check_label_range(in_16_bits, weights, X, np.array([label]))
    with pytest.raises(ValueError, match=r"0 \.\. 1999"):
        check_label_range(in_16_bits, weights, X, np.array([2000]))


@pytest.mark.parametrize("labels", [np.array([0.5, 9.0]), np.full((2, 4), -1), {"a": np.array([9]), "b": np.array([9])}])
def test_other_labels_and_losses_that_fail_are_left_to_other_checks(labels):
    check_label_range(index, WEIGHTS, X, labels)
    check_label_range(lambda params, x, y: 1 / 0, WEIGHTS, X, np.array([9]))


def test_labels_of_one_column_and_whole_floats_are_classes_too():
    column = lambda params, x, y: index(params, x, y[0])
    whole = lambda params, x, y: index(params, x, y.astype(jnp.int32))
    for loss, labels in ((column, np.array([[0], [5]])), (whole, np.array([0.0, 5.0], np.float32))):
        check_label_range(loss, WEIGHTS, X, labels * 4 // 5)
        with pytest.raises(ValueError, match=r"label 5 of image 1 is none of the loss's classes, 0 \.\. 4"):
            check_label_range(loss, WEIGHTS, X, labels)
