"""Strict JAX for every test, and the toy priors whose mathematics is known."""

import atexit
import dataclasses
import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["GDIFF_JAX_CACHE"] = tempfile.mkdtemp(prefix="gdiff-jax-priors-")
atexit.register(shutil.rmtree, os.environ["GDIFF_JAX_CACHE"], ignore_errors=True)
os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # for the commands that tests run: their programs are those of the tests themselves
# As many tests run at once as there are cores: OpenBLAS's threads would wait for each other, and that takes a core each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compiling is most of what these tests cost, and many compile the same program: workers and commands share one cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gdiff-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    quick = "--xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that it does not know ends the process
        quick += " --xla_cpu_use_fusion_emitters=false"  # half the time again, by the code generator of before
        # One module of LLVM's a program, and none of its slow passes: a tenth of the time, for programs as small as these.
        quick += " --xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `experiments` is a package of the repository, not installed

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float32, random_weights

from gdiff_jax.pytrees import pytree

# What JAX traced stays alive and is millions of objects: to look through them again and again is an eighth of the time.
gc.set_threshold(100_000, 50, 1000)

# Before the first array is made, in every xdist worker: the number of devices is fixed by then.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)

from gdiff_jax.modules import Params, Spec, init_params
from gdiff_jax.priors import Denoiser, Prior, UNet2DConfig, save_prior
from gdiff_jax.schedule import make_betas

if TYPE_CHECKING:
    from gdiff_jax.sweeping.config import SweepConfig

# For jit(compiler_options=...): half the compile time, for tests of what is computed and not of how fast.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# For the few that draw thousands of samples, where it is running that takes time.
QUICK_RUN = {"xla_backend_optimization_level": 2}


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytree
class GaussianDenoiser:
    """The exact eps for images drawn from N(mean, cov): sqrt(1 - abar) (abar cov + (1 - abar) I)^-1 (x_t - sqrt(abar) mean)."""

    mean: jax.Array  # (n,)
    cov: jax.Array  # (n, n)
    abar: jax.Array  # (T,)
    basis: jax.Array  # (n, n) eigenvectors of cov, and
    values: jax.Array  # (n,) its eigenvalues
    v: jax.Array | None = None  # (H, W, C), a variance output that does not depend on x_t

    def __call__(self, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        abar = self.abar[t]
        whitened = (self.basis.T @ (x_t.ravel() - jnp.sqrt(abar) * self.mean)) / (abar * self.values + 1 - abar)
        return (jnp.sqrt(1 - abar) * (self.basis @ whitened)).reshape(x_t.shape), self.v


@pytest.fixture(scope="session")
def gaussian() -> GaussianDenoiser:
    """A correlated Gaussian prior of 6 pixels, shape (2, 3, 1), trained with DDPM's betas."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6)) / np.sqrt(6)
    cov = root @ root.T + 0.1 * np.eye(6)
    values, basis = np.linalg.eigh(cov)
    arrays = (rng.normal(size=6), cov, np.cumprod(1 - make_betas()), basis, values)
    return GaussianDenoiser(*(float32(a) for a in arrays))


@pytest.fixture(scope="session")
def random_params() -> Callable[[Spec], Params]:
    return random_weights


@pytest.fixture(scope="session")
def tiny_unet(random_params) -> Denoiser:
    """An 8 x 8 x 1 U-Net with attention in the middle."""
    from tiny import TRAINED

    config = dataclasses.replace(TRAINED, in_channels=1, out_channels=1)
    return Denoiser(random_params(config), config)


PATCHED = UNet2DConfig(
    sample_size=8,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
)


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny prior for 16 px (`prior`) and six labelled images of that size (`images.npz`)."""
    from tiny import once

    from gdiff_jax.training.start import SCHEDULER

    def make(root: Path) -> None:
        denoise = Denoiser(init_params(jax.random.key(0), PATCHED), PATCHED)
        mean = np.linspace(-0.5, 0.5, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
        save_prior(root / "prior", Prior(denoise, make_betas(), "fixed_small", "tiny", "", mean), SCHEDULER)
        images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
        np.savez(root / "images.npz", images=images, labels=np.arange(6))

    return once(tmp_path_factory, "tiny", make)


@pytest.fixture(scope="session")
def tiny_sweep(tiny_prior: Path, tmp_path_factory: pytest.TempPathFactory) -> "SweepConfig":
    """A sweep over the plain prior that left all its files in the folder of this configuration; many tests read them."""
    from tiny import config, once, plain_plan, run_in_process

    changes = dict(sigma_grid=(0.0, 0.1, 0.4), seeds=2)

    def make(out: Path) -> None:
        run_in_process(config(tiny_prior, out, **changes), plain_plan(tiny_prior, **changes))

    return config(tiny_prior, once(tmp_path_factory, "tiny-sweep", make), **changes)


@pytest.fixture(scope="session")
def undisturbed(tiny_prior: Path, tmp_path_factory: pytest.TempPathFactory) -> "SweepConfig":
    """A small sweep of 18 chunks, run by its command to the end; those that are disturbed are held against it."""
    from tiny import command, config, once, run_command, to_folder

    c = config(tiny_prior, "", num_images=6, batch=1, steps=10, methods=("dsg",))

    def make(out: Path) -> None:
        done = run_command(command(to_folder(c, out)))
        assert done.returncode == 0, done.stderr[-2000:]

    return to_folder(c, once(tmp_path_factory, "undisturbed", make))


@pytest.fixture(scope="session")
def small(tiny_prior: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small audit, made by its command, on as many devices as the tests have: what it compiles serves them."""
    from tiny import command_of, flags_of, once, run_command, small_audit

    def make(out: Path) -> None:
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
        done = run_command([*command_of("audit.py"), *flags_of(small_audit(tiny_prior, out))], env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "report.html" in done.stdout
        assert "images are recovered" in done.stdout

    return once(tmp_path_factory, "small-audit", make)


# An audit by its call


@pytest.fixture(scope="module")
def prior(tiny_prior: Path) -> Prior:
    """The tiny prior, loaded."""
    from gdiff_jax.priors import load_prior

    return load_prior(tiny_prior / "prior")


@pytest.fixture(scope="module")
def plain_prior(prior: Prior) -> Prior:
    """Of the same shape, with a denoiser that compiles in no time."""
    from tiny import plain

    return plain(prior)


@pytest.fixture(scope="module")
def data(tiny_prior: Path) -> tuple[np.ndarray, np.ndarray]:
    """Six images, labelled 0 .. 5."""
    with np.load(tiny_prior / "images.npz") as file:
        return file["images"], file["labels"]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, prior: Prior) -> Callable[..., Any]:
    """What would be run, of the arguments of an audit's call."""
    from tiny import QUICK_AUDIT

    from gdiff_jax.auditing import audit, call

    monkeypatch.setattr(call, "run", lambda plan, *_: plan)
    return lambda *arguments, **options: audit(*arguments, **{"prior": prior, **QUICK_AUDIT, **options})


@pytest.fixture
def attacks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit without theory and film, which cost most of its time."""
    from gdiff_jax.auditing import run

    monkeypatch.setattr(run, "_theory", lambda *_: None)
    monkeypatch.setattr(run, "_film", lambda *_: [])
    monkeypatch.setattr(run, "measured", lambda *_: None)
