"""Sweeps that are killed, interrupted or out of space in the middle: what is finished is kept, and the same command goes on."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny import command, records_of, run_command, to_folder

pytestmark = pytest.mark.long  # real processes; test_run, test_records and test_flags do the same in one


def test_resume_after_sigkill_equals_an_undisturbed_run(undisturbed, tmp_path):
    c = to_folder(undisturbed, tmp_path / "killed")
    process = subprocess.Popen(command(c), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    chunks = tmp_path / "killed" / "chunks"
    deadline = time.time() + 300
    while len(list(chunks.glob("[0-9]*.jsonl"))) < 8:  # in the middle of the guided trials
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in chunks.glob("[0-9]*.jsonl")}
    assert not (tmp_path / "killed" / "records.jsonl").exists()

    assert run_command(command(c)).returncode == 0
    assert records_of(c) == records_of(undisturbed)
    assert all(f.stat().st_mtime_ns == t for f, t in done.items()), "a finished chunk was computed again"
    assert len(json.loads((tmp_path / "killed" / "manifest.json").read_text())["runs"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_sweep_at_once_and_say_how_to_go_on(undisturbed, tmp_path, number):
    c = to_folder(undisturbed, tmp_path / "out")
    process = subprocess.Popen(command(c), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out" / "chunks").glob("[0-9]*.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert "the same command goes on" in process.communicate()[1]
    assert process.returncode == 128 + number
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_a_full_disk_ends_with_one_line_and_the_sweep_goes_on_from_there(undisturbed, tmp_path):
    """A limit on the size of files stands in for the disk: the manifest fits, a chunk's images do not."""
    c = to_folder(undisturbed, tmp_path / "out")
    manifest, images = ((Path(undisturbed.run.out) / name).stat().st_size for name in ("manifest.json", "chunks/00003.npz"))
    assert manifest < images - 100
    full = run_command(["prlimit", f"--fsize={images - 50}", *command(c)])
    assert full.returncode == 1, full.stderr[-2000:]
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("error: File too large")
    assert "Free space and give the same command again" in last
    assert not list((tmp_path / "out").rglob("*partial*"))
    assert run_command(command(c)).returncode == 0
    assert records_of(c) == records_of(undisturbed)
