"""Settings of several parts: reached by the names of their fields, which are one set."""

import dataclasses

import pytest

from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands.processes import Processes
from gdiff_jax.options import flat, leaves, option, replace
from gdiff_jax.sweeping.config import SweepConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = option(1, "how deep")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    width: float = option(2.0, "how wide")


def test_fields_are_reached_wherever_they_stand():
    assert flat(Outer()) == {"depth": 1, "width": 2.0}
    changed = replace(Outer(), depth=5)
    assert changed == Outer(Inner(5), 2.0)
    assert replace(changed, width=3.0) == Outer(Inner(5), 3.0)
    with pytest.raises(TypeError, match="Outer has no option height"):
        replace(Outer(), height=1)


@pytest.mark.parametrize("config", [SweepConfig(), AuditConfig(), Processes()], ids=lambda c: type(c).__name__)
def test_the_settings_of_a_command_have_each_name_once_and_a_help(config):
    names = [field.name for _, field in leaves(config)]
    assert len(set(names)) == len(names)
    assert all(field.metadata["help"] for _, field in leaves(config))


def test_no_part_is_large():
    """A function takes the part it needs; nobody holds all of them."""
    for config in (SweepConfig(), AuditConfig()):
        parts = [getattr(config, f.name) for f in dataclasses.fields(config)]
        own = [p for p in parts if not dataclasses.is_dataclass(p)]
        assert len(own) <= 3
        assert max(len(dataclasses.fields(p)) for p in parts if dataclasses.is_dataclass(p)) <= 14
