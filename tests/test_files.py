"""Folders and names that a machine has, also one that is not as the others."""

import os
from pathlib import Path

import pytest

from gdiff_jax.auditing.record import plain
from gdiff_jax.errors import ConfigError
from gdiff_jax.files import cache_folder, need_folder, shown
from gdiff_jax.images import load_images
from gdiff_jax.sweeping.records import Store, strict_json
from gdiff_jax.tensor_files import read_tensors
from gdiff_jax.victims import tree_files


def test_bytes_that_are_not_utf8_are_shown_escaped_and_all_else_as_it_is():
    assert shown("Größe/σ.png") == "Größe/σ.png"
    assert shown(os.fsdecode(b"caf\xe9/x")) == "caf\\xe9/x"
    assert shown("Größe".encode().decode("ascii", "surrogateescape")) == "Größe"  # what argv holds under an ASCII locale
    assert shown("a \ud800 b") == "a \\ud800 b"
    name = os.fsdecode(b"caf\xe9")
    assert strict_json({name: [name]}) == '{"caf\\\\xe9": ["caf\\\\xe9"]}'
    assert plain({name: [name, 1.5]}) == {"caf\\xe9": ["caf\\xe9", 1.5]}


def test_a_store_of_a_path_that_is_not_utf8_is_found_again(tmp_path):
    identity = {"images": os.fsdecode(b"caf\xe9/images.npz")}
    store = Store(tmp_path / "out", identity)
    store.open()
    store.write_text("summary.md", f"σ of {identity['images']}")
    assert (tmp_path / "out" / "summary.md").read_bytes().decode("utf-8") == "σ of caf\\xe9/images.npz"
    assert Store(tmp_path / "out", identity).runs


def test_a_folder_that_cannot_be_made_is_told_before_it_is_needed(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for place, cause in (("notes.txt", "notes.txt"), ("notes.txt/a/b", "notes.txt"), ("lost/a", "lost")):
        with pytest.raises(ConfigError, match=f"--out .*{place}: no folder can be made there, .*{cause} is something else"):
            need_folder(tmp_path / place, "--out")
        with pytest.raises(ConfigError, match=place):
            Store(tmp_path / place, {})
    need_folder(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    if os.getuid():  # root may write everywhere
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match=r"shut cannot be written to"):
            need_folder(tmp_path / "shut" / "a")


def test_without_a_home_there_is_no_cache_and_no_error(tmp_path, monkeypatch):
    monkeypatch.delenv("GDIFF_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "gdiff_jax"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache_folder() is None

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() is None
    monkeypatch.setenv("GDIFF_JAX_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


READERS = {
    "set.npz": load_images,
    "set.zip": load_images,
    "model.safetensors": read_tensors,
    "model.pt": read_tensors,
    "gradient.npz": lambda path: tree_files.read(str(path)),
}


@pytest.mark.parametrize(("data", "words"), [(b"", "is empty"), (b"version https://git-lfs.example/v1", "git lfs pull")])
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_was_not_fetched_is_called_that_and_not_broken(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*{words}"):
        READERS[name](tmp_path / name)
