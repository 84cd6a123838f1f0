"""Origin of a result: the fields of `result.json` that reports show."""

from __future__ import annotations

import shlex
import time
from typing import Any

from mtlsign._version import __version__
from mtlsign.config.mixins import RunStorage


def origin(command: str, settings: RunStorage) -> dict[str, Any]:
    """Return the date, the version, and the command that repeats the run.

    Args:
        command: name of the command.
        settings: settings of the run.
    """
    flags = settings.flags(without={*settings.resumable, "run"})
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "mtlsign": __version__,
        "command": shlex.join(["mtlsign", command, *flags]),
    }
