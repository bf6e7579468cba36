"""How figures are drawn, wherever and by whomever: as they are designed, without a window, shown by a notebook."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter


class Drawing(Figure):
    """A figure that is not pyplot's, as a library opens no windows, and that a notebook shows all the same."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()


@contextlib.contextmanager
def house_style(style: Any = None) -> Iterator[None]:
    """matplotlib's defaults and this style, whatever a matplotlibrc says: it may ask for LaTeX, which is not there.

    A name with two dollars in it, such as that of a file, is text and no formula.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style or {})
        matplotlib.rcParams["text.parse_math"] = False
        yield


def logarithmic(ax: Axes, which: str) -> None:
    """Makes the x or y axis logarithmic, its ticks numbers: matplotlib's are formulas, which `house_style` shows as text."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    ax.set(**{f"{which}scale": "log"})
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())
