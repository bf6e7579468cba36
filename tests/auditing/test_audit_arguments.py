"""What an audit's call makes of its images and labels: arrays of any library and type, and lists."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax.auditing.checks import images_of, labels_of
from gdiff_jax.images import to_model

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
SHAPE = (4, 4, 3)


@dataclasses.dataclass
class Tensor:
    """As torch's on a CPU, as far as NumPy sees it; one that needs a gradient refuses."""

    array: np.ndarray
    needs_gradient: bool = False

    def __array__(self, dtype=None, copy=None):
        if self.needs_gradient:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.array


@pytest.mark.parametrize(
    "images",
    [
        PIXELS,
        PIXELS.astype(np.int64),
        PIXELS.tolist(),
        list(PIXELS),
        jnp.asarray(PIXELS),
        Tensor(PIXELS),
        to_model(PIXELS),
        to_model(PIXELS).astype(np.float64),
        jnp.asarray(to_model(PIXELS)),
    ],
    ids=str,
)
def test_the_same_images_from_anywhere(images):
    found = images_of("images", images, SHAPE)
    np.testing.assert_array_equal(found, to_model(PIXELS))
    assert found.dtype == np.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_images_of_16_bits(dtype):
    images = jnp.asarray(to_model(PIXELS), dtype)
    np.testing.assert_array_equal(images_of("images", images, SHAPE), np.asarray(images, np.float32))


def test_grey_images_need_no_axis_for_their_channel():
    np.testing.assert_array_equal(images_of("images", PIXELS[..., 0], (4, 4, 1)), to_model(PIXELS[..., :1]))


def test_half_the_contrast_is_warned_of():
    with pytest.warns(UserWarning, match=r"half the contrast.*\[0, 1\] minus 0\.5, give 2 \* x"):
        images_of("images", PIXELS / 255 - 0.5, SHAPE)


def test_a_tensor_that_needs_a_gradient_is_one_line():
    with pytest.raises(ValueError, match=r"labels cannot be made an array \(RuntimeError: .*detach.*; give a NumPy array"):
        labels_of(Tensor(np.arange(2), needs_gradient=True), 2)


@pytest.mark.parametrize(
    "labels", [[3, 1], (3, 1), np.array([3, 1]), jnp.array([3, 1]), Tensor(np.array([3, 1])), [np.int64(3), 1]]
)
def test_the_same_labels_from_anywhere(labels):
    found = labels_of(labels, 2)
    assert (found.tolist(), found.dtype.kind) == ([3, 1], "i")


def test_lists_of_rows_are_one_array_and_pytrees_stay():
    rows = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    for labels in (rows, [np.array(row) for row in rows], np.array(rows)):
        np.testing.assert_array_equal(labels_of(labels, 2), rows)
    mask, kind = np.full((2, 4, 4), -1), [5, 6]
    found = labels_of({"mask": mask, "kind": kind}, 2)
    np.testing.assert_array_equal(found["mask"], mask)
    assert found["kind"].tolist() == kind
    pair = labels_of((np.array([1, 2]), np.array([3, 4])), 2)  # for a loss that takes two
    assert [array.tolist() for array in pair] == [[1, 2], [3, 4]]


def test_a_list_that_holds_more_than_arrays_is_a_pytree():
    with pytest.raises(ValueError, match=r"labels are of shape \[\(0,\)\], one for each of 2 images is needed"):
        labels_of([np.zeros(0, np.uint8), {}], 2)
