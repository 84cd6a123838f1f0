"""JSON with a bounded cost: a reader for untrusted input, and the reader and writer of plain reports.

Hashed and signed JSON is read by `strict_json`, which also refuses floats and large integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from mtlsign.errors import ArtifactError

JSON_LIMIT = 2**20
"""Default size limit of a report in bytes."""

MAX_VALUES = 200_000
"""Commas and opening brackets in one document. Each costs about 100 bytes of memory once parsed."""


def parse_bounded_json(data: bytes, *, max_values: int = MAX_VALUES) -> Any:
    """Parse UTF-8 JSON in which no field occurs twice and no number is NaN or infinite.

    The values are counted before parsing, because 32 MB of empty lists take about 1 GB once parsed.

    Args:
        data: the document.
        max_values: upper limit of its commas and opening brackets.

    Raises:
        ValueError: the document is no such JSON, is nested too deeply or has more than `max_values` values.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > max_values:
        raise ValueError(f"more than {max_values} values")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique_fields, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(data: bytes, name: str, *, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Parse a report: a JSON object of at most `limit` bytes.

    Args:
        data: the document.
        name: the file's name, for the error message.
        limit: most bytes.

    Raises:
        ArtifactError: `data` is no such object.
    """
    try:
        value = parse_bounded_json(data, max_values=limit) if len(data) <= limit else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} is not a JSON object of at most {limit} bytes. Fetch the folder again.")
    return value


def serialize_json_object(value: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Return `value` as JSON with sorted fields, at most `JSON_LIMIT` bytes.

    Raises:
        ArtifactError: `value` holds something that JSON cannot hold, or is too large.
    """
    try:
        text = json.dumps(dict(value), sort_keys=True, indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"The value cannot be written as JSON ({error}). Use plain finite values.", field="config"
        ) from None
    data = text.encode() + b"\n"
    if len(data) > JSON_LIMIT:
        raise ArtifactError(
            f"The value is over {JSON_LIMIT} bytes as JSON. Store less in it.", field="config"
        )
    return data


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return `pairs` as a dict, for `json.loads(object_pairs_hook=…)`; raises ValueError for a duplicate."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a duplicate field")
    return fields


def _refuse(_: str) -> NoReturn:
    raise ValueError("a number that is not finite")
