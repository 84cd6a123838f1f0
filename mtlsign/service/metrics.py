"""Metrics and structured log events of the service. `mtlsign.distributed` exports them to Prometheus."""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections import defaultdict
from typing import Any, Protocol

#: name → (kind, description, label)
METRICS: dict[str, tuple[str, str, str]] = {
    "mtlsign_claims": ("counter", "Claims accepted into the queue", ""),
    "mtlsign_answers": ("counter", "Claims answered", "status"),
    "mtlsign_refusals": ("counter", "Requests and claims refused", "reason"),
    "mtlsign_stage_seconds": ("histogram", "Seconds by stage of a verification task", "stage"),
    "mtlsign_request_seconds": ("histogram", "Seconds from request to last answer", ""),
    "mtlsign_cache": ("counter", "Verification tasks by cache result of their model", "hit"),
    "mtlsign_retries": ("counter", "Claims retried after a verifier crashed", ""),
    "mtlsign_waiting": ("gauge", "Claims waiting", ""),
}


class Metrics(Protocol):
    """Destination of metrics. Labels come from closed lists, never from a request."""

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:
        """Count, observe or set `value` of the metric `name`, as its kind in `METRICS` requires."""


class InMemoryMetrics:
    """Metrics of this process: sums by (name, label)."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:  # noqa: D102
        if name not in METRICS:
            raise KeyError(name)
        with self._lock:
            self.sums[name, label] += value


_log = logging.getLogger("mtlsign.service")


def configure_logging() -> logging.Logger:
    """Write events to standard error, one line each; Ray stores it as the log of this process."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.propagate = False
        _log.setLevel(logging.INFO)
    return _log


def log_exception(name: str, error: BaseException) -> None:
    """Log an unexpected exception: its type and stack, never its text, which may contain a secret."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    log_event(name, error=type(error).__name__, at=[f"{f.filename}:{f.lineno} {f.name}" for f in frames])


def log_event(name: str, **fields: Any) -> None:
    """Log one event as a JSON line. Callers pass ids and counts, never tokens, keys or locations."""
    line = {"event": name, **{k: v for k, v in fields.items() if v is not None}}
    _log.info(json.dumps(line, sort_keys=True, default=str), extra={"mtlsign": line})
