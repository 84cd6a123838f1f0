"""Tests of strict JSON for hashed and signed documents."""

from __future__ import annotations

import pytest

from mtlsign.errors import FormatError, KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json, require_fields, require_hex


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a":1,"a":1}', "a field twice"),
        (b"[1.0]", "not an integer"),
        (b"[NaN]", "not an integer"),
        (b"[-0]", "-0 or outside 64 bits"),
        (b"[9223372036854775808]", "outside 64 bits"),
        (b"[" + b"1" * 30 + b"]", "outside 64 bits"),
        ("\ufeff{}".encode(), "byte order mark"),
        (b"\xff", "not UTF-8 JSON"),
        (b"{", "not UTF-8 JSON"),
        (b"[" * 65, "more than 64 brackets"),
        (b" " * 200, "over 100 bytes"),
    ],
)
def test_parse_strict_json_ambiguous_document_raises_key_material_error(data: bytes, problem: str) -> None:
    with pytest.raises(KeyMaterialError, match=rf"^spec: .*{problem}.*\.$"):
        parse_strict_json(data, limit=100, where="spec")


def test_parse_strict_json_error_quotes_no_data() -> None:
    with pytest.raises(KeyMaterialError) as caught:
        parse_strict_json(b'{"secret": hush}', limit=100, where="spec")
    assert "hush" not in str(caught.value)


def test_parse_strict_json_limits_are_inclusive() -> None:
    assert parse_strict_json(b"[-9223372036854775808,9223372036854775807]", limit=42, where="x") == [
        -(2**63),
        2**63 - 1,
    ]
    assert parse_strict_json(b"[[],[]]", limit=9, where="x", max_brackets=3) == [[], []]
    with pytest.raises(KeyMaterialError, match="more than 2 brackets"):
        parse_strict_json(b"[[],[]]", limit=9, where="x", max_brackets=2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "head: The value must be an object"),
        ({"a": 1}, "head.b: The field is missing"),
        ({"a": 1, "b": 2, "c": 3}, "head: The object has the unknown field 'c'"),
    ],
)
def test_require_fields_other_fields_raise_format_error(value: object, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        require_fields(value, "head", "a", "b")
    assert str(caught.value).startswith(f"{message}. ")
    assert message.endswith(caught.value.problem)


@pytest.mark.parametrize("value", ["", "AB", "0g", "abc", 12, "abcd"])
def test_require_hex_other_values_raise_format_error(value: object) -> None:
    with pytest.raises(FormatError, match="2 lower-case hexadecimal digits"):
        require_hex(value, "nonce", 1)
    assert require_hex("ab", "nonce", 1) == b"\xab"
