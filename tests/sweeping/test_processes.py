"""Several processes, one sweep: who computes what, and what is said when they do not fit or one of them dies."""

import socket
import subprocess
import sys

import jax
import pytest
from tiny import ROOT

from gdiff_jax import parallel
from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.sweeping import processes, records

DIGEST = bytes(32)


def test_one_process_does_all_of_it_and_what_is_damaged_anew(tmp_path):
    store = records.Store(tmp_path / "out", {})
    store.save(1, [{"a": 1}], {})
    assert processes.is_first()
    assert processes.share(store, [1, 4, 5], DIGEST) == [1, 4, 5]
    assert not store.exists(1)
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture
def second_of_two(monkeypatch):
    """This process takes itself for the second of two, who agree with it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(parallel, "agree", lambda values: values)
    monkeypatch.setattr(parallel, "all_have", lambda values: True)
    monkeypatch.setattr(processes, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(processes, "_live", lambda store: None)
    monkeypatch.setattr(processes.time, "time_ns", lambda: 7)


@pytest.mark.usefixtures("second_of_two")
def test_of_two_processes_the_second_takes_every_other_chunk(tmp_path):
    first = records.Store(tmp_path / "out", {})
    first.open(run=7)
    store = records.Store(tmp_path / "out", {})
    assert not processes.is_first()
    assert processes.share(store, [2, 3, 5, 8, 9], DIGEST) == [3, 8]
    assert processes.share(store, [], DIGEST) == []


@pytest.mark.usefixtures("second_of_two")
def test_processes_that_see_no_common_folder_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="process 1 does not see what process 0 writes there"):
        processes.share(records.Store(tmp_path / "elsewhere", {}), [0], DIGEST)
    with pytest.raises(ConfigError, match="a folder that all of them see; give one"):
        processes.share(records.MemoryStore(), [0], DIGEST)
    monkeypatch.setattr(parallel, "all_have", lambda values: False)
    with pytest.raises(ConfigError, match="given different flags"):
        processes.share(records.Store(tmp_path / "elsewhere", {}), [0], DIGEST)
    assert not (tmp_path / "elsewhere").exists()


def test_a_share_that_never_comes_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr(processes, "LOOK_AGAIN", 0.01)
    store = records.Store(tmp_path / "out", {})
    store.open()
    store.save(0, [{"a": 1}], {})
    with pytest.raises(RunError, match="2 of 3 chunks are missing"):
        processes.wait_for_all(store, range(3))
    store.save(1, [{"a": 1}], {})
    store.save(2, [{"a": 1}], {})
    processes.wait_for_all(store, range(3))


SCRIPT = """
import os, sys, time
from pathlib import Path
from gdiff_jax import parallel
port, process, folder = sys.argv[1:]
parallel.join(f"localhost:{port}", 2, int(process))
from gdiff_jax.sweeping import processes, records
from gdiff_jax.errors import ConfigError
try:
    processes.share(records.Store(Path(folder), {}), [0], bytes([int(process)]) * 32)
except ConfigError as error:
    assert "given different flags" in str(error)
else:
    sys.exit("one digest was taken for the other")
assert not Path(folder).exists()
store = records.Store(Path(folder), {})
mine = processes.share(store, [1, 2, 3, 5], bytes(32))
for chunk in mine:
    store.save(chunk, [{"process": int(process)}], {})
print(mine, flush=True)
while process == "0" and not Path(folder, "left").exists():  # the other's runtime ends it where this process goes first
    time.sleep(0.01)
Path(folder, "left").touch()
os._exit(0)
"""


def two_at_once(*commands):
    """What each of two processes that run at the same time printed."""
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for c in commands]
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    return [stdout for stdout, _ in outputs]


def test_two_processes_divide_the_work_and_refuse_different_flags(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = lambda process: [sys.executable, "-c", SCRIPT, str(port), str(process), str(tmp_path / "out")]
    said = two_at_once(command(0), command(1))
    assert [text.splitlines()[-1] for text in said] == ["[1, 3]", "[2, 5]"]
    rows = records.Store(tmp_path / "out", {}).rows([1, 2, 3, 5])
    assert [row["process"] for row in rows] == [0, 1, 0, 1]
    assert len(list((tmp_path / "out").glob(".process-*"))) == 2
