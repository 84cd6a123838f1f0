"""Tests of the log lines of sweep backends."""

from __future__ import annotations

import pytest

from mtlsign.errors import SettingsError
from mtlsign.experiments.sweeps.backend import LocalSweepBackend, format_cell
from tests.unit.experiments.sweeps.helpers import tiny_sweep


def test_format_cell_uses_row_or_config_of_stopped_cell() -> None:
    assert format_cell(None, {"lambda1": "0.02"}) == "lambda1 0.02 · stopped early"
    row = {"lambda1": 0.02, "lambda2": 1.0, "status": "failed", "reason": "reason"}
    assert format_cell(row, {"lambda1": "0.02"}) == "lambda1 0.02, lambda2 1.0 · failed: reason"


@pytest.mark.parametrize(
    ("changes", "space", "field"),
    [({"scheduler": "asha"}, {}, "scheduler"), ({}, {"lambda1": object()}, "space")],
)
def test_local_backend_preflight_refuses_settings_that_need_ray_tune(
    changes: dict[str, str], space: dict[str, object], field: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        LocalSweepBackend().preflight(tiny_sweep(**changes), space)
    assert caught.value.field == field and "--workers 0" in caught.value.detail
