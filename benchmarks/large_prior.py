"""Memory and time of one guided DSG step with a prior of full size: which settings fit a machine, and what they cost.

    python benchmarks/large_prior.py --prior=third_party/diffusers/ddpm-ema-celebahq-256 --remat --out=FILE.json

Takes a folder with the configs of a diffusers prior, or the JSON of an ADM's flags; weights are random, since neither
memory nor speed depends on them. Appends one line to --out. Run it once per setting: the peak is of the whole process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp

import gdiff_jax as gd
from benchmarks.guided_step import VICTIMS, environment, random_params
from gdiff_jax.priors import ADMConfig, UNet2DConfig
from gdiff_jax.samplers.dsg import dsg_step


def read_config(path: Path) -> UNet2DConfig | ADMConfig:
    if path.is_dir():
        return UNet2DConfig.from_diffusers(json.loads((path / "config.json").read_text(encoding="utf-8")))
    return ADMConfig.from_flags(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, required=True, help="folder with config.json, or JSON of ADM flags")
    parser.add_argument("--victim", choices=VICTIMS, default="lenet", help="attacked network")
    parser.add_argument("--trials", type=int, default=1, help="trials under vmap")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of the prior")
    parser.add_argument("--remat", action="store_true", help="keep only the inputs of the prior's blocks")
    parser.add_argument("--peak_tflops", type=float, help="of the chip in this dtype, to tell the share of it that a step uses")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--out", type=Path, help="file that one JSON line is appended to")
    args = parser.parse_args()

    config = read_config(args.prior)
    denoise = gd.Denoiser(random_params(config), config, args.dtype, args.remat)
    victim = dataclasses.replace(VICTIMS[args.victim], image_shape=config.image_shape)
    weights = random_params(victim)
    schedule = gd.Schedule.create(num_steps=100, variance="learned_range" if config.learns_variance else "fixed_small")
    keys = jax.random.split(jax.random.key(0), args.trials)
    x = jax.random.normal(jax.random.key(1), (args.trials, *config.image_shape))

    def step(denoise, weights, schedule, key, x):
        leak = jax.tree.map(jnp.zeros_like, weights)
        match = gd.GradientMatching(weights, jnp.int32(0), leak, victim.loss)
        return dsg_step(key, x, jnp.int32(50), denoise, match, schedule, guidance_rate=0.2)

    batched = jax.jit(jax.vmap(step, in_axes=(None, None, None, 0, 0)))
    start = time.perf_counter()
    compiled = batched.lower(denoise, weights, schedule, keys, x).compile()
    compile_s = time.perf_counter() - start
    memory, seconds = compiled.memory_analysis(), []
    for _ in range(args.repeats + 1):  # the first is a warm-up
        start = time.perf_counter()
        jax.block_until_ready(compiled(denoise, weights, schedule, keys, x))
        seconds.append(time.perf_counter() - start)
    flops = (compiled.cost_analysis() or {}).get("flops")
    step_s = statistics.median(seconds[1:])
    device = jax.devices()[0]
    on_device = device.memory_stats() or {}
    gib = lambda n: round(n / 2**30, 3)
    row = {
        **environment(),
        "parameters": sum(v.size for v in denoise.params.values()),
        "step_s": round(step_s, 4),
        "compile_s": round(compile_s, 1),
        "flops": flops,
        "share_of_peak": round(flops / step_s / 1e12 / args.peak_tflops, 3) if flops and args.peak_tflops else None,
        "arguments_gib": gib(memory.argument_size_in_bytes),
        "temporaries_gib": gib(memory.temp_size_in_bytes),
        "peak_process_gib": gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "peak_device_gib": gib(on_device["peak_bytes_in_use"]) if "peak_bytes_in_use" in on_device else None,
    }
    print(json.dumps(row, indent=1))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
