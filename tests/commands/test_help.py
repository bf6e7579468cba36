"""--help and answers to wrong flags, of every command."""

import re

import pytest
from tiny import ended

from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands import audit, help, sweep, train_prior, train_victim
from gdiff_jax.commands.processes import Processes
from gdiff_jax.options import flat
from gdiff_jax.sweeping.config import SweepConfig
from gdiff_jax.training.settings import PriorTraining, VictimTraining

COMMANDS = [
    (sweep, [SweepConfig(), Processes()]),
    (audit, [AuditConfig()]),
    (train_prior, [PriorTraining()]),
    (train_victim, [VictimTraining()]),
]
every_command = pytest.mark.parametrize(("command", "settings"), COMMANDS, ids=lambda c: getattr(c, "__name__", ""))


@every_command
def test_help_has_the_usual_flags_first_and_each_once_under_a_subject(command, settings, monkeypatch, capsys):
    assert ended(command, monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  --(?:\[no\])?(\w+)", shown, re.M)
    assert tuple(listed[:5]) == command.USUAL
    assert sorted(listed) == sorted(name for defaults in settings for name in flat(defaults))
    assert f"\n{help.USUAL}:\n  --{listed[0]} " in shown
    assert f"\n{help.OTHER}:" not in shown
    assert max(map(len, shown.partition(help.USUAL)[2].splitlines())) <= 110


def test_the_flags_of_the_libraries_are_in_the_full_help(monkeypatch, capsys):
    assert ended(train_victim, monkeypatch, "--helpfull") == 0
    shown = capsys.readouterr().out
    assert help.USUAL in shown
    assert "--[no]logtostderr" in shown
    assert ended(train_victim, monkeypatch, "-?") == 0
    assert "logtostderr" not in capsys.readouterr().out


@every_command
def test_a_flag_with_two_letters_swapped_is_answered_with_the_right_one(command, settings, monkeypatch, capsys):
    for name in [n for defaults in settings for n in flat(defaults) if len(n) > 3][::5]:  # every fifth, for time
        wrong = f"{name[0]}{name[2]}{name[1]}{name[3:]}"
        if wrong != name:
            assert ended(command, monkeypatch, f"--{wrong}=1") == 2
            (said,) = capsys.readouterr().err.splitlines()
            assert re.search(rf"^error: --{wrong} is not a flag; did you mean (--\w+ or )*--{name}\b", said), said


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("compair", "did you mean compare?"),
        ("images=FOLDER", "did you mean --images=FOLDER?"),
        ("--num-images=3", "--num-images is not a flag; did you mean --num_images?"),
        ("--victims=cnn", "did you mean --victim?"),
        ("--quux=1", "--quux is not a flag (--help lists the flags)"),
    ],
)
def test_a_word_that_is_no_flag_is_answered_with_what_may_be_meant(word, answer, monkeypatch, capsys):
    assert ended(audit, monkeypatch, word) == 2
    assert answer in capsys.readouterr().err
