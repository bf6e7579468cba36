"""Settings of JAX that touch numbers: which the library fixes, which a record must tell, which it does without; and BLAS's."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from gdiff_jax.errors import need

_HASH = re.compile("[0-9a-f]{64}")
P = ParamSpec("P")
T = TypeVar("T")

# By JAX's names, with the values under which results are comparable; others give other random numbers or other arithmetic.
USUAL: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_softmax_custom_jvp": False,
    "jax_allow_f16_reductions": True,
    "XLA_FLAGS": "",
    "NVIDIA_TF32_OVERRIDE": "",
}
_OF_ARITHMETIC = re.compile(r"fast_math|precision|tf32")  # among XLA's flags; the others choose between roundings at most
# What JAX can set for one thread alone.
_OF_A_THREAD = (
    "enable_x64", "default_matmul_precision", "threefry_partitionable", "numpy_dtype_promotion", "numpy_rank_promotion",
    "softmax_custom_jvp", "allow_f16_reductions", "debug_nans", "debug_infs", "disable_jit", "check_tracer_leaks",
)  # fmt: skip
# Aids for debugging: nan, by which records say "not measured", is an error under the first two, nothing is compiled ahead of
# time under the third, and the fourth takes the closures of the reverse loop for leaks.
_DEBUGGING = ("debug_nans", "debug_infs", "disable_jit", "check_tracer_leaks")


def check_seed(seed: int) -> None:
    """That it is none that JAX would take for another one, modulo 2^32."""
    need(0 <= seed < 2**32, f"seed {seed} must lie in 0..{2**32 - 1}")


def key(seed: int | jax.Array) -> jax.Array:
    """The typed key of a seed, of threefry whatever JAX's default is: under vmap, rbg's numbers depend on the batch size."""
    if isinstance(seed, int | np.integer):
        check_seed(int(seed))
    return jax.random.key(seed, impl="threefry2x32")


def unusual() -> dict[str, Any]:
    """The settings of `USUAL` that are others here, in this thread; part of the identity of what is computed under them."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if _OF_ARITHMETIC.search(flag)]
    found = {name: getattr(jax.config, name, usual) for name, usual in USUAL.items() if name.startswith("jax_")}
    found |= {"XLA_FLAGS": " ".join(sorted(flags)), "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "")}
    return {name: value for name, value in found.items() if value != USUAL[name]}


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Where two identities differ, at most three entries of them with both values; "" where they do not.

    What is a hash, or holds hashes, comes last, and only its name is told: a reader learns nothing of it.
    """
    names = [k for k in sorted(one.keys() | other.keys()) if one.get(k, USUAL.get(k)) != other.get(k, USUAL.get(k))]
    hashed = lambda k: any(_HASH.search(str(side.get(k))) for side in (one, other))

    def both(k: str) -> str:
        if not hashed(k):
            return f"{k} was {one.get(k, USUAL.get(k))!r}, is {other.get(k, USUAL.get(k))!r}"
        was, now = (side.get(k) for side in (one, other))
        if not (isinstance(was, dict) and isinstance(now, dict)):
            return f"{k} is another"
        return f"{k} of {', '.join(n for n in sorted(was.keys() | now.keys()) if was.get(n) != now.get(n))} is another"

    return "; ".join(map(both, sorted(names, key=hashed)[:3]))


def _here(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")


def carried(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, to be called in another thread, under the settings of this one: JAX's contexts are a thread's own."""
    settings = {name: _here(name) for name in _OF_A_THREAD}

    def call(*args: P.args, **options: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            for name, value in settings.items():
                if _here(name) != value:
                    stack.enter_context(getattr(jax, name)(value))
            return function(*args, **options)

    return call


@contextlib.contextmanager
def without_debugging(tell: Callable[[str], object]) -> Iterator[None]:
    """Without JAX's aids for debugging, under which trials cannot run; `tell` is called with a line where one was on."""
    found = [name for name in _DEBUGGING if _here(name)]
    if found:
        names = ", ".join(f"JAX_{name.upper()}" for name in found)
        tell(f"{names} is set aside: trials cannot run under it, as they mark with nan what is not measured and compile ahead")
    with contextlib.ExitStack() as stack:
        for name in found:
            stack.enter_context(getattr(jax, name)(False))
        yield


@functools.cache
def _blas() -> Any:
    """Those of NumPy and SciPy, of which JAX calls the latter on a CPU; to look for them takes longer than to set them."""
    import scipy.linalg  # noqa: F401 - what is not loaded is not found
    import threadpoolctl

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for each dense factorisation, of all threads of this process until the end.

    Leaks are solved side by side, a core each. OpenBLAS's threads wait for each other by spinning, which on cores that are
    taken makes an eigendecomposition five times as long [measured].
    """
    with _blas().limit(limits=1):
        yield
