"""Records on disk: nothing damaged is believed, nothing finished is lost."""

import json
import resource
import shutil

import numpy as np
import pytest

from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.files import write_atomic
from gdiff_jax.sweeping import records

IDENTITY = {"steps": 3, "sigma_grid": (0.0, float("nan"))}


def a_store(folder, chunks=4):
    store = records.Store(folder, IDENTITY)
    store.open()
    rng = np.random.default_rng(0)
    for k in range(chunks):
        rows = [{"chunk": k, "psnr": float(p), "failed": False} for p in rng.normal(size=3)]
        store.save(k, rows, {"images": rng.normal(size=(3, 4, 4, 1)).astype(np.float32)})
    return store


def damages(rng, size):
    """(what, function of the bytes): 200 ways in all to spoil a file of so many bytes."""
    for _ in range(80):
        byte, bit = int(rng.integers(size)), int(rng.integers(8))
        yield f"bit {bit} of byte {byte}", lambda b, i=byte, m=1 << bit: b[:i] + bytes([b[i] ^ m]) + b[i + 1 :]
    for _ in range(15):
        keep = int(rng.integers(size))
        yield f"truncated to {keep}", lambda b, n=keep: b[:n]
    yield "doubled", lambda b: b + b
    yield "a byte more", lambda b: b + b"\n"
    yield "a byte in front", lambda b: b" " + b
    yield "zeros of the same size", lambda b: bytes(len(b))
    yield "empty", lambda b: b""


@pytest.mark.parametrize("suffix", [".jsonl", ".npz"])
def test_a_damaged_file_is_never_believed(tmp_path, suffix):
    store = a_store(tmp_path / "out")
    path = tmp_path / "out" / "chunks" / f"00001{suffix}"
    whole = path.read_bytes()
    count = 0
    for what, spoil in damages(np.random.default_rng(1), len(whole)):
        path.write_bytes(spoil(whole))
        assert not store.is_done(1), what
        with pytest.raises(RunError, match="the same command computes"):
            store.rows(range(4))
        with pytest.raises(RunError, match="00001"):
            store.arrays(1)
        assert [store.is_done(k) for k in (0, 2, 3)] == [True] * 3
        count += 1
    assert count == 100
    path.write_bytes(whole)
    assert store.is_done(1)


def test_files_of_another_chunk_or_configuration_are_not_believed(tmp_path):
    store = a_store(tmp_path / "out")
    chunks = tmp_path / "out" / "chunks"
    shutil.copy(chunks / "00002.npz", chunks / "00001.npz")
    assert not store.is_done(1)
    (chunks / "00003.npz").unlink()
    assert not store.is_done(3)
    other = records.Store(tmp_path / "other", {"steps": 4})
    other.open()
    shutil.copytree(chunks, tmp_path / "other" / "chunks")
    assert not any(map(other.is_done, range(4)))


def test_rows_and_arrays_come_back(tmp_path):
    store = a_store(tmp_path / "out")
    rows = store.rows([2, 0])
    assert [row["chunk"] for row in rows] == [2, 2, 2, 0, 0, 0]
    assert store.arrays(0)["images"].shape == (3, 4, 4, 1)


@pytest.mark.parametrize("spoil", [lambda t: t[: len(t) // 2], lambda t: t.replace('"steps": 3', '"steps": 4'), lambda t: ""])
def test_a_damaged_manifest_is_made_anew_where_the_seals_are_right(tmp_path, capsys, spoil):
    a_store(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(spoil(manifest.read_text()))
    store = records.Store(tmp_path / "out", IDENTITY)
    assert "is damaged and is made anew" in capsys.readouterr().out
    store.open()
    assert json.loads(manifest.read_text())["identity"]["steps"] == 3
    assert all(map(store.is_done, range(4)))
    manifest.write_text(spoil(manifest.read_text()))
    with pytest.raises(ConfigError, match="cannot be read or was altered"):
        records.Store(tmp_path / "out", {"steps": 5})


def test_two_sweeps_do_not_write_to_one_folder(tmp_path):
    store = a_store(tmp_path / "out")
    with pytest.raises(ConfigError, match="another sweep writes to it"):
        records.Store(tmp_path / "out", IDENTITY).open()
    del store


def test_what_a_kill_before_the_manifest_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".manifest.json.partial.json").write_text("{")
    records.Store(tmp_path / "out", IDENTITY).open()


def test_a_full_disk_loses_no_finished_chunk_and_leaves_nothing_half(tmp_path):
    """A limit on the size of files stands in for the disk."""
    store = a_store(tmp_path / "out", chunks=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.save(2, [{"chunk": 2}], {"images": np.random.default_rng(0).normal(size=99)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").rglob("*partial*"))
    assert [store.is_done(k) for k in range(3)] == [True, True, False]
    store.save(2, [{"chunk": 2}], {})
    assert store.is_done(2)


def test_write_atomic_leaves_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, lambda p: p.write_text("old"))

    def fail(p):
        p.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_output_of_another_configuration_is_refused_and_left_alone(tmp_path):
    store = records.Store(tmp_path / "out", {"steps": 3, "seed": 0})
    store.open()
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="steps was 3, is 4"):
        records.Store(tmp_path / "out", {"steps": 4, "seed": 0})
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not a sweep's output"):
        records.Store(tmp_path / "mine", {"steps": 3})


def test_a_store_in_memory_answers_as_one_on_disk(tmp_path):
    """Also in what becomes of numbers that are not finite, and of tuples."""
    stores = records.Store(tmp_path / "out", IDENTITY), records.MemoryStore(IDENTITY)
    rows = [{"psnr": float("nan"), "levels": (1, 2.5), "failed": True}, {"psnr": 3.0, "levels": (), "failed": False}]
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    for store in stores:
        store.open()
        assert not store.exists(7)
        store.save(7, rows, {"images": images})
        store.save(8, rows[1:], {})
        assert store.exists(7)
        assert store.is_done(7)
        assert store.rows([8, 7])[1] == {"psnr": None, "levels": [1, 2.5], "failed": True}
        np.testing.assert_array_equal(store.arrays(7)["images"], images)
        store.discard([7, 9])
        assert [store.exists(k) for k in (7, 8)] == [False, True]


def test_the_manifest_tells_how_images_were_read_and_goes_on_without(tmp_path):
    reading = {"classes": {"cat": 0, "dog": 1}}
    for told in (None, reading):
        store = records.Store(tmp_path / "out", IDENTITY, told)
        store.open()
        store.close()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["identity"] == store.identity == records.Store(tmp_path / "other", IDENTITY).identity
    assert [run.get("images") for run in manifest["runs"]] == [None, reading]
