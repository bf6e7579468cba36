"""How bad is it if a gradient of this model leaks, and how much noise does it need? Attacks, and a report that says so.

    python experiments/audit.py                                        a CNN, untrained, over the default noise levels
    python experiments/audit.py --victim=my_model.py:make --images=FOLDER      your own model and pictures
    python experiments/audit.py --mechanism=clip:1+gaussian --epsilon_grid=1,10,100,1000
    python experiments/audit.py --victim=my_model.py:make --gradient=leak.safetensors --label=3
    python experiments/audit.py --from_json=runs/audit/audit.json --out=FOLDER      the report again, from its data

my_model.py:make is a function without arguments that returns (loss, params): a pure scalar loss(params, x, y) of one image x
(H, W, C) in [-1, 1], and a pytree of weights. The folder receives report.html (self-contained: open it from disk), audit.json,
trials.csv and figures/. A run that was killed goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np

import gdiff_jax as gd
from experiments import attackers, cli, mechanism_specs, report, saved_trees, sweep, trials, victim_files
from experiments.cli import ConfigError, option
from experiments.inputs import DEFAULT_SIGMAS, Inputs, SweepConfig, for_victims, load_inputs, read_images
from experiments.methods import METHODS, applies, hindrances
from experiments.records import Row, Store
from gdiff_jax import images as image_files
from gdiff_jax import modules, parallel
from gdiff_jax.auditing.checks import check_gradients
from gdiff_jax.auditing.film import film, film_steps
from gdiff_jax.auditing.result import Audit, assemble
from gdiff_jax.auditing.run import about_run, guarantee_row
from gdiff_jax.matching import released
from gdiff_jax.metrics import candidate_count
from gdiff_jax.priors import BUNDLED
from gdiff_jax.theory.summary import LARGEST_GRAM, prior_information, summarise


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    victim: str = option(
        "cnn", f"the model: FILE.py:FUNCTION or MODULE:FUNCTION of your own, or {', '.join(victim_files.VICTIMS)}"
    )
    weights: str = option("", "its weights, a .npz, .safetensors or torch .pt file by parameter name; without, its own")
    training_steps: int = option(0, "training state of a built-in model, from --checkpoints; 0 is untrained")
    checkpoints: str = option("", "folder of experiments/train_victim.py")
    gradient: str = option("", "a saved gradient to attack, a file as for --weights; with --images its image is known")
    flattened: tuple[str, ...] = option(
        (),
        "how a torch model flattened the input of a dense layer: NAME:CxHxW, such as fc1.kernel:16x8x8, or NAME:as-is",
    )
    sigma_grid: tuple[float, ...] = option(
        DEFAULT_SIGMAS,
        "standard deviations of the noise on the gradient; of a saved gradient, the one that it holds",
        bare=True,
    )
    epsilon_grid: tuple[float, ...] = option((), "epsilons at --delta of one release, with --mechanism=clip:NORM+gaussian")
    delta: float = option(1e-5, "delta of every (epsilon, delta)")
    mechanism: str = option("gaussian", mechanism_specs.HELP)
    attacker: str = option("informed", f"threat model: {', '.join(attackers.ATTACKERS)}")
    methods: tuple[str, ...] = option(
        (),
        f"attacks: {', '.join(METHODS)}, or all; without, calibrated-mean, which comes closest, dsg, from which most is "
        "recognised, and, where a first layer is dense, analytic, analytic-dsg",
    )
    images: str = option(image_files.BUNDLED, "private images: the bundled set, a folder, a .zip, a .npz or CIFAR-10's archive")
    num_images: int = option(12, "the first so many images of the set")
    group: int = option(1, "images whose mean gradient is one leak")
    label: int = option(-1, "label of every image; -1 takes the set's own")
    num_classes: int = option(10, "labels are 0 .. num_classes - 1")
    candidates: str = option("", "images among which the private ones are looked for; without, all of --images")
    threshold: float = option(20.0, "PSNR in dB from which on an image counts as recovered")
    share: float = option(0.1, "look for the noise from which on fewer than this share of the images is recovered")
    seeds: int = option(2, "leaks an image; of a saved gradient, attempts")
    seed: int = option(0, "of untrained weights and of all random numbers")
    steps: int = option(100, "reverse steps")
    prior: str = option("cifar10-32", f"diffusion prior: {', '.join(BUNDLED)}, a folder, OWNER/NAME on the hub, or an ADM file")
    prior_dtype: str = option("float32", "arithmetic of the prior: float32 or bfloat16")
    data: str = option("", "images like the private ones, whose covariance the van Trees limit takes; without, it is left out")
    spectra: int = option(1, "images whose spectrum of J^T J is computed")
    batch: int = option(8, "trials computed at a time, over all devices")
    memory_gib: float = option(0.0, "memory for trials and weights, in GiB; 0: what there is")
    from_json: str = option("", "make the report of this audit.json again; nothing is computed, only --out counts")
    out: str = option("runs/audit", "output folder")


def sweep_config(c: AuditConfig) -> SweepConfig:
    """The sweep that an audit rests on."""
    same = {f.name: getattr(c, f.name) for f in dataclasses.fields(SweepConfig) if hasattr(c, f.name)}
    given = dict(mechanisms=(c.mechanism,), victims=(c.victim,), training_steps=(c.training_steps,), out=str(_sweep_folder(c)))
    if c.epsilon_grid and c.sigma_grid == DEFAULT_SIGMAS:
        given["sigma_grid"] = ()
    if c.gradient:
        given["num_images"] = 1
    if not c.methods:
        given["methods"] = ("dsg",)
    found = SweepConfig(**{**same, **given})
    found = for_victims(attackers.with_attacker(found, set()) if c.attacker in attackers.ATTACKERS else found)
    if c.methods:
        return found
    second = "dps" if hindrances("calibrated-mean", found) else "calibrated-mean"
    return dataclasses.replace(found, methods=("dsg", second))


def _sweep_folder(c: AuditConfig) -> Path:
    return Path(c.out) / "sweep"


def check(c: AuditConfig, images_given: bool) -> None:
    """Bad values of what the sweep does not know."""
    if not math.isfinite(c.threshold):
        raise ConfigError(f"--threshold {c.threshold} must be a finite PSNR in dB, such as 20")
    if not 0 < c.share < 1:
        raise ConfigError(f"--share {c.share} must lie in (0, 1), such as 0.1 for 10 %")
    if c.spectra < 0:
        raise ConfigError(f"--spectra {c.spectra} must not be negative; 0 leaves the spectrum out")
    if c.flattened and not (c.weights or c.gradient):
        raise ConfigError("--flattened speaks of a file: give --weights or --gradient with it")
    if c.weights and c.training_steps:
        raise ConfigError(f"--weights and --training_steps={c.training_steps} both name weights; leave one away")
    if not c.gradient:
        return
    if c.group != 1:
        raise ConfigError(f"--group {c.group} with --gradient: a saved gradient is attacked as that of one image")
    if len(c.sigma_grid) != 1 or c.epsilon_grid:
        raise ConfigError(
            f"--gradient holds one noise level, --sigma_grid names {len(c.sigma_grid)}: say --sigma_grid=0 if it holds none"
        )
    if not images_given and c.label < 0:
        raise ConfigError("--gradient without --images: say the image's label with --label, which the loss needs")
    if not images_given and "soteria" in c.mechanism:
        raise ConfigError(f"--mechanism {c.mechanism} with --gradient: what soteria prunes depends on the image; give --images")


def load(c: AuditConfig, config: SweepConfig, images_given: bool) -> Inputs:
    """The sweep's inputs, with the weights and the gradient of the user's files in place."""
    known = images_given or not c.gradient
    inputs = load_inputs(config, known)
    orders = saved_trees.parse_orders(c.flattened)
    key = (c.victim, c.training_steps)
    if c.weights:
        tree = saved_trees.fit("weights", c.weights, inputs.params[key], orders)
        params = {name: jnp.asarray(value) for name, value in tree.items()}
        hashes = {**inputs.hashes, "weights": modules.digest(params)}
        inputs = dataclasses.replace(inputs, params={key: params}, hashes=hashes)
        if victim_files.is_own(c.victim) and known:
            victim_files.check_own(c.victim, inputs.victims[c.victim], params, inputs.images[0], inputs.labels[0])
    if c.gradient:
        leak = saved_trees.fit("gradient", c.gradient, inputs.params[key], orders)
        if not any(np.any(value) for value in leak.values()):
            raise ConfigError(f"--gradient {c.gradient} is zero everywhere: there is nothing to attack")
        hashes = {**inputs.hashes, "gradient": modules.digest(leak), "truth": images_given}
        if not known and inputs.victims[c.victim].has_batch_norm and config.statistics == "known":
            raise ConfigError(
                f"--gradient of {c.victim} without --images: its BatchNorms' statistics are not known; --attacker=server"
            )
        leak = {name: jnp.asarray(value) for name, value in leak.items()}
        inputs = dataclasses.replace(inputs, leak=leak, hashes=hashes)
    return inputs


def _theory(c: AuditConfig, inputs: Inputs, information: np.ndarray | None) -> dict[str, Any] | None:
    """None where theory does not speak of the case: of batches, and where nothing is known of the image."""
    if c.group > 1 or not np.isfinite(inputs.images).all() or inputs.victims[c.victim].has_batch_norm:
        return None
    key = jax.random.fold_in(jax.random.key(c.seed), 2**18)
    sigmas = inputs.sigmas[c.mechanism]
    params = inputs.params[c.victim, c.training_steps]
    loss = inputs.victims[c.victim].loss
    return summarise(
        key, loss, params, inputs.images, inputs.labels, sigmas, spectra=c.spectra, information=information
    )  # fmt: skip


def _film(c: AuditConfig, config: SweepConfig, inputs: Inputs) -> list[np.ndarray]:
    """Of the first trial at the smallest noise; [] for groups of images."""
    if c.group > 1:
        return []
    victim, params = inputs.victims[c.victim], inputs.params[c.victim, c.training_steps]
    key = trials.trial_keys(c.seed, [trials.Trial(trials.Group("dsg", c.victim, c.training_steps), 0.0, 0, 0)])[0]
    x, y, sigma = jnp.asarray(inputs.images[0]), jnp.asarray(inputs.labels[0]), inputs.sigmas[c.mechanism][0]
    k_noise, k_sample = jax.random.split(key)

    @jax.jit
    def match_of(params: Any, proxy: Any, x: Any, y: Any, given: Any) -> Any:
        mechanism = inputs.mechanisms[c.mechanism].for_image(jax.random.fold_in(k_noise, 1), sigma, victim, params, x)
        leak = mechanism(k_noise, released(None, victim.loss, params, x, y)) if given is None else given
        guess = y if config.labels == "known" else trials.infer_labels(victim, params, proxy, leak, 1)
        return trials.attacker_match(config, victim, params, proxy, x, leak, guess, mechanism, None)

    match = match_of(params, jnp.asarray(inputs.proxy), x, y, inputs.leak)
    prior = inputs.prior
    return film(k_sample, prior.denoise, match, inputs.schedule, prior.image_shape, prior.clip, config.guidance_rate)


def _about(c: AuditConfig, config: SweepConfig, inputs: Inputs, run: dict[str, Any], seconds: float) -> dict[str, Any]:
    params, spec = inputs.params[c.victim, c.training_steps], inputs.mechanisms[c.mechanism]
    trained = f" after {c.training_steps} training steps" if c.training_steps else ""
    untrained = not (trained or c.weights or victim_files.is_own(c.victim))
    return {
        **run,
        "victim": f"{os.path.basename(c.victim)}{trained}" + (" (untrained)" if untrained else ""),
        "victim_given": c.victim,
        "weights": c.weights,
        "gradient": c.gradient,
        "parameters": int(sum(p.size for p in params.values())),
        "images": c.images if np.isfinite(inputs.images).all() else "not known",
        "num_images": len(inputs.images),
        "group": c.group,
        "seeds": c.seeds,
        "seed": c.seed,
        "steps": c.steps,
        "methods": list(config.methods),
        "attacks": report.strengths(config),
        "mechanism": c.mechanism,
        "clip_norm": spec.clip_norm,
        "threat_model": attackers.threat_model(config),
        "threshold": c.threshold,
        "share": c.share,
        "delta": c.delta,
        "film_steps": film_steps(inputs.schedule),
        "candidates_from": c.candidates or c.images,
        "hashes": {k: v for k, v in inputs.hashes.items() if v},
        "seconds": round(seconds, 1),
    }


def gather(rows: list[Row], store: Store) -> tuple[list[Row], list[np.ndarray], list[dict[str, np.ndarray]]]:
    """The sweep's rows as an audit's, with the image and the trace of each."""
    arrays: dict[int, dict[str, np.ndarray]] = {}
    kept, images, traces = [], [], []
    for row in rows:
        if row["chunk"] not in arrays:
            arrays[row["chunk"]] = store.arrays(row["chunk"])
        found = arrays[row["chunk"]]
        per_leak = len(found["images"]) // len(found["trace_distance"])
        kept.append({**row, "leak": row["image"] - row["row"] % per_leak})
        images.append(found["images"][row["row"]])
        traces.append({k: found[f"trace_{k}"][row["trial"]] for k in ("distance", "x0_error", "signal")})
    return kept, images, traces


def run(c: AuditConfig, images_given: bool) -> Audit:
    """Attacks, measures, and returns what was found; the attacks' records stay in OUT/sweep."""
    started = time.time()
    check(c, images_given)
    config = sweep_config(c)
    inputs = load(c, config, images_given)
    shape, known = inputs.prior.image_shape, bool(np.isfinite(inputs.images).all())
    others = np.zeros((0, *shape), np.float32)
    if known and not inputs.victims[c.victim].has_batch_norm:
        try:
            params = inputs.params[c.victim, c.training_steps]
            check_gradients(inputs.victims[c.victim].loss, params, inputs.images, inputs.labels)
        except ValueError as error:
            raise ConfigError(f"victim {c.victim}: {error}") from None
    if known:
        others = image_files.to_model(read_images("candidates", c.candidates or c.images, "test", c.prior, shape).images)
    information = None
    if c.data:
        if math.prod(shape) > LARGEST_GRAM:
            raise ConfigError(
                f"--data: images of {math.prod(shape)} numbers are too large for the van Trees limit; leave it away"
            )
        information = prior_information(read_images("data", c.data, "train", c.prior, shape).images)
    count = candidate_count(others, inputs.images) if known else 0
    if known and count < 2:
        raise ConfigError(f"--candidates {c.candidates or c.images} holds nothing but the private images; give more images")
    if not c.methods and applies("analytic", inputs.victims[c.victim], c.group):
        dense = [method for method in ("analytic", "analytic-dsg") if not hindrances(method, config)]
        config = dataclasses.replace(config, methods=(*config.methods, *dense))
    store = Store(_sweep_folder(c), sweep.identity(config, inputs))
    rows, images, traces = gather(sweep.run_trials(config, inputs, store), store)
    print("theory, film and report ...")
    told = [
        guarantee_row(sigma, report.guarantee(config, inputs, c.victim, c.mechanism, sigma), 1 / count if known else 1e-4)
        for sigma in inputs.sigmas[c.mechanism]
    ]
    theory, frames = _theory(c, inputs, information), _film(c, config, inputs)
    about = _about(c, config, inputs, about_run(inputs.prior), time.time() - started)
    truth = inputs.images if known else None
    return assemble(
        about, rows, images, traces, truth, candidates=others, mean_image=inputs.prior.mean_image,
        guarantees=told, theory=theory, film=frames,
    )  # fmt: skip


def main() -> None:
    parallel.use_every_core()
    c: AuditConfig = cli.read_flags(AuditConfig)
    if c.from_json:
        try:
            audit = gd.Audit.load(c.from_json)
        except ValueError as error:
            raise ConfigError(f"--from_json: {error}") from None
    else:
        audit = run(c, cli.given("images"))
    page = audit.report(Path(c.out))
    print(f"\n{audit.verdict()}\n")
    for warning in audit.warnings():
        print(f"! {warning}")
    print(f"report: {page}")


if __name__ == "__main__":
    cli.define_flags(AuditConfig)
    cli.run(main)
