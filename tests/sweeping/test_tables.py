"""Medians over the grid and guarantees, by hand."""

import pytest
from tiny import plan_of, scores

from gdiff_jax.sweeping import tables


def test_table_statistics_by_hand():
    """Quartiles, the failed trial left out and counted, and the two picks, which differ where distance misleads."""
    row = lambda image, seed, psnr, distance, at_least, best, failed=False: {
        "method": "dsg", "victim": "v", "training_steps": 0, "mechanism": "gaussian", "sigma": 0.1,
        "image": image, "seed": seed, "psnr": psnr,
        "least_step_distance": distance, "psnr_at_least_distance": at_least, "psnr_of_best_step": best, "failed": failed,
    }  # fmt: skip
    rows = [row(0, 0, 10.0, 1.0, 10.0, 12.0), row(0, 1, 20.0, 2.0, 20.0, 21.0), row(1, 0, 30.0, 1.0, 30.0, 30.0)]
    rows.append(row(1, 1, None, None, None, None, failed=True))
    assert tables.quartiles(rows, "psnr") == pytest.approx((20.0, 15.0, 25.0))
    assert tables.choices(rows) == (20.0, 21.0)  # attacker: 10, 20, 30; oracle: 12, 21, 30
    assert "4 (1 failed)" in tables.table(rows, [])


def test_what_is_expected_is_told_beside_what_is_true():
    row = lambda method, psnr, **expected: {
        "method": method, "victim": "v", "training_steps": 0, "mechanism": "gaussian", "sigma": 0.1, "psnr": psnr,
        "failed": False, **expected,
    }  # fmt: skip
    rows = [row("auto", 20.0, expected_psnr=21.0, within_two_deviations=0.9), row("auto", 3.0), row("dsg", 18.0)]
    rows.append(row("auto", 24.0, expected_psnr=22.0, within_two_deviations=0.98))
    _, _, *lines = tables.expectations(rows).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "v", "no", "gaussian", "auto", "0.1", "2", "22.0", "21.5", "94%"
    ]  # fmt: skip
    assert len(lines) == 1  # none of a method that expects nothing
    assert tables.expectations(rows[1:3]) == ""


def test_a_screen_holds_the_medians_a_line_a_method_and_a_column_a_sigma():
    row = lambda method, sigma, psnr: {
        "method": method, "victim": "v", "training_steps": 100, "mechanism": "gaussian", "sigma": sigma, "psnr": psnr,
        "failed": psnr is None,
    }  # fmt: skip
    rows = [row("dsg", 0.1, 20.0), row("dsg", 0.1, 30.0), row("dsg", 0.1, None), row("dsg", 0.0, 40.0), row("auto", 0.0, None)]
    table = tables.brief([*rows, row("prior-only", 0.0, 8.0)], [{"failed": False, "psnr": 12.0}])
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "---" not in line] == [
        ["attacked", "method", "0", "0.1"],
        ["v, trained 100 steps", "auto", "-", "-"],  # every trial failed; none was asked for
        ["v, trained 100 steps", "dsg", "40.0", "25.0"],
        ["no leak at all", "prior-only", "8.0", "8.0"],
        ["no leak at all", "mean image", "12.0", "12.0"],
    ]


def cells(table, start):
    """Those of the line that begins with these."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return next(line for line in lines if line[: len(start)] == start)


def test_the_epsilon_of_a_level_is_the_one_that_was_asked_for(tiny_prior):
    plan = plan_of(tiny_prior, sigma_grid=(0.5,), epsilon_grid=(10.0, 1.0), mechanisms=("clip:2+gaussian",))
    table = tables.privacy_table(plan)
    for sigma, epsilon in zip(plan.sigmas["clip:2+gaussian"][1:], (10, 1), strict=True):
        assert float(cells(table, ["clip:2+gaussian", "any", f"{sigma:.4g}"])[3]) == pytest.approx(epsilon)
    first, tenth, one = plan.sigmas["clip:2+gaussian"]
    (line,) = tables.epsilons(plan)
    assert line.startswith("Epsilon of clip:2+gaussian, one release, delta 1e-05: ")
    assert line.endswith(f" at {first:.4g}, 10 at {tenth:.4g}, 1 at {one:.4g}.")


def test_no_epsilon_is_told_where_there_is_none_or_it_differs_between_victims(tiny_prior):
    plan = plan_of(tiny_prior, mechanisms=("gaussian", "clip:1+laplace"), sigma_grid=(0.1,), victims=("mlp-narrow", "lenet"))
    assert tables.epsilons(plan) == []


def test_why_there_is_no_guarantee_is_told(tiny_prior):
    """And one that grows with the number of parameters is told for each victim."""
    mechanisms = ("none", "gaussian", "clip:0.1", "clip:1+uniform", "clip:1+laplace")
    plan = plan_of(tiny_prior, mechanisms=mechanisms, sigma_grid=(0.1,), victims=("mlp-narrow", "lenet"))
    table = tables.privacy_table(plan)
    for mechanism, sigma, reason in (
        ("none", "0", "none: no noise"),
        ("gaussian", "0.1", "none: no clipping"),
        ("clip:0.1", "0", "none: no noise"),
        ("clip:1+uniform", "0.1", "none: uniform noise"),
    ):
        assert cells(table, [mechanism, "any", sigma])[3].startswith(reason)
    small, large = (float(cells(table, ["clip:1+laplace", victim, "0.1"])[3]) for victim in ("lenet", "mlp-narrow"))
    assert 0 < small < large


def test_the_mean_image_is_scored_as_everybodys_reconstruction(tiny_prior):
    plan = plan_of(tiny_prior, num_images=2)
    for row, image in zip(tables.mean_image_rows(plan), plan.images, strict=True):
        assert row["psnr"] == pytest.approx(float(scores(plan.prior.mean_image, image)["psnr"]), abs=1e-4)
