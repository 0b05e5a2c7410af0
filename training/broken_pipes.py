"""Let stdout and stderr outlive whoever reads them."""

import io
import os
import sys
from typing import Any

STDERR = 2  # its descriptor: sys.stderr may be something else


class _Lasting(io.FileIO):
    """A descriptor that drops what it cannot write: the pipe or terminal behind it is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def ignore_broken_pipes() -> None:
    """Let a run go on when its output ends (`| head`, a killed tee, a closed terminal).

    Its steps and how it ended are in the run folder too. For main programs only: this replaces
    sys.stdout and sys.stderr.
    """
    # A descriptor that is closed from the start must not become another file's.
    while os.open(os.devnull, os.O_RDWR) <= STDERR:
        pass
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is not None:  # None: closed from the start
            raw = io.BufferedWriter(_Lasting(old.fileno(), "w", closefd=False))
            is_by_line = old.line_buffering or name == "stderr"
            setattr(sys, name, io.TextIOWrapper(raw, old.encoding, old.errors, None, is_by_line))
