"""Settings as small frozen dataclasses: a function takes the one it needs, commands are made of several, flags of all.

A field is made by `option`, with its help. A dataclass may hold others: together their fields have one set of names, those of
the flags, by which `flat` and `replace` reach them. The class variable `subject` is what --help lists its own fields under.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, bare: Any = None) -> Any:
    """A field that becomes a flag with this help; `bare` is what the flag means where it stands without a value."""
    return dataclasses.field(default=default, metadata={"help": help, "bare": bare})


def leaves(config: Any) -> Iterator[tuple[Any, dataclasses.Field[Any]]]:
    """Each field made by `option`, of the dataclass and those that it holds, with the dataclass whose it is."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value)
        else:
            yield config, field


def flat(config: Any) -> dict[str, Any]:
    """The value of each field by its name, wherever it stands."""
    return {field.name: getattr(owner, field.name) for owner, field in leaves(config)}


def replace(config: T, /, **values: Any) -> T:
    """`config` with these fields replaced, wherever they stand.

    Raises:
      TypeError: naming a field that is not there.
    """
    unknown = values.keys() - flat(config).keys()
    if unknown:
        raise TypeError(f"{type(config).__name__} has no option {', '.join(sorted(unknown))}")
    return _replaced(config, values)


def _replaced(config: Any, values: dict[str, Any]) -> Any:
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _replaced(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(config, **changes)
