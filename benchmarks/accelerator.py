"""The guided step on an accelerator: time, share of the peak and memory by prior, arithmetic and batch, in one run.

    python benchmarks/accelerator.py --peak_tflops=990 --out=benchmarks/results/accelerator-NAME.json

Guided DSG steps of many trials at once against a CNN: the bundled priors, google/ddpm-cifar10-32 (36 M parameters) and
google/ddpm-ema-celebahq-256 (114 M). Beside them what the calibrated step costs over DSG's, and `lax.conv` in place of the
convolutions of `gdiff_jax.conv`. Weights are random: speed does not depend on them. Each program is compiled and measured
alone, in turns where two are compared: compiling by threads did not end in 210 s on an H200, because all tune on one GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp

import gdiff_jax as gd
from benchmarks.guided_step import ROOT, VICTIMS, environment, random_params, ratio, with_lax_conv
from benchmarks.large_prior import read_config
from gdiff_jax.files import write_atomic
from gdiff_jax.priors import unet2d
from gdiff_jax.signal import CALIBRATED_RATE
from gdiff_jax.victims import networks

PRIORS = {
    "cifar10-32": "gdiff_jax/priors/bundled/cifar10_32",
    "faces-64": "gdiff_jax/priors/bundled/faces_64",
    "ddpm-cifar10-32": "third_party/diffusers/ddpm-cifar10-32",
    "ddpm-ema-celebahq-256": "third_party/diffusers/ddpm-ema-celebahq-256",
}
STEPS = gd.NoiseCalibration.every  # of a call; a calibrated sampler draws noise once in them


class Case(NamedTuple):
    prior: str
    trials: int
    dtype: str = "float32"
    victim: str = "cnn"
    calibrated: bool = False
    remat: bool = False
    lax_conv: str = ""  # of "prior" or "victim"


SIZES = (
    [Case("cifar10-32", b) for b in (16, 64, 256)]
    + [Case("cifar10-32", 256, "bfloat16")]
    + [Case("faces-64", 64, d) for d in ("float32", "bfloat16")]
    + [Case("ddpm-cifar10-32", b) for b in (16, 64)]
    + [Case("ddpm-cifar10-32", 64, "bfloat16")]
    + [Case("ddpm-ema-celebahq-256", b, d) for d in ("float32", "bfloat16") for b in (1, 4)]
    + [Case("ddpm-ema-celebahq-256", 16, "bfloat16", remat=r) for r in (False, True)]
)
PAIRS = {
    "calibrated / DSG, 36 M, CNN": (Case("ddpm-cifar10-32", 16, calibrated=True), Case("ddpm-cifar10-32", 16)),
    "calibrated / DSG, 36 M, MLP": (
        Case("ddpm-cifar10-32", 16, victim="mlp", calibrated=True),
        Case("ddpm-cifar10-32", 16, victim="mlp"),
    ),
    "lax.conv prior / ours, 36 M": (Case("ddpm-cifar10-32", 64, lax_conv="prior"), Case("ddpm-cifar10-32", 64)),
    "lax.conv prior / ours, 36 M, bfloat16": (
        Case("ddpm-cifar10-32", 64, "bfloat16", lax_conv="prior"),
        Case("ddpm-cifar10-32", 64, "bfloat16"),
    ),
    "lax.conv victim / ours, 2.8 M": (Case("cifar10-32", 64, lax_conv="victim"), Case("cifar10-32", 64)),
}


def lowered(case: Case, weights: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The traced sampler of a case, and its arguments."""
    config = read_config(ROOT / PRIORS[case.prior])
    if case.prior not in weights:
        weights[case.prior] = random_params(config)
    denoise = gd.Denoiser(weights[case.prior], config, case.dtype, case.remat)
    victim = dataclasses.replace(VICTIMS[case.victim], image_shape=config.image_shape)
    key = case.victim, config.image_shape
    if key not in weights:
        weights[key] = random_params(victim)
    schedule = gd.Schedule.create(num_steps=STEPS)

    def one(denoise: Any, params: Any, key: jax.Array) -> jax.Array:
        mechanism = gd.GaussianNoise(jnp.float32(0.1))
        leak = mechanism(jax.random.fold_in(key, 1), jax.tree.map(jnp.zeros_like, params))
        match = gd.GradientMatching(params, jnp.int32(0), leak, victim.loss, mechanism=mechanism)
        signal = gd.NoiseCalibration(match) if case.calibrated else None
        rate = CALIBRATED_RATE if case.calibrated else 0.2
        return gd.dsg_sample(key, denoise, match, schedule, config.image_shape, guidance_rate=rate, signal=signal)[0]

    args = (denoise, weights[key], jax.random.split(jax.random.key(0), case.trials))
    module = {"prior": unet2d, "victim": networks}.get(case.lax_conv)
    with with_lax_conv(module) if module else contextlib.nullcontext():
        return jax.jit(jax.vmap(one, (None, None, 0))).lower(*args), args


class Program:
    """A case, compiled and run once."""

    def __init__(self, case: Case, weights: dict[str, Any]):
        traced, self.args = lowered(case, weights)
        start = time.perf_counter()
        self.case, self.compiled = case, traced.compile()
        self.compile_s = time.perf_counter() - start
        self.seconds()

    def seconds(self) -> float:
        """Of one step of all trials."""
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.args))
        return (time.perf_counter() - start) / STEPS

    def row(self, times: list[float], peak: float | None) -> dict[str, Any]:
        step, memory = statistics.median(times), self.compiled.memory_analysis()
        flops = (self.compiled.cost_analysis() or {}).get("flops", math.nan)  # of a scan's body: of one step
        return {
            **self.case._asdict(),
            "step_ms": round(1e3 * step, 3),
            "step_ms_all": [round(1e3 * t, 3) for t in times],
            "trials_per_s": round(self.case.trials / (100 * step), 3),
            "compile_s": round(self.compile_s, 1),
            "tflops_per_s": round(flops / step / 1e12, 2),
            "share_of_peak": round(flops / step / 1e12 / peak, 3) if peak else None,
            "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 3),
            "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest case of each kind: does it run at all?")
    parser.add_argument("--priors", default=",".join(PRIORS), help="measured one after another")
    parser.add_argument("--peak_tflops", type=float, help="of the chip in bfloat16, to tell the share of it that a step uses")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls, or turns")
    parser.add_argument("--out", type=Path, help="JSON file, written again after each measurement")
    args = parser.parse_args()
    if unknown := set(args.priors.split(",")) - set(PRIORS):
        parser.error(f"--priors {', '.join(sorted(unknown))} is not known; known: {', '.join(PRIORS)}")
    jax.config.update("jax_enable_compilation_cache", False)  # a program found there would spoil the compile times
    result: dict[str, Any] = {**environment(), "steps": STEPS, "peak_tflops": args.peak_tflops, "rows": [], "ratios": {}}

    def keep() -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))

    for prior in args.priors.split(","):
        sizes, pairs = [c for c in SIZES if c.prior == prior], {k: v for k, v in PAIRS.items() if v[0].prior == prior}
        if args.quick:
            small = lambda c: c._replace(trials=2, dtype="float32")
            sizes, pairs = [small(sizes[0])], {k: tuple(map(small, v)) for k, v in list(pairs.items())[:1]}
        weights: dict[Any, Any] = {}
        for name, (a, b) in pairs.items():
            first, second = Program(a, weights), Program(b, weights)
            turns = [(first.seconds(), second.seconds()) for _ in range(args.repeats)]
            result["ratios"][name] = ratio(*map(list, zip(*turns, strict=True)))
            print(name, json.dumps(result["ratios"][name]), flush=True)
            keep()
        for case in sizes:
            program = Program(case, weights)
            result["rows"].append(program.row([program.seconds() for _ in range(args.repeats)], args.peak_tflops))
            print(json.dumps({k: v for k, v in result["rows"][-1].items() if k != "step_ms_all"}), flush=True)
            keep()


if __name__ == "__main__":
    main()
