"""The benchmark of recognition: ranks and chances against their definitions."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.recognise import among, ranks


def test_a_rank_counts_the_others_that_are_as_near():
    rng = np.random.default_rng(0)
    candidates, own = rng.normal(size=(30, 5)), np.array([3, 7, 29])
    found = candidates[own] + rng.normal(size=(3, 5))
    distance = np.square(found[:, None] - candidates[None]).sum(2)
    np.testing.assert_array_equal(
        ranks(found, candidates, own), [(d <= d[i]).sum() - 1 for d, i in zip(distance, own, strict=True)]
    )


@pytest.mark.parametrize("count", [1, 2, 10, 50])
def test_the_chance_among_fewer_is_that_of_drawing_none_that_is_nearer(count):
    rank = np.array([0, 1, 5, 40, 49])
    expected = [stats.hypergeom(49, r, count - 1).pmf(0) for r in rank]
    np.testing.assert_allclose(among(rank, count, 50), expected, atol=1e-9)
