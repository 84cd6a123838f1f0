"""Tests of specs: hostile bytes only ever raise KeyMaterialError."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.errors import KeyMaterialError
from mtlsign.watermark.keys.spec import Spec, decimal_digits, m_bits, make_spec, parse_spec
from tests.unit.watermark.keys.examples import FIELDS, SPEC, changed


def test_parse_spec_returns_fields_and_exact_bytes() -> None:
    spec = parse_spec(SPEC)
    assert (spec.raw, spec.n, spec.name, spec.taps) == (SPEC, 600, "王's model", ("layer1",))
    assert (
        spec.architecture == FIELDS["architecture"] and spec.carrier.digits == 10 and spec.head.hidden is None
    )
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert FIELDS["nonce"] not in repr(spec) and "raw" not in repr(spec)
    spaced = b" \n" + json.dumps(FIELDS, indent=3).encode() + b"\n"
    assert parse_spec(spaced).raw == spaced
    free = parse_spec(changed("head", {"kind": "free", "hidden": 64, "features": "pooled"})).head
    assert (free.kind, free.hidden, free.features) == ("free", 64, "pooled")


def test_make_spec_draws_new_nonce_and_refuses_invalid_fields() -> None:
    chosen = set(FIELDS) - {"nonce", "format", "readouts", "normalise"}
    rest = {name: FIELDS[name] for name in chosen}
    one, two = parse_spec(make_spec(**rest)), parse_spec(make_spec(**rest))
    assert one.nonce != two.nonce and one.normalise == "key-batch"
    for bad in ({"n": 1.5}, {"extra": 1}, {"name": object()}, {"name": "\ud800"}, {"n": float("nan")}):
        with pytest.raises(KeyMaterialError):
            make_spec(**(rest | bad))
    with pytest.raises(KeyMaterialError, match="missing"):
        make_spec(name="x")


@pytest.mark.parametrize(("n", "m", "digits"), [
    (128, 21, 7), (129, 24, 8), (256, 24, 8), (257, 27, 9), (600, 30, 10), (1024, 30, 10), (1025, 33, 10),
    (4096, 36, 11),
])  # fmt: skip
def test_integer_width_and_digits_follow_key_size(n: int, m: int, digits: int) -> None:
    assert (m_bits(n), decimal_digits(n)) == (m, digits)


@pytest.mark.parametrize(("path", "value"), [
    ("format", "mtlsign/v2"), ("format", 1), ("name", ""), ("name", "x" * 129), ("name", "a\nb"),
    ("name", "\ud800"),
    ("name", "a\u202eb"), ("name", "a\u200bb"), ("nonce", "AB" * 32), ("nonce", "ab" * 31),
    ("nonce", "zz" * 32),
    ("nonce", "\u0661" * 64), ("n", 127), ("n", 4097), ("n", True), ("n", "600"), ("n", 600.0), ("n", None),
    ("n", 2**70), ("readouts", 2), ("readouts", True), ("carrier", []), ("carrier.kind", "words"),
    ("carrier.digits", 9), ("carrier.mask", False), ("carrier.mask", 1), ("carrier.level", "L"),
    ("carrier.channels", 0), ("carrier.channels", 17), ("carrier.height", 20), ("carrier.width", 1025),
    ("carrier.module", 0), ("carrier.module", 2), ("carrier.pad", 2), ("carrier.pad", True),
    ("carrier.std_milli", 0), ("carrier.mean_milli", 10**7), ("carrier.extra", 1), ("taps", []),
    ("taps", "layer1"),
    ("taps", ["a"] * 2), ("taps", [1]), ("taps", ["a/b"]), ("taps", ["a\n"]), ("taps", ["x" * 201]),
    ("taps", [str(i) for i in range(17)]), ("head", "keyed"), ("head.kind", "other"), ("head.hidden", 3),
    ("head", {"kind": "free", "hidden": 0, "features": "flat"}), ("head", {"kind": "free", "hidden": 8}),
    ("head", {"kind": ["free"]}), ("statistic", "sum"), ("statistic", ["count"]), ("normalise", "none"),
    ("architecture", {}), ("architecture", {"arch": ""}), ("architecture.arch", "a b"),
    ("architecture.width", True), ("architecture.width", 1.0), ("architecture.width", None),
    ("architecture.width", [1]), ("architecture.stem", "x" * 129), ("architecture.Bad", 1),
    ("reference", "cd"), ("architecture", {"arch": "a"} | {f"f{i}": i for i in range(32)}),
    ("architecture.width", 2**63), ("unknown", 1),
])  # fmt: skip
def test_parse_spec_refuses_values_outside_limits(path: str, value: object) -> None:
    with pytest.raises(KeyMaterialError):
        parse_spec(changed(path, value))


KEYED = {"head": {"kind": "keyed"}, "taps": ["layer1"], "n": 600}
SPREAD = {"head": {"kind": "spread"}, "taps": ["layer4"], "n": 4096}


def test_parse_spec_of_one_readout_has_no_further_ones() -> None:
    spec = parse_spec(SPEC)
    assert spec.further_readouts == () and spec.total_bits == 600 and not spec.has_trained_head
    (only,) = spec.readouts
    assert (only.head, only.taps, only.n) == (spec.head, spec.taps, spec.n)


def test_parse_spec_returns_further_readouts_in_order() -> None:
    spec = parse_spec(changed("readouts", [SPREAD, KEYED]))
    assert [(r.head.kind, r.taps, r.n) for r in spec.readouts] == [
        ("keyed", ("layer1",), 600), ("spread", ("layer4",), 4096), ("keyed", ("layer1",), 600),
    ]  # fmt: skip
    assert spec.total_bits == 600 + 4096 + 600 and spec.n == 600 and not spec.has_trained_head
    assert pickle.loads(pickle.dumps(spec)) == spec and spec != parse_spec(SPEC)
    assert len(parse_spec(changed("readouts", [KEYED] * 3)).readouts) == 4
    head = parse_spec(changed("head", {"kind": "spread"})).head
    assert (head.kind, head.hidden, head.features) == ("spread", None, None)
    free = json.loads(changed("head", {"kind": "free", "hidden": 8, "features": "flat"}))
    trained = parse_spec(json.dumps(free | {"readouts": [SPREAD]}).encode())
    assert trained.has_trained_head and trained.total_bits == 4696


@pytest.mark.parametrize("value", [
    0, 2, -1, True, 1.0, "1", None, {}, KEYED, [], [KEYED] * 4, [1], [None], [[KEYED]],
    [KEYED | {"head": {"kind": "free", "hidden": 8, "features": "flat"}}],
    [KEYED | {"head": {"kind": "free"}}], [KEYED | {"head": "keyed"}], [KEYED | {"head": {"kind": "other"}}],
    [KEYED | {"head": {"kind": "keyed", "hidden": 8}}], [SPREAD | {"head": {"kind": "spread", "layers": []}}],
    [KEYED | {"extra": 1}], [{"head": {"kind": "keyed"}, "n": 600}], [{"taps": ["a"], "n": 600}],
    [{"head": {"kind": "keyed"}, "taps": ["layer1"]}], [KEYED | {"n": 127}], [KEYED | {"n": 601}],
    [KEYED | {"n": 4096}], [SPREAD | {"n": 4097}], [SPREAD | {"n": 127}], [SPREAD | {"n": True}],
    [SPREAD | {"n": 600.0}], [SPREAD | {"n": "600"}], [KEYED | {"taps": []}], [KEYED | {"taps": "layer1"}],
    [KEYED | {"taps": ["a", "a"]}], [KEYED | {"taps": ["a/b"]}], [KEYED, KEYED | {"extra": 1}],
])  # fmt: skip
def test_parse_spec_refuses_invalid_readouts(value: object) -> None:
    with pytest.raises(KeyMaterialError):
        parse_spec(changed("readouts", value))


def test_parse_spec_refuses_ambiguous_bytes() -> None:
    text = SPEC.decode()
    hostile = [
        b"", b"null", b"[]", b"{}", b"\xef\xbb\xbf" + SPEC, SPEC + b"x", SPEC + SPEC, SPEC[:-1],
        b"\xff" + SPEC,
        text.encode("utf-16"), SPEC + b" " * 16384, b"[" * 16000, b'{"a":' * 3000, b"1" * 16000,
        text.replace('"n":600', '"n":600,"n":601').encode(),
        text.replace('"n":600', '"n":600,"\\u006e":600').encode(),
        text.replace('"pad":0', '"pad":-0').encode(), text.replace('"n":600', '"n":6e2').encode(),
        text.replace('"n":600', '"n":NaN').encode(), text.replace('"n":600', '"n":-Infinity').encode(),
        text.replace('"n":600', '"n":0600').encode(), text.replace('"pad":0', '"pad":0,"pad":0').encode(),
        text.replace('"n":600', '"n":\uff16\uff10\uff10').encode(),
    ]  # fmt: skip
    for data in hostile:
        with pytest.raises(KeyMaterialError) as caught:
            parse_spec(data)
        assert FIELDS["nonce"] not in str(caught.value) and caught.value.__cause__ is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*FIELDS, *(f"carrier.{name}" for name in FIELDS["carrier"])]), json_values)
def test_parse_spec_of_hostile_values_raises_only_key_material_error(path: str, value: object) -> None:
    try:
        spec = parse_spec(changed(path, value))
    except KeyMaterialError:
        return
    assert isinstance(spec, Spec)
