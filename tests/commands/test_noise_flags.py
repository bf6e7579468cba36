"""Noise levels by flags: what is named runs, of both grids; the default grid where none is named."""

import pytest
from tiny import parsed

from gdiff_jax.auditing import load
from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.errors import ConfigError
from gdiff_jax.mechanisms.text import parse
from gdiff_jax.sweeping import inputs
from gdiff_jax.sweeping.config import DEFAULT_SIGMAS, Noise, SweepConfig
from gdiff_jax.sweeping.trials import make_grid
from gdiff_jax.theory import privacy

CLIPPED = parse("clip:2+gaussian")
SIGMA = privacy.gaussian_noise_multiplier(1.0, 1e-5)  # of epsilon 1, at norm 1


def test_the_levels_are_those_that_are_named():
    assert pytest.approx(3.73, abs=0.01) == SIGMA
    assert Noise().levels(CLIPPED) == DEFAULT_SIGMAS
    assert Noise(sigma_grid=(0.5, 0.1)).levels(CLIPPED) == (0.1, 0.5)
    assert Noise(epsilon_grid=(1.0,)).levels(CLIPPED) == pytest.approx((2 * SIGMA,))
    assert Noise(sigma_grid=(0.5,), epsilon_grid=(1.0,)).levels(CLIPPED) == pytest.approx((0.5, 2 * SIGMA))
    assert Noise(sigma_grid=DEFAULT_SIGMAS, epsilon_grid=(1.0,)).levels(CLIPPED) == pytest.approx((*DEFAULT_SIGMAS, 2 * SIGMA))
    assert Noise().levels(parse("sign")) == Noise(sigma_grid=(0.5,)).levels(parse("sign"), alone=False) == (0.0,)
    with pytest.raises(ConfigError, match="mechanism sign adds no noise; say sign"):
        Noise(sigma_grid=(0.5,)).levels(parse("sign"))
    with pytest.raises(ConfigError, match="an epsilon gives a sigma only where gradients are clipped"):
        Noise(sigma_grid=(0.5,), epsilon_grid=(1.0,)).levels(parse("gaussian"))


def sweep_plan(common, *noise):
    return inputs.load(parsed(SweepConfig(), "--victims=mlp-narrow", "--mechanisms=clip:1+gaussian", *common, *noise))


def audit_plan(common, *noise):
    return load.audit_named(parsed(AuditConfig(), "--victim=mlp-narrow", "--mechanism=clip:1+gaussian", *common, *noise))


@pytest.mark.parametrize("plan_of", [sweep_plan, pytest.param(audit_plan, marks=pytest.mark.long)])
def test_both_commands_run_what_is_named(plan_of, tiny_prior, monkeypatch, tmp_path):
    """An audit once dropped the standard deviations that were named beside epsilons."""
    monkeypatch.chdir(tmp_path)  # the output folder of the default may hold an audit of the user's
    monkeypatch.setattr(load, "run", lambda plan, *rest: plan)
    common = (
        "--methods=dsg",
        "--num_images=1",
        f"--prior={tiny_prior}/prior",
        f"--images={tiny_prior}/images.npz",
        "--steps=2",
    )

    def levels(*noise):
        return sorted({trial.sigma for trial in make_grid(plan_of(common, *noise)) if trial.group.method == "dsg"})

    assert levels("--sigma_grid=0.5", "--epsilon_grid=1") == pytest.approx([0.5, SIGMA])
    assert levels("--epsilon_grid=1") == pytest.approx([SIGMA])
    assert levels() == levels("--sigma_grid") == list(DEFAULT_SIGMAS)
