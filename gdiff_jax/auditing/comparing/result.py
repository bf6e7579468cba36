"""Two audits or more beside each other: of defences, training states or architectures, on the same images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gdiff_jax.auditing.comparing import words
from gdiff_jax.auditing.comparing.pairs import Paired, pair
from gdiff_jax.auditing.record import AuditRecord
from gdiff_jax.auditing.result import Audit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Paired):
    """What `compare` found: `differences` holds the numbers, `text` says them, `report(folder)` writes a page of them."""

    @property
    def text(self) -> str:
        """The answer in a few sentences, with intervals."""
        return " ".join(words.verdict(self))

    def warnings(self) -> list[str]:
        """Signs that the comparison may mislead."""
        return words.warnings(self)

    def plot(self) -> Figure:
        """PSNR over the noise of each audit, and the paired differences to the first; a notebook shows the figure."""
        from gdiff_jax.auditing.comparing import figures  # with matplotlib: who draws nothing does not wait for it

        return figures.overview(self)

    def report(self, folder: str | Path) -> Path:
        """Writes compare.html (self-contained), compare.md, compare.json, compare.csv and figures; returns the page."""
        from gdiff_jax.auditing.comparing import page

        return page.write(self, Path(folder))

    def __repr__(self) -> str:
        return f"<Comparison: {self.text}>"

    def _repr_html_(self) -> str:
        from gdiff_jax.auditing.comparing import page

        return page.to_html(self)


def compare(*audits: AuditRecord, names: Sequence[str] = ()) -> Comparison:
    """By how much audits differ, pair by pair: what comes back of the same images, with the same seeds, at the same noise.

    Each is held against the first. Of all audits the images and seeds that all have are taken, of levels of noise those that an
    audit has in common with the first.

    Args:
      audits: two or more, such as of `gdiff_jax.audit` or `Audit.load`.
      names: what to call them; "audit 1", "audit 2", ... without.

    Raises:
      ValueError: where there is nothing to compare, with the reason and the remedy: fewer than two audits, gradients without
        images, no image in common, or none that can be told to be the same, no level of noise in common.
    """
    paths = [str(audit) for audit in audits if isinstance(audit, str | os.PathLike)]
    if paths:
        raise ValueError(f"compare takes audits, not their folders: compare(Audit.load({paths[0] + '/audit.json'!r}), ...)")
    found = pair(audits, names or [f"audit {k + 1}" for k in range(len(audits))])
    return Comparison(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


def compare_named(paths: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Of the folders of audits, or their audit.json.

    Raises:
      ValueError: as `compare`, and where a path holds no audit.json.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} audits to compare; name two or more folders, such as compare runs/a runs/b")
    audits = [Audit.load(_file(Path(path))) for path in paths]
    return compare(*audits, names=_names([Path(path) for path in paths]))


def _file(path: Path) -> Path:
    """The audit.json of a folder.

    Raises:
      ValueError: where it has none; an audit that has not come to its first page is one of these.
    """
    if not path.is_dir():
        return path
    if not (path / "audit.json").exists():
        begun = "; the audit there has not finished its first attacks" if (path / "sweep").is_dir() else ""
        raise ValueError(f"{path} holds no audit.json{begun}; name the folder of an audit, or its audit.json")
    return path / "audit.json"


def _names(paths: list[Path]) -> list[str]:
    """Of the folders the last parts, as many as tell them apart."""
    folders = [Path(os.path.abspath(path.parent if path.name == "audit.json" else path)) for path in paths]
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [str(Path(*folder.parts[-count:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{', '.join(map(str, paths))}: the same audit twice; name two or more different ones")
