"""What a guided step costs, and what the choices in `gdiff_jax.conv` are worth on this machine.

    python benchmarks/guided_step.py --out benchmarks/results/NAME.json

Weights are random: speed does not depend on them. Everything is compiled first, then measured, in turns (A B A B ...), and a
ratio is taken within a turn, so a machine that slows down for a while slows both sides of it.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import flax
import jax
import jax.numpy as jnp
import numpy as np

import gdiff_jax as gd
from gdiff_jax import modules
from gdiff_jax.priors import UNet2DConfig, unet2d
from gdiff_jax.samplers.dsg import dsg_step
from gdiff_jax.victims import cnn, lenet, mlp, networks

VICTIMS = dict(lenet=lenet(), mlp=mlp(), cnn=cnn())
BATCHES = (1, 4, 8, 16, 32)
TRIALS = 8


def random_params(spec: modules.Spec) -> modules.Params:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.05 * rng.normal(size=s), jnp.float32) for name, s in modules.param_shapes(spec).items()}


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@contextlib.contextmanager
def with_lax_conv(module: Any) -> Iterator[None]:
    """What is traced inside builds the networks of `module` with `lax.conv`."""
    modules._abstract.cache_clear()
    with mock.patch.object(module, "conv" if module is unet2d else "_conv", functools.partial(modules.Conv, conv=plain_conv)):
        yield
    modules._abstract.cache_clear()


class Case:
    """A compiled function with its arguments; `steps` is what one call counts for."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], steps: int, calls: int):
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*args).compile()
        self.compile_s = time.perf_counter() - start
        self.args, self.steps, self.calls = args, steps, calls
        jax.block_until_ready(self.compiled(*args))

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        for _ in range(self.calls):
            jax.block_until_ready(self.compiled(*self.args))
        return (time.perf_counter() - start) / (self.steps * self.calls)

    def memory(self) -> int | None:
        """Bytes of arguments, outputs and temporaries."""
        m = self.compiled.memory_analysis()
        return None if m is None else m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes


def guided(denoise: gd.Denoiser, victim: gd.Victim, trials: int, num_steps: int, *, scan: bool) -> Case:
    """The guided DSG step of `trials` trials: inside the sampler's scan, or one jitted step."""
    schedule = gd.Schedule.create(num_steps=max(num_steps, 2))
    params, shape = random_params(victim), victim.image_shape
    keys, labels = jax.random.split(jax.random.key(0), trials), jnp.arange(trials) % 10
    x = jax.random.normal(jax.random.key(1), (trials, *shape))
    leaks = jax.jit(jax.vmap(functools.partial(gd.victim_gradient, victim.loss), in_axes=(None, 0, 0)))(params, x, labels)

    def sample(denoise: Any, params: Any, key: Any, x: Any, label: Any, leak: Any) -> Any:
        match = gd.GradientMatching(params, label, leak, victim.loss)
        if scan:
            return gd.dsg_sample(key, denoise, match, schedule, shape)
        return dsg_step(key, x, jnp.asarray(1), denoise, match, schedule, guidance_rate=0.2)

    function = jax.vmap(sample, in_axes=(None, None, 0, 0, 0, 0))
    return Case(function, (denoise, params, keys, x, labels, leaks), *((num_steps, 1) if scan else (1, num_steps)))


def pullback(denoise: gd.Denoiser, trials: int, num_steps: int, *, scan: bool) -> Case:
    """eps and its pull-back to x_t alone: the part of a guided step that no victim changes."""
    x = jax.random.normal(jax.random.key(1), (trials, *denoise.config.image_shape))

    def one(denoise: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        eps, pull = jax.vjp(lambda x: denoise(x, t)[0], x)
        return x + 1e-3 * (eps + pull(x)[0])

    def loop(denoise: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, t: (one(denoise, x, t), None), x, jnp.arange(num_steps))[0]

    if scan:
        return Case(jax.vmap(loop, in_axes=(None, 0)), (denoise, x), num_steps, 1)
    return Case(jax.vmap(one, in_axes=(None, 0, None)), (denoise, x, jnp.asarray(1)), 1, num_steps)


def measure(cases: dict[str, Case], repeats: int) -> dict[str, list[float]]:
    """Seconds a step of every case, in turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            times[name].append(case.seconds())
    return times


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    values = [x / y for x, y in zip(a, b, strict=True)]
    return dict(min=min(values), median=statistics.median(values), max=max(values))


def git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, encoding="utf-8", check=False).stdout.strip()


def environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return dict(
        command=" ".join(["python", *sys.argv]),
        date=datetime.date.today().isoformat(),
        commit=git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", "gdiff_jax") else ""),
        device=f"{device.platform}: {device.device_kind}",
        machine=platform.machine(),
        cores=os.cpu_count(),
        load=os.getloadavg()[0],
        versions={m.__name__: m.__version__ for m in (jax, flax, np)} | {"python": platform.python_version()},
    )


def table(title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    text = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = [header, ("---",) * len(header), *(tuple(map(text, row)) for row in rows)]
    return f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="LeNet only, two steps, one repeat: does it run at all?")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each comparison")
    parser.add_argument("--steps", type=int, default=4, help="steps of a scan, and calls of a single step, in one turn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    repeats, n = (1, 2) if args.quick else (args.repeats, args.steps)
    victims = {"lenet": VICTIMS["lenet"]} if args.quick else VICTIMS
    batches = BATCHES[:2] if args.quick else BATCHES

    config = UNet2DConfig.from_diffusers(
        json.loads((Path(unet2d.__file__).parent / "bundled/cifar10_32/config.json").read_text(encoding="utf-8"))
    )
    denoise = gd.Denoiser(random_params(config), config)

    jax.config.update("jax_enable_compilation_cache", False)  # a program found there would spoil the compile times
    print("compiling ...", flush=True)
    groups: dict[str, dict[str, Case]] = {}
    vjp = {"vjp scan": pullback(denoise, TRIALS, n, scan=True), "vjp once": pullback(denoise, TRIALS, n, scan=False)}
    for name, victim in victims.items():
        groups[name] = {
            "scan": guided(denoise, victim, TRIALS, n, scan=True),
            "once": guided(denoise, victim, TRIALS, n, scan=False),
            **vjp,
        }
        if name != "mlp":
            with with_lax_conv(networks):
                groups[name]["lax.conv victim, scan"] = guided(denoise, victim, TRIALS, n, scan=True)
                groups[name]["lax.conv victim, once"] = guided(denoise, victim, TRIALS, n, scan=False)
    with with_lax_conv(unet2d):
        groups["lenet"]["lax.conv prior, scan"] = guided(denoise, VICTIMS["lenet"], TRIALS, n, scan=True)
        groups["lenet"]["lax.conv prior, once"] = guided(denoise, VICTIMS["lenet"], TRIALS, n, scan=False)
    groups["batch"] = {
        str(b): groups["lenet"]["scan"] if b == TRIALS else guided(denoise, VICTIMS["lenet"], b, n, scan=True) for b in batches
    }

    print("measuring ...", flush=True)
    result: dict[str, Any] = environment() | dict(
        trials=TRIALS, steps=n, repeats=repeats, ratios=[], conv=[], batch=[], seconds={}
    )
    for name, cases in groups.items():
        times = result["seconds"][name] = measure(cases, repeats)
        if name == "batch":
            for b, seconds in times.items():
                step = statistics.median(seconds)
                row = dict(batch=int(b), step_s=step, trials_per_s=int(b) / (100 * step), compile_s=cases[b].compile_s)
                result["batch"].append(row | dict(memory_bytes=cases[b].memory()))
            continue
        for what, a, b in (
            ("step in scan / step alone", "scan", "once"),
            ("step / vjp, in scan", "scan", "vjp scan"),
            ("step / vjp, alone", "once", "vjp once"),
        ):
            result["ratios"].append(dict(victim=name, what=what, **ratio(times[a], times[b])))
        for a in [key for key in times if key.startswith("lax.conv")]:
            b = a.split(", ")[1]
            result["conv"].append(dict(victim=name, what=f"{a} / ours, {b}", **ratio(times[a], times[b])))
    result["max_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    columns = ("victim", "what", "min", "median", "max")
    rows = lambda name, keys: [tuple(row[k] for k in keys) for row in result[name]]
    step_rows = [(v, k, 1e3 * min(t), 1e3 * statistics.median(t)) for v, g in result["seconds"].items() for k, t in g.items()]
    print(table(f"A guided step of {TRIALS} trials, ratios", columns, rows("ratios", columns)))
    print(table("Convolutions: lax.conv over ours", columns, rows("conv", columns)))
    keys = ("batch", "step_s", "trials_per_s", "compile_s")
    sizes = [
        (*row, *("-" if r["memory_bytes"] is None else r["memory_bytes"] / 2**20,))
        for row, r in zip(rows("batch", keys), result["batch"], strict=True)
    ]
    print(table("DSG on LeNet, 100 steps", ("batch", "s a step", "trials a s", "compile s", "MiB"), sizes))
    print(table("Milliseconds a step", ("group", "case", "min", "median"), step_rows))
    print(f"\npeak resident memory {result['max_rss_bytes'] / 2**30:.2f} GiB; {result['device']}, {result['cores']} cores")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
