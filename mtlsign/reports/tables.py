"""Tables as files: CSV for people and spreadsheets, Parquet with typed columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

_NO_TYPES: Mapping[str, str] = {}


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Write rows as CSV (RFC 4180 with plain line feeds): a header, None as empty, booleans in lower case."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(column) for column in columns)
        writer.writerow([str(v).lower() if isinstance(v, bool) else "" if v is None else v for v in values])
    return buffer.getvalue().encode()


def parquet_of(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], types: Mapping[str, str] = _NO_TYPES
) -> bytes:
    """Write rows as one Parquet file.

    Args:
        rows: the rows; a missing value is null.
        columns: names of the columns, in order.
        types: column -> Arrow type (``string``, ``int64``, ``double``, ``bool``). The type of any other
            column follows from its values: text where they differ in type.

    Returns:
        The file's bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        name = types.get(column) or _type_of(values)
        if column not in types and name in ("double", "string"):
            convert = float if name == "double" else str
            values = [None if value is None else convert(value) for value in values]
        arrays[column] = pa.array(values, pa.type_for_alias(name))
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer)
    return buffer.getvalue()


def _type_of(values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int64"
    return "double" if kinds and kinds <= {int, float} else "string"
