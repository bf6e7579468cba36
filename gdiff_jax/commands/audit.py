"""How bad is it if a gradient of this model leaks, and how much noise does it need? Attacks, and a report that says so.

    gdiff-audit                                        a CNN, untrained, over the default noise levels
    gdiff-audit --victim=my_model.py:make --images=FOLDER      your own model and pictures
    gdiff-audit --mechanism=clip:1+gaussian --epsilon_grid=1,10,100,1000
    gdiff-audit --victim=my_model.py:make --gradient=leak.safetensors --sigma_grid=0 --label=3
    gdiff-audit --fail_if="recovered > 0.1"            in a pipeline: exit code 3 where that holds
    gdiff-audit --from_json=runs/audit/audit.json --out=FOLDER      the report again, from its data
    gdiff-audit compare runs/a runs/b --out=FOLDER     audits beside each other, image by image, from their data

my_model.py:make is a function without arguments that returns (loss, params): a pure scalar loss(params, x, y) of one image x
(H, W, C) in [-1, 1], and a pytree of weights; or, with the extra `torch`, a torch.nn.Module. The folder receives report.html
(self-contained: open it from disk), summary.md, audit.json, trials.csv, figures/ and, where there are images enough,
blind.html (a test for people, to print).
A run that was killed goes on where it stopped when the same command is given again. The exit code is 4 where a release gives
away more than its mechanism can.
"""

from __future__ import annotations

import os
from pathlib import Path

from gdiff_jax import options
from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands import flags
from gdiff_jax.errors import ConfigError, need
from gdiff_jax.files import need_folder

FINDING = 4  # the exit code where a release gave away more than its mechanism can

USUAL = ("victim", "images", "sigma_grid", "mechanism", "out")  # flags, which --help begins with


def main() -> None:
    flags.command(_audit, AuditConfig(), text=__doc__, usual=USUAL, others={"compare": _compare})


def _audit() -> None:
    from gdiff_jax import parallel  # not with the module, nor what follows: --help need not wait for it
    from gdiff_jax.auditing import condition
    from gdiff_jax.auditing.load import audit_named
    from gdiff_jax.auditing.result import Audit

    parallel.use_every_core()
    flags.need_devices()
    config = flags.read_flags(AuditConfig())
    try:
        fails = condition.parse(config.asked.fail_if) if config.asked.fail_if else None
    except ValueError as error:
        raise ConfigError(f"--fail_if: {error}") from None
    before = Path(config.run.out) / "audit.json"
    if config.from_json:
        need_folder(Path(config.run.out), "--out")
        kept = not before.exists() or os.path.realpath(before) == os.path.realpath(config.from_json)
        need(kept, f"--out {config.run.out} holds another audit, {before}, which would be lost; give another folder")
        try:
            audit = Audit.load(config.from_json)
        except ValueError as error:
            raise ConfigError(f"--from_json: {error}") from None
    else:
        need(
            not fails or config.images_known, "--fail_if is of reconstructions beside the truth: give --images with --gradient"
        )
        need(
            not before.exists() or (before.parent / "sweep").exists(),
            f"--out {config.run.out} holds {before}, without the records of an audit that could go on (sweep); give another "
            "folder",
        )
        audit = audit_named(config)
    page = audit.report(Path(config.run.out))
    print(f"\n{audit.verdict()}\n")
    for warning in audit.warnings():
        print(f"! {warning}")
    print(f"report: {page}")
    met = fails.met(audit) if fails else []
    if met:
        print(f"failed: {fails} at {', '.join(met)}")
    if audit.findings():
        flags.leave(FINDING)
    if met:
        flags.leave(3)


def _compare(paths: list[str]) -> None:
    from gdiff_jax.auditing.comparing.result import compare_named

    config = flags.read_flags(AuditConfig())
    out = Path(config.run.out) if flags.given("out") else Path("runs/compare")
    only_out = options.replace(AuditConfig(), out=config.run.out)
    need(config == only_out, "compare reads what audits left, and takes folders and --out alone; leave the other flags away")
    need_folder(out, "--out")
    try:
        comparison = compare_named(paths)
    except ValueError as error:
        raise ConfigError(f"compare: {error}") from None
    page = comparison.report(out)
    print(f"\n{comparison.text}\n")
    for warning in comparison.warnings():
        print(f"! {warning}")
    print(f"comparison: {page}")
