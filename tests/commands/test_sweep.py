"""The sweep as a user meets it: a command, its output folder, its errors."""

import os
import shutil

import dp_accounting
import pytest
from tiny import attacks_of, command, command_of, config, ended, once, read_records, run_command

from gdiff_jax.commands import sweep


@pytest.fixture(scope="module")
def by_command(tiny_prior, tmp_path_factory):
    """What the command left and said, where it was asked for an epsilon without sigmas."""

    def make(out):
        flags = [f"--prior={tiny_prior}/prior", f"--images={tiny_prior}/images.npz", "--num_images=1", "--steps=2"]
        flags += ["--victims=mlp-narrow", "--methods=analytic", "--epsilon_grid=10", "--mechanisms=clip:1+gaussian"]
        done = run_command([*command_of("sweep.py"), *flags, f"--out={out}"])
        assert done.returncode == 0, done.stderr[-2000:]
        (out / "said").write_text(done.stdout)

    return once(tmp_path_factory, "by-command", make)


def test_the_command_takes_epsilons_alone(by_command):
    """`--epsilon_grid` without `--sigma_grid` means no other noise levels."""
    rows = read_records(by_command)
    assert [r["sigma"] for r in attacks_of(rows)] == [pytest.approx(dp_accounting.get_sigma_gaussian(10, 1e-5))]


def test_the_command_says_what_it_leaves(by_command):
    said = (by_command / "said").read_text()
    assert said.startswith(f"2 trials, 0 done before, on 1 cpu; output in {by_command}\n")
    assert "\nMedian PSNR in dB over 1 images x 1 seeds of " in said
    assert "\nEpsilon of clip:1+gaussian, one release, delta 1e-05: 10 at 0.4999.\n" in said
    last = said.splitlines()[-1]
    assert last.startswith(f"In {by_command}: summary.md ")
    for name in ("summary.md", "quality.png", "contact_sheet.png"):
        assert (by_command / name).stat().st_size > 0
        assert name in last


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--sigma_grid=0,-1"], "-1"),
        (["--steps=ten"], "ten"),
        (["--sigma_grid=zero"], "zero"),
        (["--no_such_flag"], "no_such_flag"),
        (["runs/x"], "runs/x"),
    ],
)
def test_the_command_ends_bad_input_with_one_line_and_code_2(tmp_path, arguments, value, monkeypatch, capsys):
    out = tmp_path / "out"
    assert ended(sweep, monkeypatch, f"--out={out}", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert value in lines[0]
    assert not out.exists()


@pytest.mark.long
def test_batched_linear_algebra_does_not_wait_for_ever(tiny_prior, tmp_path):
    """Two devices of a CPU that both call LAPACK with a batch from within XLA's pool of two threads would."""
    c = config(tiny_prior, tmp_path / "out", methods=("analytic",), num_images=6, batch=6)
    for _ in range(2):
        done = run_command(command(c), timeout=300, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"})
        assert done.returncode == 0, done.stderr[-2000:]
        shutil.rmtree(tmp_path / "out")
