"""A torch module as a pure loss on JAX, by torchax; imported only where a module is audited.

Images are (H, W, C) or (N, H, W, C) in [-1, 1] here, (N, C, H, W) in the module.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax

from gdiff_jax.modules import Params
from gdiff_jax.victims.torch_model import TorchModel
from gdiff_jax.victims.torch_words import batch_normed, described, normalisation

BATCH_NORM = ("running", "batch")
_TRACED = threading.RLock()  # a module has one set of tensors, which tracing replaces; leaks are solved in several threads


class Whole(torch.nn.Module):
    """A module and its criterion as one, so that tensors of the criterion, such as weights of classes, are known too."""

    def __init__(self, module: Any, criterion: Callable[[Any, Any], Any] | None):
        super().__init__()
        self.module, self.criterion = module, criterion

    def forward(self, pixels: Any, target: Any) -> Any:
        """The loss; without a criterion the logits."""
        output = self.module(pixels)
        output = getattr(output, "logits", output)
        return output if self.criterion is None else self.criterion(output, target)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchLoss:
    """`loss(params, x, y)` of a module.

    Attributes:
      whole: a copy of the module, of which nothing else holds the tensors.
      params: by torch's names, in its layouts and order.
      constants: of every other tensor, by its place in `whole`.
      places: of each parameter its places in `whole`; a tied one has several.
      scale, shift: pixels of the module are scale * x + shift, by channel.
      said: what was assumed or found of the module, a sentence each, without a full stop.
    """

    whole: Any
    params: Params
    constants: Params
    places: dict[str, tuple[str, ...]]
    scale: np.ndarray
    shift: np.ndarray
    said: tuple[str, ...]

    def pixels(self, x: Any) -> Any:
        """(N, C, H, W), as the module takes them."""
        if len(self.scale) not in (1, x.shape[-1]):
            raise ValueError(
                f"mean and std have {len(self.scale)} channels, images {x.shape}: give one number for each channel"
            )
        shape = (1, 1, 1, -1)
        pixels = x.reshape(-1, *x.shape[-3:]) * self.scale.reshape(shape) + self.shift.reshape(shape)
        return pixels.transpose(0, 3, 1, 2)

    def __call__(self, params: Params, x: Any, y: Any) -> jax.Array:
        """The loss of an image (H, W, C) and its target, or of (N, H, W, C) and (N, ...)."""
        x = jnp.asarray(x)
        y = jax.tree.map(lambda a: jnp.asarray(a) if x.ndim == 4 else jnp.asarray(a)[None], y)
        tensors = {place: params[name] for name, places in self.places.items() for place in places}
        # The algebra computes in float64, and torch's convolutions take one precision alone.
        wide = jnp.result_type(x, *params.values()) == jnp.float64
        floats = lambda a: wide and jnp.issubdtype(a.dtype, jnp.floating)
        constants = {place: a.astype(jnp.float64) if floats(a) else a for place, a in self.constants.items()}
        with _on_jax(wide) as env:
            arguments = env.j2t_iso((self.pixels(x), y))
            output = torch.func.functional_call(self.whole, env.j2t_iso({**constants, **tensors}), arguments, tie_weights=False)
            output = env.t2j_iso(output)
            return output if self.whole.criterion is not None else _cross_entropy(output, y)

    def in_torch(self, x: np.ndarray, y: Any) -> Any:
        """The loss by torch itself, of the module's own parameters: a scalar tensor."""
        y = jax.tree.map(lambda a: _as_target(np.asarray(a) if np.ndim(x) == 4 else np.asarray(a)[None]), y)
        output = self.whole(torch.tensor(np.array(self.pixels(np.asarray(x, np.float32)), np.float32)), y)
        return output if self.whole.criterion is not None else torch.nn.functional.cross_entropy(_logits(output), y)


def torch_loss(model: TorchModel) -> TorchLoss:
    """The loss of a module on JAX.

    Raises:
      ValueError: for what cannot be used, with its value and the remedy.
    """
    if model.batch_norm not in (None, *BATCH_NORM):
        raise ValueError(f"batch_norm {model.batch_norm!r} is not known; give {' or '.join(BATCH_NORM)}")
    given = unwrapped(model.module)
    scale, shift, normalised = normalisation(model, given)
    said = (normalised, *described(model, given))
    module = private(given).float().eval()
    of_batch = batch_normed(model, given)
    for name, part in module.named_modules():
        part.training = name in of_batch
    criterion = private(model.loss) if isinstance(model.loss, torch.nn.Module) else model.loss
    whole = Whole(module, criterion)
    trained = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "the module has no parameter with requires_grad, so no gradient leaks; let it have those that are trained"
        )
    places: dict[str, tuple[str, ...]] = dict.fromkeys(trained.values(), ())
    constants = {}
    for place, tensor in _tensors(whole):
        name = trained.get(id(tensor))
        if name is None:
            constants[place] = _array(tensor)
        else:
            places[name] = (*places[name], place)
    params = {name: _array(p) for name, p in module.named_parameters() if p.requires_grad}
    return TorchLoss(whole, params, constants, places, scale, shift, said)


def unwrapped(module: Any) -> Any:
    """The module that DataParallel, torch.compile or Opacus wraps."""
    wrappers = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
    wrappers |= {"AbstractGradSampleModule": "_module"}
    while inner := [wrappers[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in wrappers]:
        if not hasattr(module, inner[0]):
            break  # of another library, under the same name
        module = getattr(module, inner[0])
    return module


def private(module: Any) -> Any:
    """A copy on the CPU, in the same modes, without gradients, and without what Opacus hooks into it.

    Raises:
      ValueError: where torch cannot copy it.
    """
    try:
        copied = copy.deepcopy(module).cpu()
    except Exception as error:  # whatever an attribute of the user's module raises
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the module cannot be copied ({type(error).__name__}: {text}); give one that copy.deepcopy copies"
        ) from None
    for part in copied.modules():
        for hooks in (part._forward_hooks, part._backward_hooks):
            for key in [key for key, hook in hooks.items() if _is_of_opacus(hook)]:
                del hooks[key]
    return copied


def _is_of_opacus(hook: Any) -> bool:
    """Whether it collects gradients by sample, for a wrapper that is not there any more."""
    function = getattr(hook, "func", hook)  # of a partial
    return str(getattr(function, "__module__", "")).startswith("opacus.")


def _tensors(whole: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a module and its place: parameters, buffers, and those that are plain attributes."""
    for prefix, module in whole.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        for name, value in {**module._parameters, **module._buffers, **plain}.items():
            if value is not None:
                yield f"{prefix}.{name}".removeprefix("."), value


def _array(tensor: Any) -> jax.Array:
    return jnp.array(tensor.detach().numpy())  # a copy: torch may write to its own


def _as_target(y: np.ndarray) -> Any:
    return torch.tensor(y.astype(np.int64) if y.dtype.kind in "iu" else y)


def _cross_entropy(logits: jax.Array, y: Any) -> jax.Array:
    """Of logits (N, classes): the mean over the batch, for labels (N,) or probabilities (N, classes)."""
    log_p = jax.nn.log_softmax(_logits(logits))
    if jnp.issubdtype(y.dtype, jnp.floating):
        return -(y * log_p).sum(-1).mean()
    return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()


def _logits(output: Any) -> Any:
    if getattr(output, "ndim", 0) != 2:
        returned = tuple(getattr(output, "shape", ())) or type(output).__name__
        raise ValueError(f"the module returns {returned}, cross-entropy takes logits (N, classes); give TorchModel(..., loss=)")
    return output


@contextlib.contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _on_jax(wide: bool) -> Iterator[Any]:
    """Torch's functions on JAX's arrays; tensors that are made on the way included, of float64 where it is `wide`."""
    with jax.ensure_compile_time_eval():  # each thread's own random key must not become part of the program that is traced
        env = torchax.default_env()
        _ = env.param
    with (
        _TRACED,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        env,
        torch.device("jax"),
        _default_dtype(torch.float64 if wide else torch.float32),  # of the whole process, so within the lock
    ):
        yield env
