"""Errors that a user reads as one line: what is wrong, with its value, and what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """A value the user gave that cannot be used: a command shows it as one line, exit code 2, nothing written."""


class RunError(RuntimeError):
    """What stopped a run that had begun, and how to go on: exit code 1; what is finished is kept."""


def need(ok: object, message: str) -> None:
    """ConfigError with this message, unless `ok`."""
    if not ok:
        raise ConfigError(message)
