"""One sweep by two processes of its command: the same records, and a clear state when one of them dies."""

import signal
import socket
import subprocess
import time

import pytest
from tiny import command, config, records_of, to_folder

from gdiff_jax.options import replace

pytestmark = pytest.mark.long  # tests/sweeping/test_processes.py has two processes that compute nothing


def two_processes(*configs):
    """The command with each of the configurations, as process 0 and process 1 of one sweep."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    start = lambda i, c: subprocess.Popen(
        [*command(c), *flags, f"--process_id={i}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return [start(i, c) for i, c in enumerate(configs)]


def test_two_processes_write_what_one_writes_and_go_on_after_one_died(undisturbed, tmp_path):
    c = to_folder(undisturbed, tmp_path / "two")
    chunks = tmp_path / "two" / "chunks"
    both = two_processes(c, c)
    while len(list(chunks.glob("[0-9]*.jsonl"))) < 4 and not any(p.poll() for p in both):
        time.sleep(0.01)
    both[1].send_signal(signal.SIGKILL)
    deadline = time.time() + 60  # the survivor does its own share
    while time.time() < deadline and not all((chunks / f"{k:05d}.jsonl").exists() for k in range(0, 18, 2)):
        time.sleep(0.05)
    both[0].send_signal(signal.SIGTERM)
    outputs = [p.communicate()[1] for p in both]
    assert all((chunks / f"{k:05d}.jsonl").exists() for k in range(0, 18, 2)), outputs[0][-2000:]
    for k in (2, 4):  # of the two first chunks to be done again, one is each process's
        (chunks / f"{k:05d}.jsonl").write_text("damaged")
    done = {f: f.stat().st_mtime_ns for f in chunks.glob("[0-9]*.jsonl") if f.stem not in ("00002", "00004")}

    again = two_processes(c, c)
    outputs = [p.communicate() for p in again]
    assert [p.returncode for p in again] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    said = [line for line in outputs[1][0].splitlines() if not line.startswith("[Gloo]")]
    assert not said, "only process 0 speaks"
    assert all(f.stat().st_mtime_ns == t for f, t in done.items()), "a finished chunk was computed again"
    assert records_of(c) == records_of(undisturbed)


def test_processes_with_different_flags_are_refused(tiny_prior, tmp_path):
    c = config(tiny_prior, tmp_path / "out", num_images=1)
    for process in two_processes(c, replace(c, seed=1)):
        assert "given different flags" in process.communicate()[1]
        assert process.returncode == 2
    assert not (tmp_path / "out").exists()
