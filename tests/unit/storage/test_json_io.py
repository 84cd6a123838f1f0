"""Tests of JSON with a bounded cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import ArtifactError
from mtlsign.storage.json_io import JSON_LIMIT, parse_bounded_json, read_json_object, serialize_json_object


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff", b'{"a":1,"a":2}', b"[NaN]", b"[Infinity]", b"[" * 100_000, b"1" * 9999,
        "\ufeff{}".encode(),
    ],
)  # fmt: skip
def test_parse_bounded_json_invalid_document_raises_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_bounded_json(data)


def test_parse_bounded_json_counts_values_before_parsing() -> None:
    assert parse_bounded_json(b"[[],[],[]]", max_values=6) == [[], [], []]
    with pytest.raises(ValueError, match="more than 5 values"):
        parse_bounded_json(b"[[],[],[]]", max_values=5)


@pytest.mark.parametrize("data", [b"[]", b"null", b"{", b'{"a":1,"a":2}', b"{}" + b" " * JSON_LIMIT])
def test_read_json_object_of_anything_else_raises_artifact_error(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"^info.json is not a JSON object"):
        read_json_object(data, "info.json")


@given(
    st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())
    )
)
def test_read_json_object_returns_serialized_object(value: dict[str, Any]) -> None:
    data = serialize_json_object(value)
    assert read_json_object(data, "x") == value
    assert list(json.loads(data)) == sorted(value) and data.endswith(b"\n")


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": b""}, {"a": "x" * JSON_LIMIT}])
def test_serialize_json_object_unsuitable_value_raises_artifact_error(value: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"^config: "):
        serialize_json_object(value)
