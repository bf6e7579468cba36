"""Arrays of another range or layout than is needed: taken where they can mean one thing only, else told what to do."""

import jax.numpy as jnp
import numpy as np
import pytest

from gdiff_jax.images import from_floats, layout_remedy, load_images, to_bytes, to_model, too_dark

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), np.uint8)
PIXELS.flat[:2] = 0, 255


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.int32])
def test_integers_of_any_type_are_pixels(dtype):
    np.testing.assert_array_equal(to_bytes(PIXELS.astype(dtype)), PIXELS)
    assert to_bytes(np.zeros((1, 2, 2, 3), dtype)).dtype == np.uint8  # black


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (PIXELS.astype(np.uint16) * 257, r"uint16 in 0\.\.65535; 0\.\.255 is needed; of 16 bits x // 257 is 8"),
        (PIXELS.astype(np.int16) - 128, r"int16 in -128\.\.127; 0\.\.255"),
        (PIXELS % 2, r"uint8 in 0\.\.1, .*if 1 is white, give 255 \* x"),
        (PIXELS > 9, r"bool; give 255 \* x"),
    ],
)
def test_integers_in_other_units_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        to_bytes(images)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_floats_of_any_type_in_the_range_are_taken(dtype):
    images = to_model(PIXELS).astype(dtype)
    np.testing.assert_array_equal(from_floats(images), images.astype(np.float32))
    for flat in (-1, 1):  # black and white; a white image is 1 in [0, 1] too
        assert (from_floats(np.full((1, 2, 2, 3), flat, dtype)) == flat).all()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (PIXELS / 255, r"float64 in 0\.\.1, which is the range \[0, 1\].*uint8.*2 \* x - 1 of \[0, 1\]"),
        (np.zeros((1, 2, 2, 3)), r"range \[0, 1\]"),  # black, or grey
        (PIXELS.astype(float), r"0\.\.255; .*x / 127\.5 - 1 of 0\.\.255"),
        ((PIXELS / 255 - 0.45) / 0.2, r"2 \* x - 1.*standardised, x \* std \+ mean"),
        (np.full((1, 2, 2, 3), np.nan), r"nan\.\.nan; give uint8"),
    ],
)
def test_floats_in_another_range_are_refused_with_what_to_do(images, words):
    with pytest.raises(ValueError, match=words):
        from_floats(images)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((9, 3, 8, 8), "transpose(0, 2, 3, 1)"),
        ((9, 1, 8, 8), "transpose(0, 2, 3, 1)"),
        ((9, 8, 8, 4), "images[..., :3]"),
        ((8, 8, 3), "images[None]"),
        ((9, 8, 8), "images[..., None]"),
        ((3, 8, 8), "transpose(1, 2, 0)[None]"),
        ((9, 64), "reshape(-1, 8, 8, 1)"),
        ((9, 192), "reshape(-1, 3, 8, 8).transpose(0, 2, 3, 1)"),
        ((9, 65), ""),
        ((9, 8, 8, 3), ""),
        ((9,), ""),
    ],
)
def test_the_layout_of_an_array_is_recognised(shape, words):
    assert words in layout_remedy(shape)
    assert bool(words) == bool(layout_remedy(shape))


@pytest.fixture
def saved(tmp_path):
    def read(channels=None, **arrays):
        np.savez(tmp_path / "set.npz", **arrays)
        return load_images(tmp_path / "set.npz", channels=channels)

    return read


def test_a_file_of_grey_images_needs_no_axis_for_them(saved):
    np.testing.assert_array_equal(saved(images=PIXELS[..., 0]).images, PIXELS[..., :1])
    data = saved(images=PIXELS[..., 0], channels=3)
    np.testing.assert_array_equal(data.images, np.repeat(PIXELS[..., :1], 3, -1))
    assert data.notes == ("grey images were made three equal channels",)


def test_a_file_of_colours_is_made_grey_as_a_picture_is(saved):
    from PIL import Image

    data = saved(images=PIXELS, channels=1)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in PIXELS])[..., None]
    np.testing.assert_array_equal(data.images, expected)
    assert data.notes == ("images in colours were made grey",)


@pytest.mark.parametrize("labels", [[1.0, 0.0], [[1], [0]], [True, False], np.array([1, 0], np.uint8)])
def test_labels_of_a_file_that_are_whole_numbers_are_taken(saved, labels):
    found = saved(images=PIXELS, labels=labels).labels
    assert (found.tolist(), found.dtype) == ([1, 0], np.int32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(images=PIXELS / 255), r"float64.*save \(255 \* x\)\.round\(\)"),
        (dict(images=PIXELS.transpose(0, 3, 1, 2)), r"channels come last: images\.transpose"),
        (dict(images=PIXELS % 2), "if 1 is white"),
        (dict(images=PIXELS, labels=["cat", "dog"]), r"integers 0 \.\. classes - 1; got <U3, such as 'cat'"),
        (dict(images=PIXELS, labels=np.eye(2)), r"labels\.argmax\(1\)"),
        (dict(images=PIXELS, labels=[2**40, 0]), "1099511627776"),  # not 0, its lower 32 bits
        (dict(images=PIXELS, labels=[np.nan, 0]), "nan"),
    ],
)
def test_what_a_file_may_mean_in_two_ways_is_refused_by_its_name(saved, arrays, words):
    with pytest.raises(ValueError, match=rf"set\.npz: .*{words}"):
        saved(**arrays)


def test_whole_numbers_that_are_all_nearly_black_are_told():
    """Of a set of digits in 0..15; all black is no unit of its own."""
    dark = lambda high: too_dark(np.linspace(0, high, 12).astype(np.uint8).reshape(1, 2, 2, 3))
    assert "reach from 0 to 15 of 255" in dark(15)
    assert dark(64) == dark(255) == dark(0) == ""
