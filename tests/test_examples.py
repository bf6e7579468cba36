"""The examples run as their README says, made quick: `pip install -e ".[torch,parity]"`."""

import json
import subprocess
import sys

import pytest
from tiny import ROOT

pytest.importorskip("torchax", reason="needs the extra `torch`")
pytest.importorskip("opacus", reason="needs the extra `parity`")


@pytest.mark.long
def test_a_step_of_opacus_is_audited_with_its_own_sigma_and_clipping(tmp_path):
    quick = ["--methods=dsg", "--steps=2", "--spectra=0", "--noise_multiplier=0.02", "--max_grad_norm=0.5"]
    command = [sys.executable, str(ROOT / "examples" / "opacus" / "audit_step.py"), f"--out={tmp_path}", *quick]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "_module. before all names is taken off" in done.stdout
    assert "--gradient: it is the model's own gradient at the image" in done.stdout
    about = json.loads((tmp_path / "audit" / "audit.json").read_text())["about"]
    assert (about["mechanism"], about["clip_norm"]) == ("clip:0.5+gaussian", 0.5)
    assert "sigma 0.01," in done.stdout
