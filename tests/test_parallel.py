"""Trials over devices and processes: the same numbers, no collective, and a clear state when one of them dies."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sweep import ONE_DEVICE, command, config, records_of

import gdiff_jax as gd
from experiments import processes, records, sweep
from experiments.cli import ConfigError, RunError
from experiments.inputs import load_inputs
from gdiff_jax import parallel

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)\b")


def four_devices():
    devices = jax.local_devices()
    assert len(devices) >= 4, "conftest asks for four devices"
    return parallel.trial_mesh(devices[:4])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", ["mixed partial", "double reverse"])
def test_gradients_on_four_devices_are_those_of_one_without_a_collective(derivative):
    """The derivative of each trial's own distance, with the victim's weights replicated."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 3))), "b": jnp.asarray(rng.normal(size=3))}
    loss = lambda p, x, y: jnp.square(jnp.tanh(x @ p["w"] + p["b"])[y]).sum()
    x, y = jnp.asarray(rng.normal(size=(8, 5))), jnp.arange(8) % 3
    leaks = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=(8, *a.shape))), params)

    def distance(params, x, y, leak):
        if derivative == "mixed partial":
            return gd.GradientMatching(params, y, leak, loss)(x)
        return gd.l2(jax.grad(loss)(params, x, y), leak)

    gradient = jax.grad(distance, argnums=1)
    expected = jax.vmap(gradient, in_axes=(None, 0, 0, 0))(params, x, y, leaks)
    mesh = four_devices()
    args = (parallel.replicate(params, mesh), *parallel.divide((x, y, leaks), mesh))
    compiled = jax.jit(parallel.map_trials(gradient, mesh, shared=1)).lower(*args).compile()
    found = compiled(*args)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(found.sharding.device_set) == 4
    assert not COLLECTIVE.search(compiled.as_text())


def test_a_sweep_on_four_devices_is_that_on_one(tiny_prior, tmp_path, monkeypatch):
    """Also where the last devices have nothing to do, and no program of the sweep holds a collective."""
    c = config(tiny_prior, tmp_path / "four", methods=("dsg", "dps"), num_images=5, batch=4)
    inputs = load_inputs(c)
    texts = []
    compile_program = sweep.compile_program

    def spy(*args):
        program = compile_program(*args)
        texts.append(program.run.as_text())
        return program

    monkeypatch.setattr(sweep, "compile_program", spy)
    rows = {}
    for name, mesh in (("four", four_devices()), ("one", ONE_DEVICE)):
        rows[name] = sweep.sweep(c, inputs, records.Store(tmp_path / name, {}), mesh=mesh)
    assert len(texts) == 6
    assert not any(map(COLLECTIVE.search, texts))
    for one, four in zip(rows["one"], rows["four"], strict=True):
        assert all(one[k] == four[k] for k in ("method", "sigma", "image", "seed", "chunk", "row"))
        for name in ("psnr", "mse", "distance", "noise_norm"):
            assert one.get(name, np.nan) == pytest.approx(four.get(name, np.nan), rel=1e-4, nan_ok=True)


def test_batched_linear_algebra_does_not_wait_for_ever(tiny_prior, tmp_path):
    """Two devices of a CPU that both call LAPACK with a batch from within XLA's pool of two threads would."""
    c = config(tiny_prior, tmp_path / "out", methods=("analytic",), num_images=6, batch=6)
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    for _ in range(2):
        subprocess.run(command(c), check=True, capture_output=True, timeout=120, env=env)
        shutil.rmtree(tmp_path / "out")


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
    c = dataclasses.replace(undisturbed, out=str(tmp_path / "two"))
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
    for process in two_processes(c, dataclasses.replace(c, seed=1)):
        assert "given different flags" in process.communicate()[1]
        assert process.returncode == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (dict(coordinator="localhost:1"), "--num_processes"),
        (dict(coordinator="localhost:1", num_processes=2, process_id=2), "is 2"),
        (dict(coordinator="localhost", num_processes=2, process_id=0), "HOST:PORT"),
        (dict(num_processes=2, process_id=0), "--coordinator"),
    ],
)
def test_bad_flags_of_processes(flags, value):
    with pytest.raises(ConfigError, match=value):
        processes.join(processes.Processes(**flags))


def test_a_share_that_never_comes_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr(processes, "LOOK_AGAIN", 0.01)
    store = records.Store(tmp_path / "out", {})
    store.open()
    store.save(0, [{"a": 1}], {})
    with pytest.raises(RunError, match="2 of 3 chunks are missing"):
        processes.wait_for_all(store, 3)
    store.save(1, [{"a": 1}], {})
    store.save(2, [{"a": 1}], {})
    processes.wait_for_all(store, 3)
