"""Terminal output of the jobs: live progress line, two-column table, JSON document."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

#: Columns of a terminal that does not state its width.
_WIDTH = 80


class LiveLine:
    """Progress line on stderr, rewritten in place; without a terminal, one line every `every` seconds."""

    def __init__(self, *, quiet: bool = False, every: float = 10.0) -> None:
        self._quiet, self._every = quiet, every
        self._tty = sys.stderr.isatty()
        self._last, self._width = 0.0, 0

    def show(self, text: str, *, final: bool = False) -> None:
        """Replace the line by `text`; `final` ends the line."""
        if self._quiet:
            return
        now = time.monotonic()
        if self._tty:
            width = (os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH) - 1
            line = text if final else text[:width]
            print("\r" + line.ljust(self._width), end="\n" if final else "", file=sys.stderr, flush=True)
            self._width = 0 if final else len(line)
        elif final or now - self._last >= self._every:
            print(text, file=sys.stderr, flush=True)
            self._last = now

    def log(self, text: str) -> None:
        """Print a separate line, which later progress does not overwrite."""
        if not self._quiet:
            if self._tty and self._width:
                print(file=sys.stderr)
                self._width = 0
            print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Format rows as two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)


def print_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    print(json.dumps(value, indent=1, sort_keys=False, allow_nan=False), flush=True)
