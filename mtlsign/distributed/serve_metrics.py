"""Metrics of the verification service for Prometheus, exported by Ray on every node."""

from __future__ import annotations

from typing import Any

from ray.util import metrics as ray_metrics

from mtlsign.service.metrics import METRICS

BOUNDARIES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]


class RayMetrics:
    """Destination of metrics: Ray's counters, gauges and histograms."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        for name, (kind, text, label) in METRICS.items():
            keys = (label,) if label else ()
            if kind == "histogram":
                self._metrics[name] = ray_metrics.Histogram(name, text, boundaries=BOUNDARIES, tag_keys=keys)
            else:
                metric_type = ray_metrics.Counter if kind == "counter" else ray_metrics.Gauge
                self._metrics[name] = metric_type(name, text, tag_keys=keys)

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:
        """Count, observe or set a metric, as its kind requires."""
        kind, _, key = METRICS[name]
        tags = {key: label or "none"} if key else None
        if kind == "counter":
            if value > 0:
                self._metrics[name].inc(value, tags)
        elif kind == "gauge":
            self._metrics[name].set(value, tags)
        else:
            self._metrics[name].observe(value, tags)
