"""What pages share: templates with one style, tables, figures within the page, and files that are written whole."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from gdiff_jax.files import write_atomic

Table = dict[str, list[Any]]
KINDS = {"svg": "image/svg+xml", "png": "image/png"}


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values, escaped; what it names and is not given is an error."""
    loader = jinja2.PackageLoader("gdiff_jax.auditing", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**values)


def embedded(kind: str, data: bytes) -> str:
    """A figure's file as the address of itself, which a page asks no network for; `kind` is of `KINDS`."""
    return f"data:{KINDS[kind]};base64,{base64.b64encode(data).decode()}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """As the templates' `grid` takes it."""
    return {"head": list(head), "rows": [list(r) for r in rows]}


def write_files(folder: Path, texts: Mapping[str, str], figures: Mapping[str, bytes]) -> None:
    """Writes texts into a folder and figures into figures/ of it, each file whole or not at all; the last text comes last."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = {f"figures/{name}": data for name, data in figures.items()} | {name: text.encode() for name, text in texts.items()}
    for name, data in files.items():
        write_atomic(folder / name, functools.partial(_put, data))


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)
