"""Fixtures of the sweep tests: the tiny task in the role of `digits`."""

from __future__ import annotations

import pytest

from mtlsign.tasks import Task


@pytest.fixture(autouse=True)
def _tiny_digits(monkeypatch: pytest.MonkeyPatch, tiny_task: Task) -> None:
    """Replace `digits` by the tiny task, for cells and for the attacks on them."""
    for module in (
        "experiments.sweeps.cell",
        "experiments.sweeps.backend",
        "experiments.attack_runs.target",
        "watermark.embedding.pipeline",
    ):
        monkeypatch.setattr(f"mtlsign.{module}.load_task", lambda *_, **__: tiny_task)
