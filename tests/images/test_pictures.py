"""What becomes of a picture file: upright, opaque, in the channels that are asked for; what was done is said."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gdiff_jax.images.pictures import decode

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (8, 12, 3), np.uint8)
TURNED = {  # how a picture lies in the file, by the orientation that EXIF gives it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def file_of(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", TURNED)
def test_a_picture_is_turned_upright(orientation):
    data = file_of(Image.fromarray(COLOURS).transpose(TURNED[orientation]), exif=exif(orientation))
    image, done = decode(data, 3, None)
    np.testing.assert_array_equal(image, COLOURS)
    assert done == ("turned upright as its EXIF orientation says",)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_that_lies_upright_is_as_pillow_reads_it(kind):
    data = file_of(Image.fromarray(COLOURS), kind, exif=exif(1))
    image, done = decode(data, 3, None)
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert done == ()


def test_what_is_transparent_is_white_and_what_is_hidden_there_is_not_shown():
    alpha = np.zeros((8, 12, 1), np.uint8)
    alpha[:4] = 255
    image, done = decode(file_of(Image.fromarray(np.concatenate([COLOURS, alpha], -1))), 3, None)
    np.testing.assert_array_equal(image[:4], COLOURS[:4])
    np.testing.assert_array_equal(image[4:], 255)
    assert done == ("laid on white where transparent",)


def test_a_transparent_colour_of_a_palette_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image, done = decode(file_of(palette, transparency=0), 3, None)
    assert image.tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert done == ("laid on white where transparent",)


def test_grey_and_colours_in_either_number_of_channels():
    grey = Image.fromarray(COLOURS[..., 0])
    for picture in (grey, grey.convert("LA"), grey.convert("RGB"), grey.convert("P")):
        for channels in (1, 3):
            image, done = decode(file_of(picture), channels, None)
            np.testing.assert_array_equal(image, np.repeat(COLOURS[..., :1], channels, -1))
            assert done == ()
    image, done = decode(file_of(Image.fromarray(COLOURS)), 1, None)
    np.testing.assert_allclose(image[..., 0], COLOURS @ [0.299, 0.587, 0.114], atol=1)
    assert done == ("made grey",)


def test_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "TIFF", "PNG"):
        image, done = decode(file_of(frames[0], kind, save_all=True, append_images=frames[1:]), 3, None)
        np.testing.assert_array_equal(image, np.full((4, 4, 3), (255, 0, 0)))
        assert done == ("of several frames or pages, the first taken",)


def test_of_16_bits_a_colour_the_upper_8_are_taken():
    values = RNG.integers(0, 65536, (2, 2, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    image, done = decode(b"\x89PNG\r\n\x1a\n" + chunks, 3, None)
    np.testing.assert_array_equal(image, values >> 8)
    assert done == ("reduced from 16 bits a channel to the upper 8",)


def test_of_grey_with_16_bits_the_scale_is_asked_for():
    with pytest.raises(ValueError, match=r"mode I;16, 8 bits a channel are needed, in a scale that you choose"):
        decode(file_of(Image.fromarray(np.full((4, 4), 20000, np.uint16))), 1, None)


@pytest.mark.parametrize(("data", "words"), [(b"", "is empty"), (b"version https://git-lfs.example/v1", "git lfs pull")])
def test_a_file_without_a_picture_says_what_it_is(data, words):
    with pytest.raises(ValueError, match=words):
        decode(data, 3, None)


@pytest.mark.parametrize(
    ("size", "done"),
    [
        ((40, 10), ("cropped at their centre to a square", "enlarged to 16 pixels")),
        ((32, 32), ("shrunk to 16 pixels",)),
        ((16, 16), ()),
    ],
)
def test_what_is_cropped_and_resized_is_told(size, done):
    image, told = decode(file_of(Image.new("RGB", size)), 3, 16)
    assert image.shape == (16, 16, 3)
    assert told == done
