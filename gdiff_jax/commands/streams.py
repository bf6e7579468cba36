"""Standard streams that stop no run: whose reader went away or disk is full, that were closed, or that lack a character."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


class _Unheard(io.FileIO):
    """A file that goes on without its reader or its disk: `| head` leaves after a line, and the work of hours goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def steady() -> None:
    """Makes stdout and stderr of this process steady; characters that their encoding lacks are escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its number, and what is printed would go into it
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not where somebody captures it
            setattr(sys, name, _steady(stream, number))


def _steady(stream: TextIO | None, number: int) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        stream.flush()
        encoding, at_once, by_line = stream.encoding, stream.write_through, stream.line_buffering
    else:
        encoding, at_once, by_line = "utf-8", False, True
    binary = io.BufferedWriter(_Unheard(number, "wb", closefd=False))
    return io.TextIOWrapper(binary, encoding, "backslashreplace", line_buffering=by_line, write_through=at_once)
