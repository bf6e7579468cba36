"""Which attack is the strongest, by hand."""

import numpy as np
import pytest
from tiny import row_of

from gdiff_jax.sweeping import comparison


def test_wins_by_hand():
    """The best of each image and seed; a tie is won by both, a failed trial by nobody."""
    rows = [row_of("dsg", 0.1, i, p) for i, p in enumerate([10.0, 20.0, 30.0])]
    rows += [row_of("dlg", 0.1, 0, 11.0), row_of("dlg", 0.1, 1, 20.0), row_of("dlg", 0.1, 2, None, failed=True)]
    rows += [row_of("dlg", 0.2, 0, 50.0)]
    (cells,) = comparison.by_panel(rows).values()
    assert comparison.wins(cells, 0.1) == {"dsg": 2, "dlg": 2}
    assert comparison.wins(cells, 0.2) == {"dlg": 1}


def test_the_interval_is_of_a_bootstrap_over_leaks():
    """Images of one leak and seeds of one image stay together; two leaks are too few."""
    same = [row_of("dsg", 0.1, i, 20.0) for i in range(5)]
    assert comparison.psnr_interval(same) == (20.0, 20.0, 20.0)
    rng = np.random.default_rng(0)
    many = [row_of("dsg", 0.1, i, float(p)) for i, p in enumerate(rng.normal(20, 1, 400))]
    median, low, high = comparison.psnr_interval(many)
    assert low < median < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.3)  # sqrt(pi / 2) / sqrt(n), a normal's median
    seeds = [dict(r, seed=s, chunk=s) for r in many[:41] for s in range(10)]  # ten times the rows, no more images
    assert comparison.psnr_interval(seeds) == comparison.psnr_interval(many[:41])
    median, low, high = comparison.psnr_interval(many[:2])
    assert np.isnan(low)
    assert np.isnan(high)
    pairs = [row_of("dsg", 0.1, i, 10.0 * (i // 2), group=2) for i in range(4)]  # two leaks of two images
    assert np.isnan(comparison.psnr_interval(pairs)[1])
    assert np.isnan(comparison.psnr_interval([row_of("dsg", 0.1, 0, None, failed=True)])[0])


def test_verdicts_by_hand():
    rows = [row_of("dsg", s, 0, p) for s, p in ((0.0, 20.0), (0.1, 19.0), (0.3, 12.0))]
    rows += [row_of("dlg", s, 0, p) for s, p in ((0.0, 50.0), (0.1, 8.0), (0.3, 5.0))]
    (words,) = comparison.verdicts(rows)
    assert words == (
        "Strongest by median against cnn, untrained: dlg at sigma 0 (50.0 dB), then dsg at sigma 0.1 to 0.3 (19.0 to 12.0 dB)."
    )
    assert "every trial failed" in comparison.verdicts([row_of("dsg", 0.0, 0, None, failed=True)])[0]


def test_the_table_counts_a_leak_of_several_images_once():
    """Seconds are a trial's, labels are shares."""
    rows = [
        dict(row_of("dsg", 0.1, i, 20.0, group=2, accuracy=0.5), seconds=[1.0, 1.0, 3.0, 3.0, 8.0, 8.0][i]) for i in range(6)
    ]
    line = comparison.table(rows).splitlines()[2]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["cnn", "no", "gaussian", "0.1", "dsg", "20.0 [20.0, 20.0]", "6/6", "50%", "3", "10"]
    known = comparison.table([row_of("dsg", 0.1, 0, 20.0, labels="known")]).splitlines()[2]
    assert "| known " in known
