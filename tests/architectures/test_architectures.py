"""Slow test: `uv run --dev --extra architectures pytest -m slow tests/architectures -n 0`.

Each architecture is marked, and its files are verified by another process. With `ARCHITECTURES_TABLE=FILE`
the rows are appended to a file, one JSON object a line, from which `write_table.py` makes the result folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architectures.measurement import Row, Verifier, as_record, measure
from tests.architectures.zoo import ZOO

pytestmark = pytest.mark.slow
_LIBRARIES = {"smp": "segmentation_models_pytorch"}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    process = Verifier()
    yield process
    process.close()


@pytest.mark.parametrize("name", ZOO)
def test_architecture_gives_equal_bits_in_every_file_or_one_refusal(
    name: str, verifier: Verifier, tmp_path: Path
) -> None:
    library = name.partition("/")[0]
    reason = (
        f"{library} is missing: uv run --dev --extra architectures pytest -m slow tests/architectures -n 0"
    )
    pytest.importorskip(_LIBRARIES.get(library, library), reason=reason)
    row = measure(name, tmp_path, verifier)
    _append(row)
    expected = ZOO[name].refusal
    if expected is not None:
        assert expected in row.refusal and "\n" not in row.refusal
        return
    assert not row.refusal
    assert row.embedded is not None and row.embedded >= 115
    assert row.file == row.bf16 == row.prefixed == row.embedded


def _append(row: Row) -> None:
    path = os.environ.get("ARCHITECTURES_TABLE")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_record(row)) + "\n")
