"""A network of the user's own, of which its loss alone is known: `loss(params, x, y)`, any function on JAX, and its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gdiff_jax.first_dense import FirstDense
from gdiff_jax.matching import Loss
from gdiff_jax.modules import Params
from gdiff_jax.pytrees import at_least_float32
from gdiff_jax.victims import torch_model, user_files
from gdiff_jax.victims.checks import gradient_at
from gdiff_jax.victims.statistics import first_statistic
from gdiff_jax.victims.torch_model import TorchModel

EXTRA = 'pip install "gdiff-jax[torch]"'
MODELS = "a model of Flax, Equinox or Haiku is called within loss, as the documentation's page on such models shows"


@dataclasses.dataclass(frozen=True)
class OwnVictim:
    """What a sweep asks a `Victim`, and no more.

    Attributes:
      loss: scalar `loss(params, x, y)` of params as a flat dict.
      num_classes: labels are 0 .. num_classes - 1.
      first_dense: the layer of which a gradient gives the whole image away, if `find_first_dense` finds one.
      module: of torch, which the loss runs; None of a loss that is JAX's.
      said: what was assumed or found of that module, a sentence each, without a full stop.
      classes_guessed: whether num_classes is the least that the labels allow, for nobody says it; 0 where they are no classes.
    """

    loss: Loss
    num_classes: int
    first_dense: FirstDense | None = None
    has_batch_norm: bool = False
    module: TorchModel | None = None
    said: tuple[str, ...] = ()
    classes_guessed: bool = False


def own_victim(loss: Loss, params: Any, num_classes: int) -> tuple[OwnVictim, Params]:
    """The victim of a loss of any pytree of arrays, and its params as a flat dict by dotted path, in float32 or more.

    The `.value` of NNX's variables is left out of the paths.

    Raises:
      ValueError: naming what among the params is no array, not trained, or has the path of another; or a loss that is none.
    """
    check_call(loss)
    _check_trained(params)
    leaves, structure = jax.tree.flatten_with_path(params)
    names = [_name(path) for path, _ in leaves]
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if not hasattr(leaf, "dtype"):
            how = ", as equinox.partition(model, equinox.is_inexact_array) does" if callable(leaf) else ""
            raise ValueError(f"params.{name} is a {type(leaf).__name__}, not an array; leave it to loss{how}")
        if leaf.dtype == object:
            raise ValueError(f"params.{name} is an array of Python objects, not of numbers; give one array for each of them")
    if len(set(names)) < len(names):
        raise ValueError(f"two arrays of params have the same path; rename one of {', '.join(names[:9])}")

    def flat_loss(params: Params, x: Any, y: Any) -> Any:
        return loss(jax.tree.unflatten(structure, [params[n] for n in names]), x, y)

    flat = {n: jnp.asarray(leaf) for n, (_, leaf) in zip(names, leaves, strict=True)}
    return OwnVictim(flat_loss, num_classes), at_least_float32(flat)


def check_call(loss: Any) -> None:
    """ValueError where something cannot be called as `loss(params, x, y)`: a model of Flax, say, takes x alone."""
    try:
        inspect.signature(loss).bind("params", "x", "y")
    except TypeError:
        raise ValueError(f"loss is of the type {type(loss).__name__}, which takes no (params, x, y); {MODELS}") from None
    except ValueError:  # some builtins do not tell what they take
        pass


def _check_trained(params: Any) -> None:
    """ValueError where a BatchNorm's statistics lie among the params."""
    path = first_statistic(params)
    if path is not None:
        raise ValueError(
            f"params.{_name(path)} is a BatchNorm's statistic, of which no gradient leaks; leave it to loss, as "
            "nnx.split(model, nnx.Param, ...), variables['params'] and equinox.nn.make_with_state do"
        )


def module_victim(model: TorchModel, num_classes: int) -> tuple[OwnVictim, Params]:
    """The victim of a torch module, and its params by torch's names, in its layouts and order.

    Raises:
      ValueError: where the extra is not installed, or for what cannot be used.
    """
    try:
        from gdiff_jax.victims import torch_loss
    except (ImportError, AttributeError) as error:  # torchax names what other versions of torch lack
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"a torch.nn.Module needs torch and torchax of versions that go together ({text}); {EXTRA}") from None
    loss = torch_loss.torch_loss(model)
    return OwnVictim(loss, num_classes, module=model, said=loss.said), loss.params


def checked_module(victim: OwnVictim, shape: tuple[int, ...], y: Any) -> OwnVictim:
    """Of a torch module one that says how close its gradient is to torch's own, at random pixels of a shape (H, W, C) or
    (N, H, W, C) and their labels; of a loss that is JAX's the victim itself.

    Raises:
      ValueError: where it is not, with the first layer that differs.
    """
    if victim.module is None:
        return victim
    from gdiff_jax.victims import torch_checks

    loss: Any = victim.loss
    off = torch_checks.check_gradient(loss, shape, y)
    return dataclasses.replace(victim, said=(*victim.said, f"its gradient on JAX is torch's own up to {off:.1g} of its norm"))


def _name(path: tuple[Any, ...]) -> str:
    variable = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[:-1] if variable else path, simple=True, separator=".") or "params"


def is_own(name: str) -> bool:
    """Whether a victim's name is MODULE:FUNCTION or FILE.py:FUNCTION."""
    return ":" in name


def load_own(name: str, num_classes: int) -> tuple[OwnVictim, Params]:
    """The victim of what the function of this name returns: (loss, params), a torch module or a `TorchModel`.

    Raises:
      ValueError: where there is no such function, it fails, or what it returns is something else.
    """
    where, _, attribute = name.rpartition(":")
    with user_files.importable(where):
        function = _function(name)
        try:
            returned = function()
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            raise ValueError(f"victim {name!r}: {attribute}() failed ({type(error).__name__}: {error})") from error
    model = torch_model.as_model(returned)
    if model is None and not _is_pair(returned):
        raise ValueError(
            f"victim {name!r}: {attribute}() must return (loss, params), a function and a pytree of arrays, or a torch module, "
            f"and no {type(returned).__name__}; {MODELS}"
        )
    try:
        return module_victim(model, num_classes) if model else own_victim(returned[0], returned[1], num_classes)
    except ValueError as error:
        raise ValueError(f"victim {name!r}: {error}") from None


def _is_pair(returned: Any) -> bool:
    """Whether it may be (loss, params), as a NamedTuple too; such pairs of two functions are Haiku's `Transformed`."""
    pair = isinstance(returned, tuple) and len(returned) == 2 and callable(returned[0])
    return pair and (type(returned) is tuple or not callable(returned[1]))  # a model of NNX can be called, and is a pytree


def _function(name: str) -> Callable[[], Any]:
    where, _, attribute = name.rpartition(":")
    try:
        module = user_files.module_of(where)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        remedy = f"; {EXTRA}" if isinstance(error, ModuleNotFoundError) and error.name == "torch" else ""
        raise ValueError(f"victim {name!r}: {where} cannot be imported ({type(error).__name__}: {error}){remedy}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"victim {name!r}: {where} has no function {attribute!r}; it has {', '.join(there) or 'none'}")
    return function


def find_first_dense(victim: OwnVictim, params: Params, shape: tuple[int, ...], label: Any) -> OwnVictim:
    """With `first_dense`, where a layer's gradient gives the whole image away: its input is scale * image + shift, by channel.

    The gradient of a dense layer of one image is its input times its bias's gradient, so the input can be read off it; it is
    held against an image of random pixels, or a batch of that image alone for a shape (B, H, W, C).
    """
    image = np.random.default_rng(0).uniform(-1, 1, shape[-3:]).astype(np.float32)
    layers = _dense_layers(params, image.shape)
    gradient = gradient_at(victim.loss, params, np.broadcast_to(image, shape), label)[0] if layers else {}
    for layer in layers:
        delta = np.asarray(gradient[layer.bias], np.float64)
        kernel = np.asarray(layer.kernel_of(gradient), np.float64)
        if not delta.any() or not np.isfinite(kernel).all():
            continue
        inputs = (kernel @ delta / (delta @ delta)).reshape(image.shape)
        fits = [np.polyfit(image[..., c].ravel(), inputs[..., c].ravel(), 1) for c in range(image.shape[-1])]
        scale, shift = (tuple(float(fit[k]) for fit in fits) for k in range(2))
        off = np.abs(image * np.array(scale) + np.array(shift) - inputs).max()
        if min(map(abs, scale)) > 1e-6 and off < 1e-3 * np.abs(inputs).max():
            return dataclasses.replace(victim, first_dense=dataclasses.replace(layer, scale=scale, shift=shift))
    return victim


def _dense_layers(params: Params, shape: tuple[int, ...]) -> list[FirstDense]:
    """All that a first dense layer may be, by the shapes of a kernel and a bias: either layout, either order of pixels."""
    pixels, (h, w, c) = int(np.prod(shape)), shape
    layer = lambda name: name.rpartition(".")[0]
    found = []
    for kernel, value in params.items():
        for transposed in (False, True):
            rows, columns = (value.shape[::-1] if transposed else value.shape) if value.ndim == 2 else (0, 0)
            biases = [name for name, v in params.items() if v.shape == (columns,) and layer(name) == layer(kernel)]
            if rows == pixels and biases:
                orders = dict.fromkeys((None, (c, h, w) if c > 1 else None))
                found += [FirstDense(kernel, biases[0], transposed=transposed, chw=chw) for chw in orders]
    return found


def fingerprint(loss: Loss, params: Any, image: Any, label: Any) -> str:
    """SHA-256 of a loss as a program, so that a run that goes on notices that the user's function has changed.

    It is the same in every process with one version of JAX, whatever the values of params, image (H, W, C) and label: of each
    the shape and dtype count. The loss, one that `check_loss` lets pass, is traced together with its gradient, for a custom
    rule of differentiation is a part of what leaks. What it calls back on the host counts by its name alone.
    """
    x, y = jnp.asarray(image), jax.tree.map(jnp.asarray, label)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return digest_of(jax.make_jaxpr(jax.value_and_grad(loss))(params, x, y))


def digest_of(program: core.ClosedJaxpr) -> str:
    """SHA-256 of a program and of the arrays that it holds."""
    sha = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "0x", str(program)).encode())  # addresses differ from process to process
    for constant in constants(program):
        sha.update(f"{constant.dtype}{constant.shape}".encode())
        sha.update(constant.tobytes())
    return sha.hexdigest()


def check_repeats(loss: Loss, params: Any, image: Any, label: Any) -> str:
    """The `fingerprint` of a loss that is the same program whenever it is traced, as by the client, the attacker, each method.

    Raises:
      ValueError: of one that draws with NumPy or Python, or counts its calls.
    """
    first, second = (fingerprint(lambda *arguments: loss(*arguments), params, image, label) for _ in range(2))
    if first != second:
        raise ValueError(
            "loss is another function whenever it is traced, as one that draws its dropout with np.random: client and attacker "
            "would differ; draw once outside of it, or from a fixed jax.random.key"
        )
    return first


def constants(program: Any) -> Iterator[np.ndarray]:
    """The arrays that a jaxpr, and those within it, hold: of them its text gives shapes alone."""
    inner = list(getattr(program, "consts", ()))
    for equation in getattr(program, "jaxpr", program).eqns:
        inner += [variable.val for variable in equation.invars if isinstance(variable, core.Literal)]
        inner += jax.tree.leaves(list(equation.params.values()))
    for value in inner:
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
            yield from constants(value)
        elif isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            yield np.asarray(jax.random.key_data(value))
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            yield np.asarray(value)
