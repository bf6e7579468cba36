"""How bad is it if a gradient of this model leaks, and how much noise does it need? Attacks, and a report that says so.

    python experiments/audit.py                                        a CNN, untrained, over the default noise levels
    python experiments/audit.py --victim=my_model.py:make --images=FOLDER      your own model and pictures
    python experiments/audit.py --mechanism=clip:1+gaussian --epsilon_grid=1,10,100,1000
    python experiments/audit.py --victim=my_model.py:make --gradient=leak.safetensors --sigma_grid=0 --label=3
    python experiments/audit.py --from_json=runs/audit/audit.json --out=FOLDER      the report again, from its data

my_model.py:make is a function without arguments that returns (loss, params): a pure scalar loss(params, x, y) of one image x
(H, W, C) in [-1, 1], and a pytree of weights; or, with the extra `torch`, a torch.nn.Module. The folder receives report.html
(self-contained: open it from disk), audit.json, trials.csv and figures/. A run that was killed goes on where it stopped when
the same command is given again. The exit status is 3 where a release gives away more than its mechanism can. Where the package
is installed the command is also called gdiff-audit.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands import flags
from gdiff_jax.errors import ConfigError
from gdiff_jax.files import need_folder

FINDING = 3  # the exit status where a release gave away more than its mechanism can


def main() -> None:
    flags.command(_audit, AuditConfig(), text=__doc__)


def _audit() -> None:
    from gdiff_jax import parallel  # not with the module, nor what follows: --help need not wait for it
    from gdiff_jax.auditing.load import audit_named
    from gdiff_jax.auditing.result import Audit

    parallel.use_every_core()
    flags.need_devices()
    config = flags.read_flags(AuditConfig())
    if config.from_json:
        need_folder(Path(config.run.out), "--out")
        try:
            audit = Audit.load(config.from_json)
        except ValueError as error:
            raise ConfigError(f"--from_json: {error}") from None
    else:
        audit = audit_named(config)
    page = audit.report(Path(config.run.out))
    print(f"\n{audit.verdict()}\n")
    for warning in audit.warnings():
        print(f"! {warning}")
    print(f"report: {page}")
    if audit.findings():
        sys.exit(FINDING)
