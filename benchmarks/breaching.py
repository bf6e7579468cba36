"""Side by side with the PyTorch framework `breaching` 0.1.2: the same leak, victim and label, both attacks, in turn.

    python benchmarks/breaching.py --torch_python=TORCH_VENV/bin/python --presets=invertinggradients --out=FILE.json

What is compared: breaching's `invertinggradients` with `attacks.invert_gradients`, its `deepleakage` with `attacks.dlg`, each
on the gradient of one bundled CIFAR-10 test image under Gaussian noise; victims are untrained. Both get the same weights,
leak and label (which breaching's `deepleakage`, as shipped, would optimise along), the same number of iterations and restarts
and, for `invertinggradients`, the same scale of the total variation. Starts are random, and not the same.

Theirs runs in a Python of its own (`breaching_side.py` says how to install it), on one thread or on one a core, whichever a
short run finds faster. Run this on an idle machine: where something else uses the cores, several threads of torch can be tens
of times slower than one, unless OMP_WAIT_POLICY=PASSIVE is set. Seconds are of the attack alone: without the start of Python,
without TorchScript's compilation, without ours by XLA, which has a column of its own. "ratio" is theirs / ours; "first" is
theirs / (ours + compile), for a single attack.

Known differences: breaching keeps its best iterate, chooses among restarts, which it runs in turn, by the distance without the
total variation, and pads the image with zeros for it, so that the last row and column count too.

One iteration of torch's L-BFGS is up to 20 steps without a line search, so `attacks.dlg`, which has one, gets `--lbfgs_steps`
for each. torch ends an iteration early where it has converged or got stuck; the JSON has the number of gradients that it
took as `evaluations`. Whether DLG converges depends on its start: compare over several seeds or restarts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

import gdiff_jax as gd
from benchmarks.guided_step import environment
from gdiff_jax import attacks, images, matching
from gdiff_jax.mechanisms import GaussianNoise
from gdiff_jax.sweeping.tables import markdown
from gdiff_jax.victims.zoo import init_params, make_victim

DISTANCES = dict(invertinggradients=matching.cosine, deepleakage=matching.squared_l2)
PROBE = 30  # iterations of the run that chooses the number of threads


def theirs(args: argparse.Namespace, preset: str, problem: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The reconstruction, and what breaching_side.py says of it, at the number of threads that a short run finds fastest."""
    with tempfile.TemporaryDirectory() as folder:
        leak, out = Path(folder, "problem.npz"), Path(folder, "out.npz")
        np.savez(leak, **problem)

        def run(threads: int, iterations: int, restarts: int) -> dict[str, Any]:
            flags = dict(problem=leak, preset=preset, out=out, seed=args.seed, threads=threads)
            flags |= dict(iterations=iterations, restarts=restarts)
            if preset == "invertinggradients":
                flags["tv"] = args.tv
            command = [args.torch_python, str(ROOT / "benchmarks/breaching_side.py"), *(f"--{k}={v}" for k, v in flags.items())]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
            return json.loads(printed.splitlines()[-1])

        tried = {n: run(n, min(args.iterations, PROBE), 1)["seconds"] for n in args.threads}
        threads = min(tried, key=tried.__getitem__)
        row = run(threads, args.iterations, args.restarts) | dict(threads=threads, probe_s=tried)
        with np.load(out) as file:
            return file["reconstruction"], row


def ours(args: argparse.Namespace, preset: str, objective: gd.GradientMatching, shape: tuple[int, ...]) -> tuple[Any, dict]:
    """The reconstruction, and the seconds to compile and to run."""

    def attack(key: jax.Array, objective: gd.GradientMatching) -> jax.Array:
        if preset == "deepleakage":
            return attacks.dlg(key, objective, shape, steps=args.lbfgs_steps * args.iterations, restarts=args.restarts)[0]
        return attacks.invert_gradients(key, objective, shape, steps=args.iterations, restarts=args.restarts, tv=args.tv)[0]

    key = jax.random.key(args.seed)
    start = time.perf_counter()
    program = jax.jit(attack).lower(key, objective).compile()
    compiled = time.perf_counter()
    image = jax.block_until_ready(program(key, objective))
    return image, dict(seconds=time.perf_counter() - compiled, compile_s=compiled - start)


def compare(args: argparse.Namespace, name: str, index: int, sigma: float, preset: str) -> dict[str, Any]:
    data = images.load_images(images.BUNDLED)
    x, y = jnp.asarray(images.to_model(data.images[index])), jnp.asarray(data.labels[index])
    victim = make_victim(name, x.shape, 10)
    params = init_params(name, victim, args.seed)
    clean = jax.jit(lambda p, x, y: gd.victim_gradient(victim.loss, p, x, y))(params, x, y)
    leak = GaussianNoise(sigma)(jax.random.fold_in(jax.random.key(args.seed), index), clean)

    problem = dict(victim=name, image=np.asarray(x), label=int(y))
    for kind, arrays in dict(params=params, clean=clean, leak=leak).items():
        problem |= {f"{kind}/{k}": np.asarray(v) for k, v in arrays.items()}
    their_image, their_row = theirs(args, preset, problem)
    objective = gd.GradientMatching(params, y, leak, victim.loss, distance=DISTANCES[preset])
    our_image, our_row = ours(args, preset, objective, x.shape)
    score = lambda image: {k: float(v) for k, v in gd.image_metrics(jnp.asarray(image), x).items()}
    case = dict(victim=name, preset=preset, sigma=sigma, image=index, iterations=args.iterations, restarts=args.restarts)
    return case | dict(seed=args.seed, theirs=their_row | score(their_image), ours=our_row | score(our_image))


def table(rows: list[dict[str, Any]]) -> str:
    head = ["victim", "preset", "sigma", "image", "theirs dB", "ours dB", "theirs s", "ours s", "compile s", "ratio", "first"]
    body = []
    for row in rows:
        a, b = row["theirs"], row["ours"]
        times = [f"{v:.3g}" for v in (a["seconds"], b["seconds"], b["compile_s"])]
        ratios = [f"{a['seconds'] / s:.2f}" for s in (b["seconds"], b["seconds"] + b["compile_s"])]
        case = [row["victim"], row["preset"], f"{row['sigma']:g}", str(row["image"])]
        body.append([*case, f"{a['psnr']:.1f}", f"{b['psnr']:.1f}", *times, *ratios])
    return markdown(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python", required=True, help="a Python that has torch and breaching")
    parser.add_argument("--victims", nargs="+", default=["lenet-sigmoid", "cnn"], help="of lenet-sigmoid, lenet, cnn, mlp")
    parser.add_argument("--images", type=int, default=1, help="how many of the 64 bundled ones, from the first on")
    parser.add_argument("--sigmas", nargs="+", type=float, default=[0.0], help="noise, gradient units")
    parser.add_argument("--presets", nargs="+", choices=list(DISTANCES), default=["invertinggradients"], help="breaching's")
    parser.add_argument("--iterations", type=int, default=2400, help="presets have 24000 and, for deepleakage, 1200")
    parser.add_argument("--restarts", type=int, default=1, help="starts, of which the best match is kept")
    parser.add_argument("--lbfgs_steps", type=int, default=20, help="of attacks.dlg, for one iteration of torch's L-BFGS")
    parser.add_argument("--tv", type=float, default=0.2, help="total variation of invertinggradients; the preset's")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count()], help="of torch, the fastest counts")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and starts")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)  # a program found there would spoil the compile times
    rows: list[dict[str, Any]] = []
    cases = [(v, i, s, p) for v in args.victims for p in args.presets for s in args.sigmas for i in range(args.images)]
    for case in cases:
        rows.append(compare(args, *case))
        print(table(rows[-1:]), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(dict(environment=environment(), rows=rows), indent=1) + "\n", encoding="utf-8")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
