"""Flags that make a process one of several."""

import pytest

from gdiff_jax.commands.processes import Processes, join
from gdiff_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (dict(coordinator="localhost:1"), "--num_processes"),
        (dict(coordinator="localhost:1", num_processes=2, process_id=2), "is 2"),
        (dict(coordinator="localhost", num_processes=2, process_id=0), "HOST:PORT"),
        (dict(num_processes=2, process_id=0), "--coordinator"),
    ],
)
def test_bad_flags_of_processes(flags, value):
    with pytest.raises(ConfigError, match=value):
        join(Processes(**flags))


def test_without_flags_there_is_nobody_to_join():
    join(Processes())
