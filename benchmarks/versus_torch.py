"""A guided step beside the same step in PyTorch: same weights, images, leaks and noise, in one run, in turns.

    python benchmarks/versus_torch.py --out benchmarks/results/versus-torch-NAME.json

Needs the extra `parity`. Each side is a process of its own on all cores, kept alive while the other is timed: ours runs the
sampler's step inside `lax.scan`, the trials divided over the cores as the sweep divides them; theirs is `torch_side.py`, in
every mode of --modes, of which the fastest in a short trial is compared. Both sides' x_{t-1} are checked against each other
first. A ratio is torch / ours, within a turn. Memory is the largest resident set of each process, with all that it imported and
compiled; torch is kept out of ours, where diffusers would import it.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if "--side" in sys.argv:
    sys.modules["torch"] = None  # type: ignore[assignment]  # diffusers imports it where it is installed; ours does without

import jax
import jax.numpy as jnp
import numpy as np

import gdiff_jax as gd
from benchmarks.guided_step import VICTIMS, environment, random_params, table
from gdiff_jax import parallel
from gdiff_jax.priors import UNet2DConfig
from gdiff_jax.priors.weights import to_torch
from gdiff_jax.samplers.dps import dps_step
from gdiff_jax.samplers.dsg import dsg_step

TRIALS, INDEX, STEPS = 8, 40, 100
TOLERANCE = 1e-4  # of the largest value
STRENGTH = {"dsg": 0.2, "dps": 8.0}
MODES = (
    "eager-batch+channels_last",
    "eager-batch+channels_last+double",
    "eager-batch",
    "eager-loop+channels_last",
    "eager-single+channels_last",
    "compiled-batch+channels_last",
    "compiled-whole+channels_last",
)
CIFAR10 = ROOT / "third_party/diffusers/ddpm-cifar10-32/config.json"


def unets() -> dict[str, dict[str, Any]]:
    """Configs by name: google/ddpm-cifar10-32's, and one of the same kind with 1.1 M parameters."""
    large = json.loads(CIFAR10.read_text(encoding="utf-8"))
    small = dict(block_out_channels=[32, 64, 64], norm_num_groups=8, layers_per_block=1)
    small |= dict(down_block_types=large["down_block_types"][:3], up_block_types=large["up_block_types"][-3:])
    return {"1M": large | small, "36M": large}


def problem(unet: str, victim: str) -> dict[str, Any]:
    """All that a step takes, from one seed, as both sides of this file build it."""
    config = UNet2DConfig.from_diffusers(unets()[unet])
    denoise, network = gd.Denoiser(random_params(config), config), VICTIMS[victim]
    params, schedule = random_params(network), gd.Schedule.create(num_steps=STEPS)
    keys = jax.random.split(jax.random.key(0), TRIALS)
    label = jnp.arange(TRIALS) % network.num_classes
    private, x = (jax.random.normal(jax.random.key(i), (TRIALS, *config.image_shape)) for i in (1, 2))
    gradient = jax.vmap(functools.partial(gd.victim_gradient, network.loss), in_axes=(None, 0, 0))
    leak = jax.jit(gradient)(params, jnp.clip(private, -1, 1), label)
    return dict(denoise=denoise, network=network, params=params, schedule=schedule, keys=keys, label=label, x=x, leak=leak)


def write(folder: Path, unet: str, victim: str, method: str) -> None:
    """The problem as `torch_side.py` reads it."""
    p = problem(unet, victim)
    s = p["schedule"]
    numbers = {name: float(getattr(s, name)[INDEX]) for name in ("abar", "mean_x0", "mean_xt")}
    numbers |= dict(t=int(s.t[INDEX]), std=float(s.posterior_std(jnp.int32(INDEX))), strength=STRENGTH[method], clip=True)
    about = dict(unet=unets()[unet], victim=victim, method=method, image_shape=p["network"].image_shape, num_classes=10)
    (folder / "problem.json").write_text(json.dumps(about | numbers), encoding="utf-8")
    arrays = {f"prior/{name}": a for name, a in to_torch(p["denoise"].params).items()}
    arrays |= {f"{kind}/{name}": a for kind in ("params", "leak") for name, a in p[kind].items()}
    z = jax.vmap(lambda key: jax.random.normal(key, p["x"].shape[1:]))(p["keys"])
    arrays |= dict(x=p["x"], z=z, label=p["label"])
    np.savez(folder / "problem.npz", **{name.replace("params/", "victim/"): np.asarray(a) for name, a in arrays.items()})


def our_side(folder: Path, unet: str, victim: str, method: str, what: str, steps: int) -> None:
    """The worker of our side: as `torch_side.py`, but a turn is `steps` steps of one compiled scan."""
    parallel.use_every_core()
    mesh = parallel.trial_mesh()
    p = problem(unet, victim)
    schedule, network = p["schedule"], p["network"]
    # Weights as the torch side gets them, stored in float16; what was read is let go once it lies on the devices.
    drawn = p.pop("denoise")
    half = {name: a.astype(jnp.float16).astype(jnp.float32) for name, a in drawn.params.items()}
    common = parallel.replicate((gd.Denoiser(half, drawn.config), p.pop("params")), mesh)
    own = parallel.divide(tuple(p.pop(k) for k in ("keys", "x", "label", "leak")), mesh)
    del drawn, half

    def guided(denoise: Any, params: Any, key: Any, x: Any, label: Any, leak: Any) -> Any:
        match = gd.GradientMatching(params, label, leak, network.loss)
        if method == "dps":
            x, info = dps_step(key, x, jnp.int32(INDEX), denoise, match, schedule, zeta=STRENGTH[method])
        else:
            x, info = dsg_step(key, x, jnp.int32(INDEX), denoise, match, schedule, guidance_rate=STRENGTH[method])
        return x, info.distance, info.guidance_norm

    def prior(denoise: Any, params: Any, key: Any, x: Any, label: Any, leak: Any) -> Any:
        eps, pull = jax.vjp(lambda x: denoise(x, schedule.t[INDEX])[0], x)
        return pull(jnp.ones_like(eps))[0], eps[0, 0, 0], jnp.float32(0)

    one = guided if what == "guided" else prior

    def many(common: Any, own: Any) -> Any:
        (denoise, params), (key, x, label, leak) = common, own

        def step(carry: Any, _: None) -> Any:
            y, *numbers = one(denoise, params, key, carry, label, leak)
            return (y if what == "guided" else carry + 1e-3 * y), (y, *numbers)

        return jax.lax.scan(step, x, None, length=steps)[1]

    function = jax.jit(parallel.map_trials(many, mesh))
    start = time.perf_counter()
    compiled = function.lower(common, own).compile()
    y, distance, guidance = (np.asarray(a[:, 0]) for a in jax.block_until_ready(compiled(common, own)))
    warm_s = time.perf_counter() - start
    np.savez(folder / f"ours-{what}.npz", x=y, distance=distance, guidance=guidance)
    say = lambda **row: print(json.dumps(row), flush=True)
    say(ready=True, warm_s=warm_s)
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(compiled(common, own))
        seconds = (time.perf_counter() - start) / steps
        say(seconds=seconds, max_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Side:
    """A worker process; `turn` makes it run so many steps and returns the seconds of one."""

    def __init__(self, *command: str):
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.ready = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended without an answer")
        return json.loads(line)

    def turn(self, steps: int) -> float:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.last = self._answer()
        return self.last["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def sides() -> Iterator[list[Side]]:
    started: list[Side] = []
    try:
        yield started
    finally:
        for side in started:
            side.close()


def compare(unet: str, victim: str, method: str, modes: tuple[str, ...], steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step of each side, in turns, and ratios; the torch modes are tried first, one after the other."""
    with tempfile.TemporaryDirectory() as name, sides() as running:
        folder = Path(name)
        write(folder, unet, victim, method)
        tried: dict[str, Any] = {}
        start = lambda mode: Side(
            "benchmarks/torch_side.py", f"--problem={folder}", f"--mode={mode}", f"--threads={os.cpu_count()}"
        )
        for mode in modes:
            side = start(mode)
            seconds = min(side.turn(max(steps // 2, 1)) for _ in range(2)) if side.ready["ready"] else None
            side.close()
            tried[mode] = dict(seconds=seconds, warm_s=side.ready.get("warm_s"), error=side.ready.get("error"))
        best = min((m for m in tried if tried[m]["seconds"]), key=lambda m: tried[m]["seconds"])
        ours = lambda what: Side(
            __file__,
            "--side",
            str(folder),
            what,
            f"--unets={unet}",
            f"--victims={victim}",
            f"--methods={method}",
            f"--steps={steps}",
        )
        running += [ours("guided"), ours("prior"), start(best)]
        errors = {}
        with np.load(folder / "ours-guided.npz") as a, np.load(folder / f"torch-{best}.npz") as b:
            theirs = dict(x=b["x"], distance=b["distance"], guidance=np.linalg.norm(b["grad"].reshape(TRIALS, -1), axis=1))
            for key, value in theirs.items():
                errors[key] = float(np.abs(a[key] - value).max() / np.abs(a[key]).max())
        if max(errors.values()) > TOLERANCE:
            raise RuntimeError(f"the two sides disagree: {errors}")
        times = [[side.turn(steps) for side in running] for _ in range(repeats)]
        guided, prior, torch = zip(*times, strict=True)
        median = lambda values: statistics.median(values)
        return dict(
            unet=unet, victim=victim, method=method, best_mode=best, error=errors, modes=tried,
            ours_s=median(guided), prior_s=median(prior), torch_s=median(torch), seconds=times,
            torch_over_ours=median([t / g for g, _, t in times]), spread=sorted(t / g for g, _, t in times),
            guided_over_prior=median([g / p for g, p, _ in times]),
            ours_gib=running[0].last["max_rss"] / 2**30, torch_gib=running[2].last["max_rss"] / 2**30,
            ours_compile_s=running[0].ready["warm_s"], torch_compile_s=running[2].ready["warm_s"],
            versions=running[2].ready["versions"],
        )  # fmt: skip


COLUMNS = (
    "unet",
    "victim",
    "method",
    "ours_s",
    "torch_s",
    "torch_over_ours",
    "guided_over_prior",
    "ours_gib",
    "torch_gib",
    "best_mode",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unets", default="1M,36M", help="U-Nets, of 1M and 36M parameters")
    parser.add_argument("--victims", default="cnn,mlp", help="attacked networks")
    parser.add_argument("--methods", default="dsg", help="dsg, dps")
    parser.add_argument("--modes", default=",".join(MODES), help="of torch, see torch_side.py")
    parser.add_argument("--steps", type=int, default=4, help="steps of one turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--side", nargs=2, metavar=("FOLDER", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [text.split(",") for text in (args.unets, args.victims, args.methods)]
    if args.side:
        our_side(Path(args.side[0]), *(n[0] for n in names), args.side[1], args.steps)
        return
    rows = []
    for unet in names[0]:
        for victim in names[1]:
            for method in names[2]:
                rows.append(compare(unet, victim, method, tuple(args.modes.split(",")), args.steps, args.repeats))
                print(table(f"{TRIALS} trials", COLUMNS, [tuple(row[k] for k in COLUMNS) for row in rows[-1:]]), flush=True)
    print(table(f"A guided step of {TRIALS} trials", COLUMNS, [tuple(row[k] for k in COLUMNS) for row in rows]))
    if args.out:
        args.out.write_text(json.dumps(environment() | dict(trials=TRIALS, rows=rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
