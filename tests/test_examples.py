"""The examples run as their README says, made quick: `pip install -e ".[torch,parity]"`."""

import json
import os
import subprocess
import sys

import pytest
from tiny import ROOT

pytest.importorskip("torchax", reason="needs the extra `torch`")
pytestmark = pytest.mark.long  # each is a process, or several, that imports torch
QUICK = ["--methods=auto", "--steps=2", "--spectra=0"]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # else both would tell their makers of the test


def run(script, *options):
    command = [sys.executable, str(ROOT / "examples" / script), *QUICK, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | QUIET)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def record(folder):
    return json.loads((folder / "audit.json").read_text())


def test_a_step_of_opacus_is_audited_with_its_own_sigma_and_clipping(tmp_path):
    pytest.importorskip("opacus", reason="needs the extra `parity`")
    options = ["--noise_multiplier=0.02", "--max_grad_norm=0.5", "--methods=dsg"]
    told = run("opacus/audit_step.py", f"--out={tmp_path}", *options)
    assert "_module. before all names is taken off" in told
    assert "--gradient: it is the model's own gradient at the image" in told
    about = record(tmp_path / "audit")["about"]
    assert (about["mechanism"], about["clip_norm"]) == ("clip:0.5+gaussian", 0.5)
    assert "sigma 0.01," in told


def test_what_the_server_of_a_round_of_flower_receives_gives_the_image_away(tmp_path):
    pytest.importorskip("flwr", reason="needs the extra `parity`")
    told = run("flower/federated_round.py", f"--out={tmp_path}")
    assert "Assumed: its label is the one that its last layer betrays. Assumed: it is of 1 local step at the learning" in told
    assert "It was solved, not searched for" in told
    assert (tmp_path / "client-1.pt").is_file()
    scores = [row["psnr"] for row in record(tmp_path / "known")["trials"] if row["method"] == "auto"]
    assert min(scores) > 60
