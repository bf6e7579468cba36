"""Writes docs/messages.md anew: `python docs/messages.py`. A page of what the tool can say, found in the code that says it."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "messages.md"
ERRORS = ("ConfigError", "RunError", "ValueError", "TypeError", "FileNotFoundError")
MARK = "<!-- below: made by docs/messages.py -->"
# Where a reader looks, and the rooms of the house that speak of it.
SECTIONS = {
    "Commands, flags, folders": ("commands", "options", "errors", "files", "numerics"),
    "Images and labels": ("images", "training"),
    "Models, weights and saved gradients": ("victims", "tensor_files", "matching", "modules", "pytrees", "algebra", "auto"),
    "Priors": ("priors", "schedule"),
    "Mechanisms and privacy": ("mechanisms", "federated", "theory"),
    "Attacks": ("methods", "attacks", "samplers", "signal", "problem"),
    "Sweeps": ("sweeping",),
    "Audits": ("auditing",),
    "Everywhere else": (),
}


def text_of(node: ast.expr) -> str:
    """A message as it is written in the code, three dots in the place of a value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body)
    return "..."


def _message(node: ast.AST) -> ast.expr | None:
    """What a call of `need`, or a raised error, says."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        called, place = node.exc, 0
        known = ERRORS
    elif isinstance(node, ast.Call):
        called, place, known = node, 1, ("need",)
    else:
        return None
    name = getattr(called.func, "id", getattr(called.func, "attr", ""))
    return called.args[place] if name in known and len(called.args) > place else None


def messages(path: Path) -> list[str]:
    """Those of a file."""
    said = map(_message, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    texts = [" ".join(text_of(message).split()) for message in said if message is not None]
    return [text for text in texts if len(text.replace("...", "").split()) > 2]


def everything(path: Path) -> str:
    """All text that a file can put together, a line each."""
    texts = map(text_of, (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.expr)))
    return "\n".join(" ".join(text.split()) for text in texts)


def generated() -> str:
    """The part of the page that is found in the code."""
    package = ROOT / "gdiff_jax"
    rooms: dict[str, set[str]] = collections.defaultdict(set)
    for path in package.rglob("*.py"):
        rooms[path.relative_to(package).with_suffix("").parts[0]].update(messages(path))
    placed = {room for some in SECTIONS.values() for room in some}
    lines = []
    for title, some in SECTIONS.items():
        texts = {text for room in (some or rooms.keys() - placed) for text in rooms[room]}
        if texts:
            lines += [f"## {title}", "", *[f"- `{text.replace('`', chr(39))}`" for text in sorted(texts)], ""]
    return "\n".join(lines)


def page() -> str:
    head = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    return f"{head}{MARK}\n\n{generated()}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
