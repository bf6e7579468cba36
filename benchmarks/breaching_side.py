"""The torch side of `benchmarks/breaching.py`: one attack by the framework `breaching` 0.1.2 on one leak from a file.

    python benchmarks/breaching_side.py --problem=FILE.npz --preset=invertinggradients --out=OUT.npz

Needs torch and breaching, not jax:

    python3 -m venv TORCH_VENV
    TORCH_VENV/bin/pip install torch hydra-core scipy pyyaml pillow
    TORCH_VENV/bin/pip install --no-deps breaching==0.1.2

torchvision is not needed: breaching imports it for its data sets and ready-made networks, of which none is used here, so empty
modules stand in for it where it is missing. Everything else is breaching's own code with the configuration that it ships, but
for what the flags say, and for `deepleakage` the label, which both sides are told: as shipped, that preset optimises a label
along with the image, and refuses a known one. Images are normalised with mean and deviation 1/2, that is to [-1, 1].

The victims of the problem are rebuilt from their weights. The run ends with an error unless torch's gradient of the private
image agrees with the one in the file, before noise, to 1e-4 of its largest coordinate.

The clock runs around `reconstruct` alone, after three rehearsals of one iteration each (TorchScript compiles in them).
"""

import argparse
import importlib.util
import json
import logging
import sys
import time
import types
from collections import OrderedDict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path = [p for p in sys.path if Path(p).resolve() != HERE]  # `import breaching` means the package, not the driver beside us

import numpy as np
import torch
from torch import nn

TOLERANCE = 1e-4
STRIDES = {"lenet-sigmoid": (2, 2, 1), "lenet": (2, 2, 1), "cnn": (1, 2, 2), "mlp": ()}  # of the convolutions, in order


def stand_in_for_torchvision() -> None:
    """Modules with the names that `import breaching` looks up; whoever calls into them gets an AttributeError."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    names = ("", ".transforms", ".models", ".models.densenet", ".datasets", ".datasets.utils")
    made = {name: types.ModuleType("torchvision" + name) for name in names}
    sys.modules.update({module.__name__: module for module in made.values()})
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(made[parent], child, made[name])
    made[".models.densenet"]._DenseLayer = nn.Module  # a base class of a network that is not built
    made[".datasets.utils"].download_and_extract_archive = None


stand_in_for_torchvision()
import breaching
from omegaconf import OmegaConf


class FlattenNHWC(nn.Module):
    """(N, C, H, W) -> (N, H W C): the order in which the victims of gdiff_jax flatten."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A kernel HWIO -> OIHW or IO -> OI; a bias as it is."""
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(order)))


def build(victim: str, params: dict[str, np.ndarray]) -> nn.Sequential:
    """The victim with its weights; its parameters are called as ours, but `weight` for `kernel`."""
    if victim not in STRIDES:
        raise SystemExit(f"victim {victim!r} is not rebuilt here; known: {', '.join(STRIDES)}")
    activation = nn.Sigmoid if victim == "lenet-sigmoid" else nn.ReLU
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, stride in enumerate(STRIDES[victim], 1):
        size, _, c_in, c_out = params[f"conv{i}.kernel"].shape
        layers[f"conv{i}"] = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2)
        layers[f"act{i}"] = activation()
    layers["flatten"] = FlattenNHWC()
    dense = sorted(name.removesuffix(".kernel") for name in params if name.startswith("fc") and name.endswith(".kernel"))
    for name in dense:
        layers[name] = nn.Linear(*params[f"{name}.kernel"].shape)
        if name != dense[-1]:
            layers[f"act-{name}"] = activation()
    model = nn.Sequential(layers)
    model.load_state_dict({name.replace("kernel", "weight"): to_torch(value) for name, value in params.items()})
    return model


def in_order(model: nn.Module, gradient: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """A gradient of ours as torch lists it."""
    return [to_torch(gradient[name.replace("weight", "kernel")]) for name, _ in model.named_parameters()]


def check(model: nn.Module, image: torch.Tensor, label: torch.Tensor, clean: list[torch.Tensor]) -> float:
    """The largest difference between torch's gradient and ours, over the largest coordinate."""
    loss = nn.functional.cross_entropy(model(image), label)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    largest = max(g.abs().max() for g in clean)
    error = float(max((a - b).abs().max() for a, b in zip(gradient, clean, strict=True)) / largest)
    if not error <= TOLERANCE:
        raise SystemExit(f"torch's gradient differs from the file's by {error:.1e} of its maximum, more than {TOLERANCE:.0e}")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", type=Path, required=True, help=".npz written by benchmarks/breaching.py")
    parser.add_argument("--preset", choices=("invertinggradients", "deepleakage"), required=True, help="breaching's own")
    parser.add_argument("--iterations", type=int, help="optim.max_iterations; the preset's if left out")
    parser.add_argument("--restarts", type=int, default=1, help="restarts.num_trials")
    parser.add_argument("--seed", type=int, default=0, help="of torch, for the start")
    parser.add_argument("--tv", type=float, help="regularization.total_variation.scale; the preset's if left out")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path, required=True, help=".npz for the reconstruction, (H, W, 3) in [-1, 1]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger().setLevel(logging.WARNING)

    with np.load(args.problem) as file:
        problem = {name: file[name] for name in file.files}
    part = lambda kind: {name.split("/", 1)[1]: a for name, a in problem.items() if name.startswith(kind + "/")}
    model = build(str(problem["victim"]), part("params"))
    image, label = torch.from_numpy(problem["image"].transpose(2, 0, 1))[None], torch.tensor([int(problem["label"])])
    error = check(model, image, label, in_order(model, part("clean")))

    cfg = breaching.get_attack_config(args.preset)
    cfg.attack_type = "optimization"  # with the label known; says something new for deepleakage only
    cfg.restarts.num_trials = args.restarts
    if args.iterations is not None:
        cfg.optim.max_iterations = args.iterations
    if args.tv is not None:
        if cfg.regularization is None:
            raise SystemExit(f"--tv: the preset {args.preset} has no total variation")
        cfg.regularization.total_variation.scale = args.tv
    setup = dict(dtype=torch.float, device=torch.device("cpu"))
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), cfg, setup)
    half = [0.5] * image.shape[1]
    about = OmegaConf.create(dict(shape=list(image.shape[1:]), modality="vision", mean=half, std=half))
    server = [dict(parameters=[p.detach() for p in model.parameters()], buffers=[], metadata=about)]
    leaked = dict(num_data_points=1, labels=label, local_hyperparams=None)
    shared = [dict(gradients=in_order(model, part("leak")), buffers=None, metadata=leaked)]

    for _ in range(3):
        attacker.reconstruct(server, shared, {}, dryrun=True)
    calls: list[None] = []
    attacker.model_template.register_forward_hook(lambda *_: calls.append(None))
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    found, _ = attacker.reconstruct(server, shared, {})
    seconds = time.perf_counter() - start

    result = found["data"][0].permute(1, 2, 0).numpy().clip(-1, 1)
    psnr = float(-10 * np.log10(np.mean(np.square((result - problem["image"]) / 2))))
    np.savez(args.out, reconstruction=result, seconds=seconds, iterations=cfg.optim.max_iterations)
    row = dict(psnr=psnr, seconds=seconds, iterations=cfg.optim.max_iterations, evaluations=len(calls))
    print(json.dumps(row | dict(gradient_error=error, torch=torch.__version__, config=OmegaConf.to_container(cfg))))


if __name__ == "__main__":
    main()
