"""Records on disk: nothing damaged is believed, nothing finished is lost."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_sweep import command, config, records_of, run_in_process, without_time

from experiments import records
from experiments.cli import ConfigError, RunError, write_atomic

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


def test_a_sweep_computes_damaged_chunks_again_and_says_so(tiny_prior, tmp_path, capsys):
    c = config(tiny_prior, tmp_path / "out", methods=("dsg",))
    before = run_in_process(c)
    chunks = sorted((tmp_path / "out" / "chunks").glob("*.jsonl"))
    text = chunks[1].read_text()
    chunks[1].write_text(text.replace('"psnr": ', '"psnr": 9', 1))  # a number a reader would believe
    kept = {f: f.stat().st_mtime_ns for f in chunks if f != chunks[1]}
    capsys.readouterr()
    assert without_time(run_in_process(c)) == without_time(before)
    assert "computed again, because damaged or of another version: 1 chunks (1)" in capsys.readouterr().out
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items())


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


def test_a_full_disk_ends_with_one_line_and_the_sweep_goes_on_from_there(undisturbed, tmp_path):
    """A limit on the size of files stands in for the disk: the manifest fits, a chunk's images do not."""
    c = dataclasses.replace(undisturbed, out=str(tmp_path / "out"))
    manifest, images = ((Path(undisturbed.out) / name).stat().st_size for name in ("manifest.json", "chunks/00003.npz"))
    assert manifest < images - 100
    prlimit = ["prlimit", f"--fsize={images - 50}"]
    full = subprocess.run([*prlimit, *command(c)], capture_output=True, text=True, check=False)
    assert full.returncode == 1, full.stderr[-2000:]
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("error: File too large")
    assert "Free space and give the same command again" in last
    assert not list((tmp_path / "out").rglob("*partial*"))
    subprocess.run(command(c), check=True, capture_output=True)
    assert records_of(c) == records_of(undisturbed)


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


def test_a_trial_that_fails_is_counted_and_its_neighbours_do_not_notice(tiny_prior, tmp_path):
    """Noise of 1e38 overflows the distance: those trials end in nan, in the same batch as others."""
    c = config(tiny_prior, tmp_path / "a", methods=("dps",), sigma_grid=(0.1, 1e38), batch=6)
    rows = [r for r in run_in_process(c) if r["method"] == "dps"]
    alone = run_in_process(dataclasses.replace(c, sigma_grid=(0.1,), out=str(tmp_path / "b")))
    assert [r["failed"] for r in rows] == [False] * 3 + [True] * 3
    assert [r["psnr"] for r in rows[:3]] == pytest.approx([r["psnr"] for r in alone if r["method"] == "dps"], abs=1e-4)
    assert "3 (3 failed)" in (tmp_path / "a" / "summary.md").read_text()
