"""A module's gradient on JAX held against torch's own, before anything is attacked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
import torchax

from gdiff_jax.victims.checks import gradient_at
from gdiff_jax.victims.torch_loss import TorchLoss

LARGEST = 1e-4  # of the whole gradient's norm: rounding of float32 reaches 1e-6
ELSE = "replace it in the module, or write the loss in JAX"


def check_gradient(loss: TorchLoss, shape: tuple[int, ...], y: Any) -> float:
    """How far the two gradients are apart, over the norm of torch's, at pixels drawn at random.

    It is not judged array by array: the gradient of a key's bias, say, is zero but for rounding.

    Args:
      loss: of the module, at its own parameters.
      shape: (H, W, C) of an image, or (N, H, W, C) of several.
      y: the target, of one or of several.

    Raises:
      ValueError: where one of them fails, with the layer it is in; or where they are further apart than `LARGEST`, with the
        first layer that differs.
    """
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    version = f"torchax {torchax.__version__}"
    if loss.whole.criterion is None:
        _check_logits(loss, x, y)
    with _told(loss, f"torch itself for a batch {tuple(loss.pixels(x).shape)}", "give images and labels that it takes"):
        expected = _torch_gradient(loss, x, y)
    with _told(loss, version, ELSE):
        jax.eval_shape(loss, loss.params, x, y)
        gradient, _ = gradient_at(loss, loss.params, x, y)
    off = {name: np.asarray(gradient[name], np.float64) - expected[name] for name in loss.params}
    norm = max(_norm(expected), 1e-300)
    if not _norm(off) <= LARGEST * norm:
        raise ValueError(
            f"the module's gradient by {version} differs from torch's own by {_norm(off) / norm:.2g} of its norm; "
            f"{_where(loss, x, y, off, LARGEST * norm)}; {ELSE}"
        )
    return _norm(off) / norm


def _check_logits(loss: TorchLoss, x: np.ndarray, y: Any) -> None:
    """That what the cross-entropy is taken of are no probabilities, of which it would be another loss than the client's."""
    try:
        with torch.no_grad():
            output = loss.whole(torch.tensor(np.array(loss.pixels(x), np.float32)), None)
            sums = output.sum(1)
            shares = (
                output.shape[1] > 1 and bool((output >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
            )
            last = [part for part in loss.whole.modules()][-1]
            sigmoid = isinstance(last, torch.nn.Sigmoid) and bool(((output >= 0) & (output <= 1)).all())
    except Exception:  # what fails is told of by who asks for its gradient
        return
    if shares:
        said = "returns probabilities, which add up to 1, and a cross-entropy is taken of logits"
        raise ValueError(f"the module {said}; leave its softmax out, or give the client's loss, TorchModel(..., loss=)")
    if sigmoid:
        said = "ends in a sigmoid, and a cross-entropy is taken of logits"
        raise ValueError(f"the module {said}; leave the sigmoid out, or give the client's loss, TorchModel(..., loss=)")


def _torch_gradient(loss: TorchLoss, x: np.ndarray, y: Any) -> dict[str, np.ndarray]:
    trained = {name: p for name, p in loss.whole.module.named_parameters() if p.requires_grad}
    value, again = loss.in_torch(x, y), loss.in_torch(x, y)
    if value.numel() != 1 or value.ndim:
        raise ValueError(
            f"its loss has the shape {tuple(value.shape)}, not that of one number; let it reduce, such as by a mean"
        )
    if not torch.equal(value, again) and torch.isfinite(value):
        raise ValueError(
            "its loss differs from call to call: it draws at random; a client's draws are not known, leave them out"
        )
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    zeros = lambda p: np.zeros(tuple(p.shape))
    values = (zeros(p) if g is None else g.numpy().astype(np.float64) for g, p in zip(found, trained.values(), strict=True))
    return dict(zip(trained, values, strict=True))


def _norm(arrays: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(value).sum() for value in arrays.values())))


def _where(loss: TorchLoss, x: np.ndarray, y: Any, off: dict[str, np.ndarray], allowed: float) -> str:
    """In which layer the outputs first differ; of a derivative of its own, which parameter's gradient does."""
    layers = [(name, part) for name, part in loss.whole.named_modules() if not list(part.children())]

    def outputs(run: Callable[[], Any], read: Callable[[Any], Any]) -> list[tuple[str, np.ndarray]]:
        seen: list[tuple[str, np.ndarray]] = []
        note = lambda name: lambda _, __, out: seen.append((name, read(out))) if isinstance(out, torch.Tensor) else None
        with _hooked(layers, lambda name, part: [part.register_forward_hook(note(name))]):
            run()
        return seen

    with torch.no_grad():
        in_torch = outputs(lambda: loss.in_torch(x, y), lambda out: out.numpy())
    on_jax = outputs(lambda: loss(loss.params, x, y), lambda out: np.asarray(torchax.default_env().t2j_iso(out)))
    for (name, value), (_, other) in zip(in_torch, on_jax, strict=False):
        if value.shape != other.shape or not np.linalg.norm(other - value) <= LARGEST * np.linalg.norm(value):
            return f"the first output to differ is that of {_called(loss, name)}"
    wrong = [name for name, value in off.items() if not _norm({name: value}) <= allowed / np.sqrt(len(off))]
    return f"no layer's output differs, and of the gradients, from the loss on, that of {wrong[-1]} is the first that does"


@contextlib.contextmanager
def _told(loss: TorchLoss, runner: str, remedy: str) -> Iterator[None]:
    """What fails within is said to be in the innermost module that was running."""
    running: list[str] = []
    enter = lambda name: lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = lambda name, part: [part.register_forward_pre_hook(enter(name)), part.register_forward_hook(leave)]
    try:
        with _hooked(list(loss.whole.named_modules()), hooks):
            yield
    except Exception as error:  # whatever the user's module raises
        text = " ".join(str(error).split())[:200]
        where = f", in {_called(loss, running[-1])}" if running else ""
        raise ValueError(f"the module fails in {runner}{where}: {type(error).__name__}: {text}; {remedy}") from error


@contextlib.contextmanager
def _hooked(parts: list[tuple[str, Any]], hooks: Callable[[str, Any], list[Any]]) -> Iterator[None]:
    handles = [handle for name, part in parts for handle in hooks(name, part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _called(loss: TorchLoss, name: str) -> str:
    """A layer by its name in the user's module, and its class."""
    kind = type(loss.whole.get_submodule(name)).__name__
    if name == "criterion" or not name:
        return "the loss"
    return f"{name.removeprefix('module').removeprefix('.') or 'the module'} ({kind})"
