"""Rank correlations of what tells without an attack with what attacks make of each image, by hand."""

import types

import numpy as np

from benchmarks import worst_images
from gdiff_jax.sweeping.plan import VictimState


def test_a_measure_is_held_against_the_attacks_image_by_image():
    state, sigmas, images = VictimState("cnn", 0), (0.1, 0.01), 6
    psnr = {0.01: np.arange(30.0, 36.0), 0.1: np.arange(20.0, 14.0, -1.0)}
    usual = dict(method="auto", victim="cnn", training_steps=0, mechanism="gaussian", failed=False, seed=0)
    rows = [{**usual, "sigma": s, "image": i, "psnr": float(psnr[s][i])} for s in sigmas for i in reversed(range(images))]
    both = np.stack([psnr[0.01] + 2, psnr[0.1] - 1], 1).tolist()  # of the levels in ascending order
    measures = {"norm": list(range(images)), worst_images.EXPECTED: both, "lambda_min": [3.0, 2.0, 1.0, 0.0]}
    plan = types.SimpleNamespace(images=np.random.default_rng(0).uniform(size=(images, 4, 4, 3)))
    text = worst_images.table(worst_images.WorstConfig(sigma_grid=sigmas), plan, rows, {state: measures})
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    first, second, mean, least = (dict(zip(head, line, strict=True)) for line in lines)
    assert [line["sigma"] for line in (first, second)] == ["0.01", "0.1"]
    assert [line["norm"] for line in (first, second, mean, least)] == ["1.00", "-1.00", "0.00", "-1.00"]
    assert [line[worst_images.EXPECTED] for line in (first, second, mean, least)] == ["1.00"] * 4
    assert [line["lambda_min"] for line in (first, second)] == ["-1.00", "1.00"]  # over the first four images
    assert [line["expected less measured"] for line in (first, second)] == ["+2.0", "-1.0"]
    assert [line["measured dB, median"] for line in (first, second)] == ["32.5", "17.5"]


def test_a_plain_picture_is_smoother():
    plain, busy = np.zeros((4, 4, 3)), np.indices((4, 4)).sum(0)[..., None] % 2 * np.ones(3)
    smooth = worst_images.smoothness(np.stack([plain, busy]))
    np.testing.assert_allclose(smooth, [0, -2])
