"""The pages' templates, which share their style and the ways to show a table and a figure."""

from __future__ import annotations

import base64
from typing import Any

import jinja2

KINDS = {"svg": "image/svg+xml", "png": "image/png"}


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values, escaped; what it names and is not given is an error."""
    loader = jinja2.PackageLoader("gdiff_jax.auditing", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**values)


def embedded(kind: str, data: bytes) -> str:
    """A figure's file as the address of itself, which a page asks no network for; `kind` is of `KINDS`."""
    return f"data:{KINDS[kind]};base64,{base64.b64encode(data).decode()}"
