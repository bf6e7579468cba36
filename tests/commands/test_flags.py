"""What every command shares: flags made of its settings, errors of one line, an end at once on signals."""

import dataclasses
import errno
import hashlib
import inspect
import signal
import subprocess
import sys

import pytest
from absl import flags as absl_flags
from tiny import ROOT, ended, parsed, run_command, script

from gdiff_jax.commands import flags
from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.options import option
from gdiff_jax.sweeping.attackers import ATTACKERS
from gdiff_jax.sweeping.config import DEFAULT_SIGMAS, SweepConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    grid: tuple[float, ...] = option((), "levels", bare=(0.0, 1.0))
    steps: int = option(3, "how many")
    ends: str = option("", "how it ends")


def main():
    settings = flags.read_flags(Settings())
    print(settings, flush=True)
    if settings.ends == "config":
        raise ConfigError("--grid holds -1;\n  give another")
    if settings.ends == "run":
        raise RunError("the same command goes on")
    if settings.ends == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "a.npz")
    if settings.ends == "file":
        raise PermissionError(errno.EACCES, "Permission denied", "a.npz")
    if settings.ends == "bug":
        raise KeyError("a.npz")
    if settings.ends == "busy":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)  # as in XLA, Python's own handlers would wait for its end


SCRIPT = f"""
import dataclasses, errno, hashlib
from gdiff_jax.commands import flags
from gdiff_jax.errors import ConfigError, RunError
from gdiff_jax.options import option

{inspect.getsource(Settings)}
{inspect.getsource(main)}
flags.define_flags(Settings())
flags.run(main)
"""
SCRIPTED = [sys.executable, "-c", SCRIPT]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--grid=zero"], 2, "'zero' is not a list of float separated by commas (--help lists the flags)"),
        (["--no_such_flag"], 2, "no_such_flag"),
        (["runs/x"], 2, "'runs/x' is not a flag; flags are written --name=value"),
        (["--steps=ten"], 2, "ten"),
        (["--ends=config"], 2, "error: --grid holds -1; give another"),
        (["--ends=run"], 1, "error: the same command goes on"),
        (["--ends=file"], 1, "error: Permission denied at a.npz; what is finished is kept, and the same command goes on"),
        (["--ends=disk"], 1, "error: No space left on device at a.npz; what is finished is kept. Free space and give the same"),
    ],
)
def test_a_command_ends_with_one_line_and_its_code(arguments, code, line, monkeypatch, capsys):
    assert ended(script(Settings(), main), monkeypatch, *arguments) == code
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("error: ")
    assert line in said


def test_so_does_the_process():
    done = run_command([*SCRIPTED, "--ends=run"], cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "error: the same command goes on\n")


def test_an_error_that_nobody_foresaw_is_not_hidden():
    done = run_command([*SCRIPTED, "--ends=bug"], cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_at_once_and_say_how_to_go_on(number):
    process = subprocess.Popen([*SCRIPTED, "--ends=busy"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "busy" in process.stdout.readline()
    process.send_signal(number)
    try:
        assert "the same command goes on" in process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number


def test_a_grid_takes_both_spellings():
    for arguments, expected in (
        (["--sigma_grid"], DEFAULT_SIGMAS),
        (["--sigma_grid=0,1e-3"], (0.0, 1e-3)),
        ([], ()),
    ):
        assert parsed(SweepConfig(), *arguments).noise.sigma_grid == expected


@pytest.mark.parametrize("empty", ["", " ", ","])
def test_a_list_that_a_shell_left_empty_is_not_the_default(empty):
    with pytest.raises(absl_flags.IllegalFlagValueError, match="no value stands after the ="):
        parsed(SweepConfig(), f"--sigma_grid={empty}")


def test_an_empty_text_is_not_the_default_and_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/some")
    with pytest.raises(ConfigError, match="--images: no value stands after the ="):
        parsed(SweepConfig(), "--images=")
    assert parsed(SweepConfig(), "--out=~/runs").run.out == "/home/some/runs"
    assert parsed(SweepConfig()).private.images


@pytest.mark.parametrize("grid", ["0,01", "1,000", "0,1_0", "-0,05"])
def test_a_decimal_comma_is_no_list(grid):
    """0,01 would be sigma 0 and 1."""
    with pytest.raises(absl_flags.IllegalFlagValueError, match="a point their decimals"):
        parsed(SweepConfig(), f"--sigma_grid={grid}")


def test_flags_reach_the_parts_they_stand_in():
    c = parsed(
        SweepConfig(), "--attacker=server", "--labels=known", "--noadaptive", "--victims=mlp, cnn", "--seeds=2", "--tv=0.1"
    )
    assert c.attacker.knowledge.labels == "known"
    assert c.attacker.knowledge.adaptive is False
    assert c.attacker.knowledge.statistics == ATTACKERS["server"].statistics
    assert c.victims.victims == ("mlp", "cnn")
    assert (c.run.seeds, c.attacks.tv) == (2, 0.1)
    assert parsed(SweepConfig()) == SweepConfig()
