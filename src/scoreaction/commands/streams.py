"""Streams of a process that outlive their reader."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


class Unread(io.FileIO):
    """A stream that drops what is written to a pipe without a reader or to a lost terminal: a run goes on without them."""

    def write(self, data: Any) -> int:
        """Writes data, or drops it; the number of bytes."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(data).nbytes


def forgive(name: str) -> None:
    """Makes the process's own stream of this name one that no letter that it cannot show and no lost reader makes fail."""
    stream = getattr(sys, name)
    if not isinstance(stream, io.TextIOWrapper):
        return
    if stream is getattr(sys, f"__{name}__") and os.name == "posix":
        raw = Unread(stream.fileno(), "w", closefd=False)
        often = stream.line_buffering or stream.write_through
        stream = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, line_buffering=often)
        setattr(sys, name, stream)
    stream.reconfigure(errors="replace")
