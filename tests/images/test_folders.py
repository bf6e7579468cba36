"""Which files of a folder or a .zip are pictures, and what label each has: worked out from names alone, nothing is decoded."""

import re
from pathlib import Path

import pytest

from gdiff_jax.images.folders import arrange, class_order, in_folder


def found(*names, split="test"):
    return arrange(Path("set"), names, split, lambda _: b"")


def labels(*names, split="test"):
    files = found(*names, split=split)
    return dict(zip(files.names, files.labels or [None] * len(files.names), strict=True))


@pytest.mark.parametrize("wrapper", ["", "photos/", "a/b/c/"])
def test_folders_that_hold_all_others_are_looked_through(wrapper):
    names = [f"{wrapper}cat/0.png", f"{wrapper}dog/deep/1.png", f"{wrapper}dog/2.png"]
    assert labels(*names) == dict(zip(names, (0, 1, 1), strict=True))


def test_one_folder_of_pictures_is_a_class_and_not_a_wrapper():
    assert found("cat/0.png", "cat/1.png").classes == ("cat",)
    assert found("cat/0.png", "dog/deep/1.png").classes == ("cat", "dog")
    assert found("photos/cover.png", "photos/cat/0.png", "photos/dog/1.png").labels is None  # and not 0 for all


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints/0.png",
        "cat/.cache/0.png",
        "cat/._0.png",
        "__MACOSX/photos/cat/._0.png",
        "cat/@eaDir/0.jpg/THUMB.jpg",
        "$RECYCLE.BIN/0.png",
        ".DS_Store",
        "cat/Thumbs.db",
    ],
)
def test_what_systems_leave_behind_is_passed_over(hidden):
    assert labels("cat/0.png", "dog/1.png", hidden) == {"cat/0.png": 0, "dog/1.png": 1}
    assert found("cat/0.png", "dog/1.png", hidden).notes == ()


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Test", "VALID", "validation", "Val"])
@pytest.mark.parametrize(("outer", "inner"), [("", ""), ("set/", ""), ("", "photos/"), ("set/", "photos/")])
def test_splits_in_any_case_within_wrappers_or_around_them(train, test, outer, inner):
    names = [f"{outer}{split}/{inner}{name}.png" for split in (train, test) for name in ("cat/0", "dog/1")]
    assert labels(*names) == dict(zip(names[2:], (0, 1), strict=True))
    assert labels(*names, split="train") == dict(zip(names[:2], (0, 1), strict=True))
    assert found(*names).has_splits


def test_one_split_alone_is_no_class_and_is_not_taken_for_the_other():
    assert labels("Test/cat/0.png", "Test/dog/1.png") == {"Test/cat/0.png": 0, "Test/dog/1.png": 1}
    with pytest.raises(FileNotFoundError, match=r"no picture for the split train .*its folders are Test"):
        found("Test/cat/0.png", split="train")


@pytest.mark.parametrize("other", ["extra/cat/0.png", "sample.png"])
def test_splits_beside_something_else_are_refused(other):
    with pytest.raises(ValueError, match=r"set holds Test and Train, which are splits, beside (extra|pictures); .*set/Test"):
        found("Train/cat/0.png", "Test/cat/0.png", other)


def test_a_train_is_a_class_where_no_folder_is_another_split():
    assert found("bus/0.png", "car/0.png", "train/0.png").classes == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("folders", "order", "said"),
    [
        (("zebra", "ant", "Bee"), ("Bee", "ant", "zebra"), []),
        (map(str, range(12)), tuple(map(str, range(12))), ["in their order.*ImageFolder sorts them as text: 0, 1, 10, 11, 2"]),
        (("01", "02", "10"), ("01", "02", "10"), ["not their numbers: folder 10 has 2"]),
        (("10", "9"), ("9", "10"), ["in their order", "folder 10 has 1"]),
        (("1", "-1", "0"), ("-1", "0", "1"), ["folder 1 has 2"]),
        (("class_2", "class_10"), ("class_10", "class_2"), ["as torchvision's ImageFolder does: class_10, class_2"]),
        (("3", "three"), ("3", "three"), []),
        ((), (), []),
    ],
)
def test_classes_are_in_the_order_of_image_folder_and_numbers_in_theirs(folders, order, said):
    classes, notes = class_order(folders)
    assert classes == order
    assert len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert re.search(words, note)


def test_folders_without_a_picture_and_kinds_that_are_not_read_are_named():
    files = found("set/cat/0.png", "set/bird/", "set/notes/a.txt", "set/cat/1.HEIC", "set/readme.md")
    assert files.notes == (
        "folders without a picture are no class: bird, notes",
        "pictures of these kinds are not read: 1 .heic; convert them to .png",
        "the only folder, cat, is taken for a class, so that every label is 0",
    )
    with pytest.raises(FileNotFoundError, match=r"1 \.heic; convert"):
        found("0.heic")


def test_a_picture_beside_the_classes_leaves_all_without_a_label():
    files = found("cat/0.png", "dog/1.png", "loose.png")
    assert (files.labels, files.classes) == (None, ("cat", "dog"))
    assert "pictures lie beside the folders cat, dog, so that none has a label: loose.png" in files.notes


def test_links_are_followed_and_circles_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.png").write_bytes(b"pixels")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    files = in_folder(tmp_path / "set", "test")
    assert files.names == ("cat/0.png", "dog/0.png")
    assert files.labels == (0, 1)
    assert files.read("dog/0.png") == b"pixels"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("Training Set", "Test Set"),
        ("train", "dev"),
    ],
)
def test_splits_are_known_by_a_word_of_their_names_where_they_hold_the_same_folders(train, test):
    names = [f"{train}/cat/0.png", f"{train}/dog/1.png", f"{test}/cat/2.png", f"{test}/dog/3.png"]
    files = found(*names)
    assert (files.names, files.labels, files.classes, files.has_splits) == (tuple(names[2:]), (0, 1), ("cat", "dog"), True)
    assert found(*names, split="train").names == tuple(names[:2])


def test_tables_beside_pictures_are_named_as_not_read():
    """Whose labels were taken to be in a table, which a folder of images is none."""
    only = found("images/0.png", "images/1.png", "labels.csv")
    assert only.notes == ("the only folder, images, is taken for a class, so that every label is 0; labels.csv is not read",)
    assert found("0.png", "labels.csv").notes == ("labels are not read from labels.csv",)
    assert found("cat/0.png", "dog/1.png").notes == ()


def test_splits_below_the_classes_are_read_too():
    names = ["cat/train/0.png", "cat/test/1.png", "dog/Train/2.png", "dog/val/3.png"]
    files = found(*names)
    assert (set(files.names), files.labels, files.classes) == ({names[1], names[3]}, (0, 1), ("cat", "dog"))
    assert files.has_splits
    assert not files.notes
    assert set(found(*names, split="train").names) == {names[0], names[2]}


@pytest.mark.parametrize("other", ["dog/2.png", "dog/other/2.png", "2.png"])
def test_splits_below_some_of_the_classes_are_refused(other):
    with pytest.raises(ValueError, match=r"cat hold splits, such as train and test, and .* pictures that are in none"):
        found("cat/train/0.png", "cat/test/1.png", other)


def test_accents_written_in_two_ways_are_one_name():
    """As on a Mac and elsewhere: the classes of the two splits are the same."""
    composed, combining = "caf\u00e9", "cafe\u0301"
    names = [f"train/{composed}/0.png", "train/zoo/1.png", f"test/{combining}/2.png", "test/zoo/3.png"]
    files = found(*names)
    assert (files.names, files.labels, files.classes, files.notes) == (tuple(names[2:]), (0, 1), (composed, "zoo"), ())


def test_classes_with_such_words_in_their_names_stay_classes():
    names = ["test_tube/0.png", "train_station/1.png"]
    assert found(*names).classes == ("test_tube", "train_station")
    deep = ["test_tube/a/0.png", "train_station/b/1.png"]
    assert found(*deep).classes == ("test_tube", "train_station")
    assert found("plane/0.png", "train/1.png").classes == ("plane", "train")  # of which one is a vehicle


@pytest.mark.parametrize("other", ["unlabeled/4.png", "extra/cat/4.png"])
def test_a_split_beside_what_is_none_is_refused(other):
    """A class that is named train has no folders of classes in it."""
    with pytest.raises(ValueError, match="which are splits, beside"):
        found("train/cat/0.png", "train/dog/1.png", other)


@pytest.mark.parametrize(("pictures", "about"), [("images", "masks"), ("Images", "annotations"), ("img", "labels")])
def test_masks_beside_images_are_no_second_class(pictures, about):
    names = [f"set/{pictures}/0.png", f"set/{about}/0.png"]
    with pytest.raises(ValueError, match=rf"{pictures} beside {about}, which are no two classes; .* such as set/{pictures}"):
        found(*names)
    assert found(f"{pictures}/0.png", "cat/1.png").classes  # nothing says that these are not
