"""Rows as files that other tools read: CSV for people, Parquet with types."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """RFC 4180 but for plain line feeds: a header, empty for None, true and false in lower case."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(column) for column in columns)
        writer.writerow([str(v).lower() if isinstance(v, bool) else "" if v is None else v for v in values])
    return buffer.getvalue().encode()


def parquet_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """The same rows as one Parquet file; a column's type is that of its values, text where they differ."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {column: _array(pa, [row.get(column) for row in rows]) for column in columns}
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer)
    return buffer.getvalue()


def _array(pa: Any, values: list[Any]) -> Any:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int}:
        return pa.array(values, pa.int64())
    if kinds and kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array([None if v is None else str(v) for v in values], pa.string())
