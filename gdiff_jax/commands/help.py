"""What --help prints: what the command does, the usual flags first, then all of them by subject."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absl import app, flags

from gdiff_jax import options

USUAL = "The usual flags"
OTHER = "Of this command"  # the subject of settings that name none
COLUMN = 24  # where a flag's help begins


def page(text: str | None, settings: Iterable[Any], usual: tuple[str, ...] = ()) -> str:
    """The text, then each flag of these settings once: the `usual` ones, and the others under the subject of their settings.

    Raises:
      KeyError: where no setting has the name of a usual one.
    """
    named = [(owner, field) for defaults in settings for owner, field in options.leaves(defaults)]
    subject = {field.name: getattr(owner, "subject", OTHER) for owner, field in named}
    subject |= {name: USUAL for name in usual}
    entry = {field.name: _entry(field, getattr(owner, field.name)) for owner, field in named}
    names = [*usual, *[name for name in entry if name not in usual]]
    lines = [as_started(text or "").strip()]  # without docstrings under PYTHONOPTIMIZE=2
    for title in dict.fromkeys(subject[name] for name in names):
        lines += ["", f"{title}:", *[entry[name] for name in names if subject[name] == title]]
    return "\n".join([*lines, "", "--helpfull adds the flags of the libraries, such as those of logging."])


def _entry(field: dataclasses.Field[Any], default: Any) -> str:
    """A flag, with its help and, in brackets, its default beside it."""
    switch = str(field.type).startswith("bool")
    head = f"  --[no]{field.name}" if switch else f"  --{field.name}"
    plain = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    text = field.metadata["help"] + (f" [{plain.lower() if switch else plain}]" if plain and default is not None else "")
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)
    beside = textwrap.wrap(text, width - COLUMN, break_long_words=False, break_on_hyphens=False)
    first = f"{head:<{COLUMN}}" if len(head) < COLUMN else f"{head}\n{' ' * COLUMN}"
    return first + f"\n{' ' * COLUMN}".join(beside)


def as_started(text: str) -> str:
    """The text with commands as this one was started: from a checkout `python experiments/sweep.py` for `gdiff-sweep`."""
    started = Path(sys.argv[0])
    if started.suffix != ".py":
        return text
    return re.sub(r"\bgdiff-([a-z-]+)", lambda name: f"python {started.parent / name[1].replace('-', '_')}.py", text)


class _Help(flags.BooleanFlag):
    """A flag that prints something and ends the process; absl's own says with its exit code that this has failed."""

    def __init__(self, name: str, says: str, text: Callable[[], str], short_name: str | None = None):
        super().__init__(name, False, says, short_name=short_name, allow_override=True)
        self.text = text

    def parse(self, argument: Any) -> None:
        if self._parse(argument):
            print(self.text())
            sys.exit(0)


def install(text: Callable[[], str]) -> None:
    """--help prints this text, and --helpfull the flags of all libraries too; after absl has defined its own."""
    app.define_help_flags()
    flags.DEFINE_flag(_Help("help", "show this help", text, "?"))
    flags.DEFINE_flag(_Help("helpshort", "the same", text))
    flags.DEFINE_flag(_Help("helpfull", "show the flags of the libraries too", lambda: f"{text()}\n{flags.FLAGS.get_help()}"))
