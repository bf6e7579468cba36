"""The same trials over 1, 2, 4 and 8 devices; compiling, cold and from the cache; trials a second by batch.

    python benchmarks/scaling.py --out benchmarks/results/scaling-NAME.json

Where there are fewer devices than that, the cores of the CPU are shared among fake ones, each number of them in a process of
its own, because it is fixed when JAX starts: then the times say what dividing costs, not what more hardware brings. On real
devices ask for as many as there are with --devices. The program is the sweep's own, DSG on the bundled cifar10-32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax

from benchmarks.guided_step import environment, table
from gdiff_jax import parallel
from gdiff_jax.sweeping import inputs, run, trials
from gdiff_jax.sweeping.config import PriorOptions, SweepConfig, Victims


def measure(devices: int, batch: int, victim: str, steps: int, repeats: int) -> dict[str, Any]:
    """In this process: seconds of a call of `batch` trials in all, and of compiling, the second time from the cache."""
    plan = inputs.load(SweepConfig(victims=Victims((victim,)), prior=PriorOptions(steps=steps)))
    mesh = parallel.trial_mesh(jax.local_devices()[:devices])
    trial = trials.Trial(trials.Group("dsg", victim, 0), 0.1, 0, 0)
    compile_s = []
    for _ in range(2):
        jax.clear_caches()
        start = time.perf_counter()
        program = run.compile_program(plan, mesh, trial, batch)
        compile_s.append(time.perf_counter() - start)
    shared = parallel.replicate(trials.shared_arguments(plan, trial.group), mesh)
    own = parallel.divide(trials.own_arguments(plan, [trial] * program.at_a_time), mesh)
    jax.block_until_ready(program.run(shared, own))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program.run(shared, own))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return dict(
        devices=devices,
        batch=program.at_a_time,
        call_s=median,
        trials_per_s=program.at_a_time / median * steps / 100,
        compile_cold_s=compile_s[0],
        compile_warm_s=compile_s[1],
        mib_a_device=program.memory / 2**20,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,4,8", help="numbers of devices")
    parser.add_argument("--batches", default="1,2,4,8,16,32", help="trials at a time, at the number of devices that is fastest")
    parser.add_argument("--total", type=int, default=16, help="trials at a time while devices are compared")
    parser.add_argument("--victim", default="cnn", help="attacked network")
    parser.add_argument("--steps", type=int, default=10, help="reverse steps of a call; trials a second are told for 100")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", nargs=2, type=int, metavar=("DEVICES", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.victim, args.steps, args.repeats)))
        return

    def apart(devices: int, batch: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            flags = [f"--{name}={getattr(args, name)}" for name in ("victim", "steps", "repeats")]
            command = [sys.executable, __file__, *flags, "--one", str(devices), str(batch)]
            env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": cache}
            return json.loads(
                subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=True).stdout.splitlines()[-1]
            )

    scaling = [apart(int(n), args.total) for n in args.devices.split(",")]
    best = max(scaling, key=lambda row: row["trials_per_s"])["devices"]
    batches = [apart(min(best, int(n)), int(n)) for n in args.batches.split(",")]
    for row in scaling:
        row["speedup"] = scaling[0]["call_s"] / row["call_s"]
    columns = ("devices", "batch", "call_s", "trials_per_s", "compile_cold_s", "compile_warm_s", "mib_a_device")
    rows = lambda found, names: [tuple(row[k] for k in names) for row in found]
    print(table(f"The same {args.total} trials over devices", (*columns, "speedup"), rows(scaling, (*columns, "speedup"))))
    print(table("By batch", columns, rows(batches, columns)))
    if args.out:
        args.out.write_text(
            json.dumps(environment() | dict(scaling=scaling, batches=batches), indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
