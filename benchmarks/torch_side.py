"""The torch side of `benchmarks/versus_torch.py`: one guided reverse step of a batch of trials, DPS or DSG, written in PyTorch.

    python benchmarks/torch_side.py --problem FOLDER --mode eager-batch+channels_last --threads 2

It computes what `gdiff_jax.samplers` computes, with diffusers' own `UNet2DModel`, on the problem that the driver wrote to
FOLDER (`problem.json`, `problem.npz`), and is meant to be what a good torch engineer would write. A mode is one of

    eager-batch     U-Net once on the batch; the victim under `torch.func.vmap`, the mixed partial in forward over reverse mode
    eager-loop      U-Net once on the batch; the victim in a loop over trials, differentiated twice in reverse
    eager-single    a loop over trials of whole steps
    compiled-batch  eager-batch, its two halves under `torch.compile`: the U-Net with its backward pass, and the victim
    compiled-whole  eager-batch as one compiled graph: what surrounds the U-Net is fused with it

with any of these suffixes:

    +channels_last  memory format of the U-Net
    +unfold         the victim's convolutions as patches times a matrix: kernel gradients under vmap are then matmuls, where
                    those of conv2d are grouped convolutions
    +double         (batch modes) the mixed partial by differentiating twice in reverse

It writes the result to FOLDER/torch-MODE.npz (x_{t-1}, distances, the gradient G: compare all three) and prints a line of JSON,
then reads lines "N" and answers each with the seconds of a step, the mean of N, until stdin ends; stdout carries nothing else.
`--what=prior` times eps and its pull-back to x_t alone, with a cotangent of ones: x and G in torch-prior-MODE.npz.
"""

import argparse
import functools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# A kernel found in inductor's cache would spoil the time of the first call.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import diffusers
import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

MODES = ("eager-batch", "eager-loop", "eager-single", "compiled-batch", "compiled-whole")
SUFFIXES = ("channels_last", "unfold", "double")
STRIDES = {"mlp": (), "cnn": (1, 2, 2), "lenet": (2, 2, 1)}  # of the victims' convolutions, in order
Tensors = dict[str, Tensor]
Result = tuple[Tensor, Tensor, Tensor]


class Denoiser(nn.Module):
    """eps of a batch at one timestep."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray], t: int):
        super().__init__()
        self.patch = config.get("patch_size", 1)
        self.net = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_") and k != "patch_size"})
        self.net.load_state_dict({name: torch.from_numpy(a.astype(np.float32)) for name, a in tensors.items()})
        self.register_buffer("t", torch.tensor(t))
        self.eval().requires_grad_(False)  # only the gradient of the input is wanted

    def forward(self, x: Tensor) -> Tensor:
        if self.patch == 1:
            return self.net(x, self.t, return_dict=False)[0]
        return F.pixel_shuffle(self.net(F.pixel_unshuffle(x, self.patch), self.t, return_dict=False)[0], self.patch)


def upsample(self: Upsample2D, h: Tensor, *_: Any) -> Tensor:
    """`Upsample2D.forward` by a broadcast: what inductor (torch 2.13, CPU) makes of the pull-back of `interpolate` is wrong."""
    n, c, height, width = h.shape
    h = h[:, :, :, None, :, None].expand(n, c, height, 2, width, 2).reshape(n, c, 2 * height, 2 * width)
    return self.conv(h) if self.use_conv else h


class Victim:
    """The logits of a victim as a function of its parameters; the layouts of our gradients and torch's."""

    def __init__(self, kind: str, image_shape: tuple[int, int, int], params: dict[str, np.ndarray], unfold: bool):
        self.strides, self.unfold = STRIDES[kind], unfold
        h, w, _ = image_shape
        for stride in self.strides:
            h, w = -(-h // stride), -(-w // stride)
        dense = sorted({name.split(".")[0] for name in params if name.startswith("fc")})
        self.dense, self.pixels = dense, h * w
        self.params = {self.name(name): self.to_torch(name, a[None])[0].contiguous() for name, a in params.items()}

    @staticmethod
    def name(name: str) -> str:
        return name.replace("kernel", "weight")

    def to_torch(self, name: str, array: np.ndarray) -> Tensor:
        """(B, ...) of ours: HWIO to OIHW, (in, out) to (out, in), where what was flattened as HWC is now flattened as CHW."""
        value = torch.from_numpy(np.array(array, np.float32))
        if value.ndim == 5:
            return value.permute(0, 4, 3, 1, 2).contiguous()
        if value.ndim == 3:
            if name.startswith(self.dense[0] + "."):
                value = value.unflatten(1, (self.pixels, -1)).transpose(1, 2).flatten(1, 2)
            return value.transpose(1, 2).contiguous()
        return value

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        size = weight.shape[-1]
        if not self.unfold:
            return F.conv2d(x, weight, bias, stride, padding=size // 2)
        rows, cols = (-(-n // stride) for n in x.shape[-2:])
        patches = F.unfold(x, size, padding=size // 2, stride=stride)
        return (weight.flatten(1) @ patches + bias[:, None]).unflatten(-1, (rows, cols))

    def loss(self, params: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """Of one image (C, H, W)."""
        x = x[None]
        for i, stride in enumerate(self.strides, 1):
            x = F.relu(self.conv(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride))
        x = x.flatten(1)
        for name in self.dense:
            x = F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])
            x = x if name == self.dense[-1] else F.relu(x)
        return F.cross_entropy(x, y[None])


def norm(gradient: Tensors) -> Tensor:
    """By rows first: over a million coordinates at once torch's float32 norm is off by 1e-4 and no faster."""
    rows = [torch.linalg.vector_norm(g.flatten(1), dim=1) if g.ndim > 1 else g for g in gradient.values()]
    return torch.linalg.vector_norm(torch.cat(rows))


def match_jvp(victim: Victim, x0: Tensor, y: Tensor, leak: Tensors) -> tuple[Tensor, Tensor]:
    """Distances (B,) and their gradients with respect to x0: v = grad of the norm, then d/ds grad_x L(W + s v, x)."""
    grad = torch.func.grad(victim.loss)
    v = torch.func.vmap(grad, (None, 0, 0))(victim.params, x0, y)
    for name, g in v.items():
        g.sub_(leak[name])
    distance = torch.func.vmap(norm)(v)
    scale = 1 / torch.where(distance > 0, distance, 1)
    for g in v.values():
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))

    def mixed_partial(x: Tensor, y: Tensor, v: Tensors) -> Tensor:
        grad_x = lambda params: torch.func.grad(victim.loss, argnums=1)(params, x, y)
        return torch.func.jvp(grad_x, (victim.params,), (v,))[1]

    return distance, torch.func.vmap(mixed_partial)(x0, y, v)


def match_double(victim: Victim, x0: Tensor, y: Tensor, leak: Tensors) -> tuple[Tensor, Tensor]:
    """As `match_jvp`, in reverse over reverse mode."""

    def distance(x: Tensor, y: Tensor, leak: Tensors) -> Tensor:
        gradient = torch.func.grad(victim.loss)(victim.params, x, y)
        return norm({name: g - leak[name] for name, g in gradient.items()})

    grad, value = torch.func.vmap(torch.func.grad_and_value(distance))(x0, y, leak)
    return value, grad


def match_loop(victim: Victim, x0: Tensor, y: Tensor, leak: Tensors) -> tuple[Tensor, Tensor]:
    """As `match_double`, one trial at a time."""
    params = {name: p.detach().requires_grad_() for name, p in victim.params.items()}
    distances, grads = [], []
    with torch.enable_grad():
        for b, x in enumerate(x0):
            x = x.detach().requires_grad_()
            gradient = torch.autograd.grad(victim.loss(params, x, y[b]), list(params.values()), create_graph=True)
            distance = norm({name: g - leak[name][b] for name, g in zip(params, gradient, strict=True)})
            grads += torch.autograd.grad(distance, x)
            distances.append(distance.detach())
    return torch.stack(distances), torch.stack(grads)


def match_nothing(x0: Tensor, y: Tensor, leak: Tensors) -> tuple[Tensor, Tensor]:
    """For `--what=prior`: a cotangent of ones."""
    return torch.zeros(len(x0)), torch.ones_like(x0)


def unit(v: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    return v / torch.where(length > 0, length, 1)


class Step:
    """x_t (B, C, H, W) to x_{t-1}, with the distances (B,) and their gradient G with respect to x_t."""

    def __init__(self, s: SimpleNamespace, denoise: Denoiser, victim: Victim, base: str, double: bool, what: str):
        self.s, self.denoise, self.guided = s, denoise, what == "guided"
        match = match_loop if base in ("eager-loop", "eager-single") else match_double if double else match_jvp
        self.match = functools.partial(match, victim) if self.guided else match_nothing
        self.predict, self.step = self.predict_x0, self.in_autograd
        compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)
        if base == "compiled-batch":
            self.predict, self.match = compiled(self.predict_x0), compiled(self.match)
        elif base == "compiled-whole":
            self.step = torch.no_grad()(compiled(self.in_func))

    def predict_x0(self, x: Tensor) -> Tensor:
        eps = self.denoise(x)
        if not self.guided:
            return eps
        x0 = (x - (1 - self.s.abar) ** 0.5 * eps) / self.s.abar**0.5
        return x0.clamp(-1, 1) if self.s.clip else x0

    def update(self, x: Tensor, x0: Tensor, grad: Tensor, z: Tensor) -> Tensor:
        s = self.s
        if not self.guided:
            return grad
        mean = s.mean_x0 * x0 + s.mean_xt * x
        if s.method == "dps":
            return mean + s.std * z - s.strength * grad
        root_n = x[0].numel() ** 0.5
        mixed = z + s.strength * (-root_n * unit(grad) - z)
        return mean + s.std * root_n * unit(mixed)

    def in_autograd(self, x: Tensor, z: Tensor, y: Tensor, leak: Tensors) -> Result:
        x = x.detach().requires_grad_()
        x0 = self.predict(x)
        with torch.no_grad():
            distance, grad_x0 = self.match(x0.detach(), y, leak)
        (grad,) = torch.autograd.grad(x0, x, grad_x0)
        with torch.no_grad():
            return self.update(x, x0, grad, z), distance, grad

    def in_func(self, x: Tensor, z: Tensor, y: Tensor, leak: Tensors) -> Result:
        x0, pull = torch.func.vjp(self.predict_x0, x)
        distance, grad_x0 = self.match(x0, y, leak)
        (grad,) = pull(grad_x0)
        return self.update(x, x0, grad, z), distance, grad


def build(folder: Path, mode: str, what: str) -> Callable[[], Result]:
    """One step from the problem's x_t, without arguments."""
    base, *suffixes = mode.split("+")
    if base not in MODES or not set(suffixes) <= set(SUFFIXES):
        raise ValueError(f"mode {mode!r} is not known; it is one of {', '.join(MODES)}, then any of +{', +'.join(SUFFIXES)}")
    s = SimpleNamespace(**json.loads((folder / "problem.json").read_text(encoding="utf-8")))
    with np.load(folder / "problem.npz") as file:
        arrays = {name: file[name] for name in file.files}
    part = lambda kind: {name.split("/", 1)[1]: a for name, a in arrays.items() if name.startswith(kind + "/")}
    if base.startswith("compiled"):
        Upsample2D.forward = upsample
    victim = Victim(s.victim, tuple(s.image_shape), part("victim"), "unfold" in suffixes)
    leak = {victim.name(name): victim.to_torch(name, a) for name, a in part("leak").items()}
    layout = torch.channels_last if "channels_last" in suffixes else torch.contiguous_format
    denoise = Denoiser(s.unet, part("prior"), s.t).to(memory_format=layout)
    x, z = (torch.from_numpy(arrays[k]).permute(0, 3, 1, 2).contiguous(memory_format=layout) for k in ("x", "z"))
    y = torch.from_numpy(arrays["label"].astype(np.int64))

    step = Step(s, denoise, victim, base, "double" in suffixes, what).step
    if base != "eager-single":
        return lambda: step(x, z, y, leak)
    trials = [(x[[b]], z[[b]], y[[b]], {name: a[[b]] for name, a in leak.items()}) for b in range(len(x))]
    return lambda: tuple(torch.cat(parts) for parts in zip(*[step(*trial) for trial in trials], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", type=Path, required=True, help="folder written by benchmarks/versus_torch.py")
    parser.add_argument("--mode", required=True, help="see above")
    parser.add_argument("--what", choices=("guided", "prior"), default="guided")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # as XLA does

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed, by compilers too, is no answer
    say = lambda **row: print(json.dumps(row), file=answers, flush=True)
    try:
        step = build(args.problem, args.mode, args.what)
        start = time.perf_counter()
        step()
        warm_s = time.perf_counter() - start
        x, distance, grad = step()
    except Exception as error:  # torch.compile may raise anything
        say(ready=False, mode=args.mode, error=f"{type(error).__name__}: {error}"[:2000])
        return
    path = args.problem / f"torch-{'prior-' * (args.what == 'prior')}{args.mode}.npz"
    np.savez(path, x=x.permute(0, 2, 3, 1).numpy(), distance=distance.numpy(), grad=grad.permute(0, 2, 3, 1).numpy())
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, np)} | {"python": platform.python_version()}
    say(ready=True, mode=args.mode, warm_s=warm_s, versions=versions)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = (time.perf_counter() - start) / int(line)
        say(seconds=seconds, max_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
