"""What it costs a step of DSG to know the noise, beside a step that does not, in turns in one run.

    python benchmarks/calibrated_step.py --out=benchmarks/results/calibrated-step-NAME.json

Eight steps, of which one draws noise (`NoiseCalibration.every`), for the bundled U-Net and that of google/ddpm-cifar10-32 (36 M
parameters). Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp

import gdiff_jax as gd
from benchmarks.guided_step import ROOT, VICTIMS, Case, environment, measure, random_params, ratio
from benchmarks.large_prior import read_config
from gdiff_jax.signal import CALIBRATED_RATE

STEPS = gd.NoiseCalibration.every
PRIORS = ("gdiff_jax/priors/bundled/cifar10_32", "third_party/diffusers/ddpm-cifar10-32")


def sampler(denoise: gd.Denoiser, victim: gd.Victim, trials: int, calibrated: bool) -> Case:
    """Steps of `trials` reconstructions at once."""
    schedule, weights = gd.Schedule.create(num_steps=STEPS), random_params(victim)

    def one(denoise: Any, weights: Any, key: jax.Array) -> jax.Array:
        mechanism = gd.GaussianNoise(jnp.float32(0.1))
        leak = mechanism(jax.random.fold_in(key, 1), jax.tree.map(jnp.zeros_like, weights))
        match = gd.GradientMatching(weights, jnp.int32(0), leak, victim.loss, mechanism=mechanism)
        signal = gd.NoiseCalibration(match) if calibrated else None
        shape = denoise.config.image_shape
        return gd.dsg_sample(key, denoise, match, schedule, shape, guidance_rate=CALIBRATED_RATE, signal=signal)[0]

    args = (denoise, weights, jax.random.split(jax.random.key(0), trials))
    return Case(jax.vmap(one, (None, None, 0)), args, STEPS, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4, help="reconstructions at once")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = []
    for config in (read_config(ROOT / folder) for folder in PRIORS):
        denoise = gd.Denoiser(random_params(config), config)
        for name in ("cnn", "mlp"):
            victim = dataclasses.replace(VICTIMS[name], image_shape=config.image_shape)
            seconds = measure(
                {kind: sampler(denoise, victim, args.trials, kind == "calibrated") for kind in ("dsg", "calibrated")},
                args.repeats,
            )
            row = {
                "prior_parameters": sum(v.size for v in denoise.params.values()),
                "victim": name,
                "calibrated_over_dsg": ratio(seconds["calibrated"], seconds["dsg"]),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.out:
        args.out.write_text(
            json.dumps({**environment(), "trials": args.trials, "steps": STEPS, "rows": rows}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
