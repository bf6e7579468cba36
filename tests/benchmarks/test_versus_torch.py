"""The step that our speed is measured against computes what ours computes: `pip install -e ".[parity]"`."""

import pytest

pytest.importorskip("torch", reason="needs the extra `parity`")

from benchmarks import versus_torch


@pytest.mark.parametrize(
    ("victim", "method", "mode"), [("mlp", "dsg", "eager-batch+channels_last"), ("cnn", "dps", "eager-loop")]
)
def test_both_sides_take_the_same_step(victim, method, mode):
    """`compare` refuses two sides that disagree by more than 1e-4; here that they do not, and that there is a ratio."""
    row = versus_torch.compare("1M", victim, method, (mode,), steps=1, repeats=1)
    assert 0 < max(row["error"].values()) < 1e-4
    assert row["best_mode"] == mode
    assert row["torch_over_ours"] == pytest.approx(row["torch_s"] / row["ours_s"])
