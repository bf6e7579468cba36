"""Every source that `load_images` reads, whole and broken; broken is a FileNotFoundError or ValueError that names the file."""

import json
import os
import pickle
import shutil
import struct
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gdiff_jax.images import BUNDLED, CIFAR10_CLASSES, ImageSet, load_images, to_model, to_unit
from gdiff_jax.training.data import load_split

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, (*shape, 3), np.uint8)


def write_picture(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


# The set that comes with the package


def test_bundled_set_is_the_head_of_the_cifar10_test_set():
    bundled = load_images(BUNDLED)
    assert bundled.images.shape == (64, 32, 32, 3)
    assert bundled.images.dtype == np.uint8
    assert bundled.labels.dtype == np.int32
    assert bundled.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
    assert set(bundled.labels) <= set(range(len(CIFAR10_CLASSES)))
    assert len(set(bundled.names)) == len(bundled) == 64
    assert bundled.images.std((1, 2, 3)).min() > 10  # pictures, not blanks


def test_take_keeps_pixels_labels_and_names_together():
    bundled = load_images(BUNDLED)
    part = bundled.take(np.array([5, 2]))
    np.testing.assert_array_equal(part.images, bundled.images[[5, 2]])
    assert part.labels.tolist() == [6, 8]
    assert part.names == (bundled.names[5], bundled.names[2])
    assert bundled.take(slice(3)).names == bundled.names[:3]


def test_sha256_sees_pixels_shape_and_labels_but_not_names():
    images, labels = pixels(3, 4, 4), np.array([1, 2, 3], np.int32)
    base = ImageSet(images, labels, ("a", "b", "c"))
    other = images.copy()
    other[2, 3, 3, 2] ^= 1
    assert base.sha256 == ImageSet(images.copy(), labels, ("x", "y", "z")).sha256
    digests = {
        base.sha256,
        ImageSet(other, labels, base.names).sha256,
        ImageSet(images, labels[::-1], base.names).sha256,
        ImageSet(images, None, base.names).sha256,
        ImageSet(images.reshape(3, 2, 8, 3), labels, base.names).sha256,
    }
    assert len(digests) == 5


# Ranges


def test_to_model_and_to_unit_are_inverse_on_every_byte():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    model = to_model(values)
    assert model.dtype == np.float32
    assert (model.min(), model.max()) == (-1, 1)
    np.testing.assert_allclose(to_unit(model) * 255, values, atol=1e-4)
    np.testing.assert_array_equal(np.round(to_unit(model) * 255).astype(np.uint8), values)


@pytest.mark.parametrize("xp", [np, jnp])
def test_to_unit_clips_and_stays_with_its_library(xp):
    unit = to_unit(xp.asarray([-3.0, -1.0, 0.0, 1.0, 3.0], xp.float32))
    assert isinstance(unit, np.ndarray) == (xp is np)
    assert unit.tolist() == [0, 0, 0.5, 1, 1]


# Folders of pictures


def test_flat_folder_is_read_in_sorted_order_without_labels(tmp_path):
    b, a = write_picture(tmp_path / "b.png", pixels(4, 4)), write_picture(tmp_path / "a.PNG", pixels(4, 4))
    (tmp_path / "notes.txt").write_text("not a picture")
    found = load_images(tmp_path)
    np.testing.assert_array_equal(found.images, [a, b])
    assert found.labels is None
    assert found.names == ("a.PNG", "b.png")


def test_sub_folders_are_the_classes_in_sorted_order(tmp_path):
    for name in ("zebra/1", "ant/2", "ant/deep/3"):
        write_picture(tmp_path / f"{name}.png", pixels(4, 4))
    found = load_images(tmp_path)
    labels = dict(zip(found.names, found.labels.tolist(), strict=True))
    assert labels == {"ant/2.png": 0, "ant/deep/3.png": 0, "zebra/1.png": 1}
    write_picture(tmp_path / "loose.png", pixels(4, 4))
    assert load_images(tmp_path).labels is None  # a picture outside the classes has none


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 4), (7, 7, 7, 255)).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(load_images(tmp_path).images, np.full((2, 4, 4, 3), 7))


def test_mixed_sizes_name_the_file_and_the_remedy(tmp_path):
    write_picture(tmp_path / "a.png", pixels(4, 4))
    write_picture(tmp_path / "odd.png", pixels(4, 6))
    with pytest.raises(ValueError, match=r"odd\.png.*size"):
        load_images(tmp_path)
    assert load_images(tmp_path, size=4).images.shape == (2, 4, 4, 3)


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_size_crops_the_centre_and_then_resizes_it(tmp_path, shape):
    image = np.full((*shape, 3), (0, 0, 255), np.uint8)
    left, top = (shape[1] - 8) // 2, (shape[0] - 8) // 2
    image[top : top + 8, left : left + 8] = (255, 0, 0)  # the centre is red, what the crop must drop is blue
    image[top : top + 4, left : left + 8, 1] = 200  # its upper half is brighter
    write_picture(tmp_path / "a.png", image)
    np.testing.assert_array_equal(load_images(tmp_path, size=8).images[0], image[top : top + 8, left : left + 8])
    small = load_images(tmp_path, size=2).images[0]
    np.testing.assert_array_equal(small[..., 0], 255)
    np.testing.assert_array_equal(small[..., 2], 0)
    assert small[0, :, 1].min() > 150 > 50 > small[1, :, 1].max()


def test_empty_folder(tmp_path):
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_images(tmp_path)


@pytest.mark.parametrize("broken", ["truncated", "text", "empty", "bomb"])
def test_broken_picture_is_named(tmp_path, broken):
    write_picture(tmp_path / "good.png", pixels(16, 16))
    whole = (tmp_path / "good.png").read_bytes()
    header = b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)  # 3.6e9 pixels
    content = {"truncated": whole[: len(whole) // 2], "text": b"I am a picture", "empty": b"", "bomb": header}[broken]
    (tmp_path / "ugly.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"ugly\.png"):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["absent", "absent.npz", "cifar10-test-65"])
def test_absent_source(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_images(tmp_path / name)


def test_file_of_no_known_kind(tmp_path):
    write_picture(tmp_path / "one.png", pixels(4, 4))
    with pytest.raises(ValueError, match=r"one\.png"):
        load_images(tmp_path / "one.png")


def test_misspelt_split_is_refused():
    with pytest.raises(ValueError, match=r"'validation'.*train or test"):
        load_images(BUNDLED, split="validation")


# .npz


@pytest.mark.parametrize("labels", [None, np.array([4, 0])])
def test_npz(tmp_path, labels):
    images = pixels(2, 4, 5)
    np.savez(tmp_path / "set.npz", images=images, **({} if labels is None else {"labels": labels}))
    found = load_images(tmp_path / "set.npz")
    np.testing.assert_array_equal(found.images, images)
    assert (found.labels is None) if labels is None else found.labels.tolist() == labels.tolist()
    assert found.names == ("set/0", "set/1")


GOOD = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(pictures=GOOD), "images"),
        (dict(images=GOOD.astype(np.float32)), "float32"),
        (dict(images=GOOD[0]), r"\(4, 4, 3\)"),
        (dict(images=np.uint8(0)), "uint8"),
        (dict(images=GOOD[..., :2]), r"\(2, 4, 4, 2\)"),
        (dict(images=GOOD, labels=[1, 2, 3]), r"2 images.*\(3,\)"),
        (dict(images=GOOD, labels=1), r"labels"),
        (dict(images=GOOD, labels=[0.5, 1.5]), "float64"),
        (dict(images=GOOD, y=[1, 2]), "no array `labels`; it has `y`: name it `labels`"),
        (dict(images=GOOD, Label=[[1], [2]]), "it has `Label`"),
        (dict(images=GOOD, names=["only one"]), "1 names"),
        (dict(images=GOOD, labels=np.array([None, None])), "pickle"),  # an object array would need unpickling
    ],
)
def test_npz_with_the_wrong_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=rf"set\.npz.*{message}"):
        load_images(tmp_path / "set.npz")


def test_npz_without_an_image(tmp_path):
    np.savez(tmp_path / "set.npz", images=GOOD[:0])
    with pytest.raises(FileNotFoundError, match=r"set\.npz"):
        load_images(tmp_path / "set.npz")


@pytest.mark.parametrize("broken", ["truncated", "flipped", "text", "empty"])
def test_broken_npz_is_named(tmp_path, broken):
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels(2, 4, 4))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255  # inside the pixels: the checksum must see it
    path.write_bytes({"truncated": whole[:-40], "flipped": flipped, "text": b"not a zip", "empty": b""}[broken])
    with pytest.raises(ValueError, match=r"set\.npz"):
        load_images(path)


# CIFAR-10's python archive


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what the true archive holds."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def write_batch(path, content, python2=False):
    with open(path, "wb") as file:
        (Python2Pickler if python2 else pickle.Pickler)(file, protocol=2).dump(content)
    if python2:
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))


def write_archive(tmp_path, kind, python2=False, batches=("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))):
    """Two images a batch; returns the source and {batch: (images, labels)}."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    truth = {}
    for number, name in enumerate(batches):
        images = pixels(2, 32, 32)
        rows = images.transpose(0, 3, 1, 2).reshape(2, 3072)  # planes of red, green, blue
        write_batch(folder / name, {b"data": rows, b"labels": [number, 9]}, python2)
        truth[name] = images, [number, 9]
    if kind == "folder":
        return folder, truth
    if kind == "parent":
        return tmp_path, truth
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    return tmp_path / "cifar-10-python.tar.gz", truth


@pytest.mark.parametrize("python2", [False, True])
@pytest.mark.parametrize("kind", ["folder", "parent", "tar"])
def test_cifar_archive(tmp_path, kind, python2):
    source, truth = write_archive(tmp_path, kind, python2)
    test = load_images(source)
    np.testing.assert_array_equal(test.images, truth["test_batch"][0])
    assert test.labels.tolist() == [0, 9]
    train = load_images(source, split="train")
    np.testing.assert_array_equal(train.images, np.concatenate([truth[f"data_batch_{i}"][0] for i in range(1, 6)]))
    assert train.labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    assert (test.names[1], train.names[9]) == ("cifar10-test/1", "cifar10-train/9")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_cifar_archive_without_the_batch(tmp_path, kind):
    source, _ = write_archive(tmp_path, kind, batches=("test_batch",))
    with pytest.raises(ValueError, match=f"{source}.*data_batch_1"):
        load_images(source, split="train")


@pytest.mark.parametrize("length", [0, 20, 1000, -2000])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_truncated_cifar_archive_is_named(tmp_path, kind, length):
    source, _ = write_archive(tmp_path, kind, batches=("test_batch",))
    file = source if kind == "tar" else source / "test_batch"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=str(source)):
        load_images(source)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("where", ["data", "labels", "beside"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, where):
    folder, _ = write_archive(tmp_path, "folder", batches=())
    attack = Malicious()
    attack.target = str(tmp_path / "owned")
    content = {b"data": pixels(2, 32, 32).reshape(2, 3072), b"labels": [1, 2], where.encode(): attack}
    write_batch(folder / "test_batch", content)
    with pytest.raises(ValueError, match=rf"{folder}.*{os.mkdir.__module__}\.mkdir"):
        load_images(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {b"data": GOOD.reshape(2, 48), b"labels": [1, 2]},
        {b"data": np.zeros((2, 3072), np.uint8)},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [b"1", b"2"]},
        {b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]},
    ],
)
def test_cifar_batch_with_the_wrong_content_is_named(tmp_path, content):
    folder, _ = write_archive(tmp_path, "folder", batches=())
    write_batch(folder / "test_batch", content)
    with pytest.raises(ValueError, match=str(folder)):
        load_images(folder)


# The npm package: one image a row of 1024 pixels


@pytest.fixture
def npm(tmp_path):
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        write_picture(tmp_path / f"{name}.png", pixels(3, 1024))
    (tmp_path / "test_lables.json").write_text("[7, 0, 9]")
    (tmp_path / "train_lables.json").write_text(json.dumps([i % 10 for i in range(15)]))
    return tmp_path


def test_npm_package(npm):
    test, train = load_images(npm), load_images(npm, split="train")
    rows = np.asarray(Image.open(npm / "test_batch.png"))
    np.testing.assert_array_equal(test.images, rows.reshape(3, 32, 32, 3))
    assert test.labels.tolist() == [7, 0, 9]
    assert len(train) == 15
    last = np.asarray(Image.open(npm / "data_batch_5.png"))[-1]
    np.testing.assert_array_equal(train.images[-1], last.reshape(32, 32, 3))
    assert train.labels[-1] == 4


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("test_batch.png", b"not a picture"),
        ("test_batch.png", None),
        ("test_lables.json", b"[7, 0"),
        ("test_lables.json", b"null"),
        ("test_lables.json", b"[7, 0]"),
        ("test_lables.json", b'["cat", "dog", "frog"]'),
    ],
)
def test_broken_npm_package_is_named(npm, file, content):
    if content is None:
        (npm / file).unlink()
    else:
        (npm / file).write_bytes(content)
    with pytest.raises(ValueError, match=str(npm)):
        load_images(npm)


def test_npm_package_of_another_width_is_named(npm):
    write_picture(npm / "test_batch.png", pixels(3, 1000))
    with pytest.raises(ValueError, match=r"test_batch\.png"):
        load_images(npm)
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None  # put back after the error


def test_a_zip_gives_the_pictures_of_its_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(tmp_path / "set" / name)
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    folder, archive = (load_images(tmp_path / name, size=4) for name in ("set", "set.zip"))
    assert folder.sha256 == archive.sha256
    assert archive.names == ("a/0.png", "a/1.png", "b/0.png")
    assert archive.labels.tolist() == [0, 0, 1]


def test_sub_folders_train_and_validation_are_splits_not_classes(tmp_path):
    for i, name in enumerate(("train/x/0.png", "train/y/1.png", "validation/y/2.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / name)
    train, test = (load_images(tmp_path, split) for split in ("train", "test"))
    assert train.images[:, 0, 0, 0].tolist() == [0, 1]
    assert train.labels.tolist() == [0, 1]
    assert test.images[:, 0, 0, 0].tolist() == [2]
    assert [len(part) for part in load_split(str(tmp_path), 4)] == [2, 1]


def test_splits_of_other_names_within_a_wrapper_are_held_out_as_they_lie(tmp_path):
    for i, name in enumerate(("Train/x/0.png", "Train/y/1.png", "Validation/y/2.png")):
        write_picture(tmp_path / "photos" / name, np.full((4, 4, 3), i, np.uint8))
    train, heldout = load_split(str(tmp_path), 4, channels=1)
    assert [part.images.tolist() for part in (train, heldout)] == [[[[[k]] * 4] * 4 for k in ks] for ks in ((0, 1), (2,))]
    assert [part.labels.tolist() for part in (train, heldout)] == [[0, 1], [1]]


@pytest.mark.parametrize("suffix", [".ZIP", ".NPZ", ".TAR.GZ"])
def test_endings_in_capitals(tmp_path, suffix):
    write_picture(tmp_path / "set" / "a.png", pixels(4, 4))
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    np.savez(tmp_path / "set.npz", images=pixels(1, 4, 4))
    write_archive(tmp_path, "tar", batches=("test_batch",))[0].rename(tmp_path / "set.tar.gz")
    (tmp_path / f"set{suffix.lower()}").rename(tmp_path / f"SET{suffix}")
    assert len(load_images(tmp_path / f"SET{suffix}")) == (2 if suffix == ".TAR.GZ" else 1)


def test_a_part_of_a_set_is_its_head(tmp_path):
    np.savez(tmp_path / "set.npz", images=pixels(3, 4, 4), labels=[2, 1, 0])
    whole, part = (load_images(tmp_path / "set.npz", count=count) for count in (None, 2))
    assert part.sha256 == whole.take(slice(2)).sha256
    assert len(load_images(tmp_path / "set.npz", count=9)) == 3


def test_a_broken_zip_is_refused_by_name(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match=r"x\.zip cannot be read as a \.zip file"):
        load_images(tmp_path / "x.zip")


def test_a_class_has_the_same_label_in_every_split(tmp_path):
    for name in ("train/cat/0.png", "train/dog/0.png", "train/eel/0.png", "test/cat/1.png", "test/eel/1.png"):
        write_picture(tmp_path / name, pixels(4, 4))
    assert load_images(tmp_path, "train").labels.tolist() == [0, 1, 2]
    assert load_images(tmp_path, "test").labels.tolist() == [0, 2]


def test_what_is_held_out_does_not_depend_on_how_much_is_asked_for(tmp_path):
    for i in range(40):
        write_picture(tmp_path / f"cifar10-{i:03}.png", pixels(4, 4))  # a name like CIFAR's, and no CIFAR
    (train, few), (same, all_) = (load_split(str(tmp_path), 4, limit) for limit in (2, None))
    assert (len(train), len(few), len(all_)) == (36, 2, 4)
    assert train.names == same.names
    assert few.names == all_.names[:2]
    assert not set(train.names) & set(all_.names)
    np.savez(tmp_path / "x.npz", images=pixels(5, 4, 4))
    with pytest.raises(ValueError, match="too few to hold"):
        load_split(str(tmp_path / "x.npz"), 4)


def test_pixels_of_more_than_8_bits_are_refused_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 20000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"mode I;16, 8 bits"):
        load_images(tmp_path)
