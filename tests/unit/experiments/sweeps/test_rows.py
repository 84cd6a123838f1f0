"""Tests of the rows of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtlsign.errors import ArtifactError
from mtlsign.experiments.sweeps.rows import empty_row, rows_of
from mtlsign.experiments.sweeps.run_folder import varied_settings
from mtlsign.experiments.sweeps.space import Cell
from mtlsign.storage.locations import open_storage


@pytest.mark.parametrize("data", [b'{"status": 3}', b"{}", b"[]", b"{"])
def test_rows_of_damaged_row_raises_artifact_error(tmp_path: Path, data: bytes) -> None:
    folder = open_storage(str(tmp_path))
    folder.write("trials/abc/result.json", data)
    with pytest.raises(ArtifactError, match="damaged"):
        rows_of(folder)


def test_empty_row_of_unfinished_cell_varies_only_in_settings() -> None:
    space = {
        "task": "digits", "width": 8, "phase2.steps": 30, "lambda2": {"grid_search": [0.0, 1.0]}, "seed": 0,
    }  # fmt: skip
    cells = [Cell({**space, "lambda2": value}, None, False) for value in (0.0, 1.0)]
    rows = [empty_row(cells[0], "ok"), empty_row(cells[1], "stopped", "stopped at step 3")]
    assert varied_settings(rows, space) == ["lambda1", "lambda2"]
    assert (rows[1]["lambda2"], rows[1]["phase2.steps"], rows[1]["reason"]) == (1.0, 30, "stopped at step 3")
