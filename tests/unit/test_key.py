"""Specs, openings and keystreams: hostile bytes only ever become a KeyMaterialError."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.errors import KeyMaterialError
from mtlsign.watermark.carriers.qr import make_carrier
from mtlsign.watermark.keys import identity
from mtlsign.watermark.keys import opening as K
from mtlsign.watermark.keys.spec import Spec, decimal_digits, m_bits, make_spec, parse_spec

FIELDS: dict[str, Any] = {
    "format": "mtlsign/v0",
    "name": "王's model",
    "nonce": "ab" * 32,
    "n": 600,
    "readouts": 1,
    "carrier": make_carrier(600, 1, 28, 28),
    "taps": ["layer1"],
    "head": {"kind": "keyed"},
    "statistic": "count",
    "normalise": "key-batch",
    "graph": {"arch": "torchvision/resnet18", "channels": 1, "classes": 10, "width": 16, "stem": "cifar"},
    "reference": "cd" * 32,
}
OWNER = identity.Identity(bytes(range(32)), bytes(32))
SPEC = make_spec(**FIELDS)
OPENING = K.sign_spec(OWNER, SPEC)
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


def changed(path: str, value: object) -> bytes:
    fields = copy.deepcopy(FIELDS)
    *parents, last = path.split(".")
    at = fields
    for parent in parents:
        at = at[parent]
    at[last] = value
    return json.dumps(fields).encode()


def test_a_spec_reads_back_and_keeps_its_bytes() -> None:
    spec = parse_spec(SPEC)
    assert (spec.raw, spec.n, spec.name, spec.taps) == (SPEC, 600, "王's model", ("layer1",))
    assert spec.graph == FIELDS["graph"] and spec.carrier.digits == 10 and spec.head.hidden is None
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert FIELDS["nonce"] not in repr(spec) and "raw" not in repr(spec)
    spaced = b" \n" + json.dumps(FIELDS, indent=3).encode() + b"\n"
    assert parse_spec(spaced).raw == spaced
    free = parse_spec(changed("head", {"kind": "free", "hidden": 64, "features": "pooled"})).head
    assert (free.kind, free.hidden, free.features) == ("free", 64, "pooled")


def test_make_spec_draws_a_fresh_nonce_and_checks() -> None:
    given = set(FIELDS) - {"nonce", "format", "readouts", "normalise"}
    rest = {name: FIELDS[name] for name in given}
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
def test_widths(n: int, m: int, digits: int) -> None:
    assert (m_bits(n), decimal_digits(n)) == (m, digits)


@pytest.mark.parametrize(("path", "value"), [
    ("format", "mtlsign/v1"), ("format", 1), ("name", ""), ("name", "x" * 129), ("name", "a\nb"),
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
    ("graph", {}), ("graph", {"arch": ""}), ("graph.arch", "a b"), ("graph.width", True),
    ("graph.width", 1.0),
    ("graph.width", None), ("graph.width", [1]), ("graph.stem", "x" * 129), ("graph.Bad", 1),
    ("reference", "cd"),
    ("graph", {"arch": "a"} | {f"f{i}": i for i in range(32)}), ("graph.width", 2**63), ("unknown", 1),
])  # fmt: skip
def test_each_limit_of_a_spec(path: str, value: object) -> None:
    with pytest.raises(KeyMaterialError):
        parse_spec(changed(path, value))


def test_bytes_that_could_mean_two_things_are_refused() -> None:
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
@given(st.binary(max_size=200) | st.sampled_from([SPEC, OPENING.to_json().encode()]), st.data())
def test_hostile_bytes_raise_nothing_else(base: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(base)))
    cut = data.draw(st.integers(0, 3))
    mutated = base[:at] + data.draw(st.binary(max_size=4)) + base[at + cut :]
    for parse in (parse_spec, lambda raw: K.KeyOpening.from_json(raw).key()):
        try:
            parse(mutated)
        except KeyMaterialError as error:
            assert str(error)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*FIELDS, *(f"carrier.{name}" for name in FIELDS["carrier"])]), json_values)
def test_hostile_values_raise_nothing_else(path: str, value: object) -> None:
    try:
        spec = parse_spec(changed(path, value))
    except KeyMaterialError:
        return
    assert isinstance(spec, Spec)


def test_opening_gives_the_key_and_reads_back() -> None:
    again = K.KeyOpening.from_json(OPENING.to_json())
    assert again == OPENING == K.KeyOpening.from_json(OPENING.to_json().encode()) and len(OPENING.key()) == 32
    assert again.parse().n == 600 and pickle.loads(pickle.dumps(OPENING)).key() == OPENING.key()
    assert OPENING.signature.hex() not in repr(OPENING) and repr(OPENING.signature) not in repr(OPENING)
    other = K.sign_spec(OWNER, changed("nonce", "00" * 32))
    assert other.key() != OPENING.key()
    with pytest.raises(KeyMaterialError):
        K.sign_spec(OWNER, b"{}")


def test_a_forged_opening_has_no_key() -> None:
    spec, public_key, signature = OPENING.spec, OPENING.public_key, OPENING.signature
    s = int.from_bytes(signature[32:], "little")
    malleable = signature[:32] + (s + L).to_bytes(32, "little")  # passes a verifier that does not check S < L
    forged = [
        (SPEC + b" ", public_key, signature), (spec, identity.Identity.generate().public_key, signature),
        (spec, public_key, bytes(64)), (spec, public_key, signature[:-1]), (spec, public_key, malleable),
        (spec, public_key[:-1], signature), (b"{}", public_key, signature),
        (spec, b"\x02" + bytes(31), signature),
    ]  # fmt: skip
    for parts in forged:
        with pytest.raises(KeyMaterialError):
            K.KeyOpening(*parts).key()


def test_opening_json_is_strict() -> None:
    fields = json.loads(OPENING.to_json())
    loose = base64.b64encode(SPEC + b"  ")[:-2] + b"g="  # other bits under the padding
    for change in (
        {"format": "x"}, {"spec": "!"}, {"spec": loose.decode()}, {"spec": fields["spec"] + "\n"},
        {"spec": 1},
        {"spec": base64.b64encode(bytes(16385)).decode()}, {"signature": "00"}, {"public_key": None},
        {"more": 1},
    ):  # fmt: skip
        with pytest.raises(KeyMaterialError):
            K.KeyOpening.from_json(json.dumps(fields | change)).key()
    for raw in ("", "\ud800", "[]", OPENING.to_json() + " " * 32768):
        with pytest.raises(KeyMaterialError):
            K.KeyOpening.from_json(raw)


def square_root(a: int) -> int | None:
    root = pow(a, (P + 3) // 8, P)
    if root * root % P != a % P:
        root = root * pow(2, (P - 1) // 4, P) % P
    return root if root * root % P == a % P else None


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Twisted Edwards addition on -x² + y² = 1 + d·x²·y²."""
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    x = (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P
    return x, (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P


def small_order_points() -> list[tuple[int, int]]:
    """All points with 8·A = 0,
    from d·y⁴ + 2y² - 1 = 0 (order 8: twice the point has y = 0) and its multiples."""
    root = square_root((1 + D) % P)
    assert root is not None
    for sign in (1, -1):
        y = square_root((sign * root - 1) * pow(D, -1, P) % P)
        if y is not None:
            break
    assert y is not None and (D * y**4 + 2 * y**2 - 1) % P == 0
    x = square_root((y * y - 1) * pow(D * y * y + 1, -1, P) % P)
    assert x is not None
    points = [(0, 1)]
    for _ in range(7):
        points.append(add(points[-1], (x, y)))
    assert add(points[-1], (x, y)) == (0, 1)
    return points


def test_small_order_and_non_canonical_public_keys_are_refused() -> None:
    points = small_order_points()
    canonical = {(y | (x & 1) << 255).to_bytes(32, "little") for x, y in points}
    assert len(canonical) == 8
    ys = {y for _, y in points}
    assert ys == K._SMALL_ORDER_Y and len(ys) == 5
    either_sign = {
        (y | sign << 255).to_bytes(32, "little") for y in ys for sign in (0, 1)
    }  # also x = 0, sign 1
    beyond = {(y | sign << 255).to_bytes(32, "little") for y in range(P, 2**255) for sign in (0, 1)}
    assert canonical < either_sign
    for encoded in either_sign | beyond:
        with pytest.raises(KeyMaterialError, match="small order"):
            K.KeyOpening(SPEC, encoded, OPENING.signature).key()


def test_a_small_order_key_would_have_matched_without_the_check() -> None:
    # A = 0, R = 0, S = 0 satisfies S·B = R + k·A for every message: the reason for the check.
    with pytest.raises(KeyMaterialError, match="public_key"):
        K.KeyOpening(SPEC, b"\x01" + bytes(31), b"\x01" + bytes(63)).key()


def test_streams_are_separate_prefixes_of_themselves() -> None:
    key = OPENING.key()
    pi, bits, p = K.watermark_integers(key, 600), K.watermark_labels(key, 600), K.head_signs(key, 4097)
    assert pi.dtype == np.int64 and pi.shape == (600,) and len(set(pi.tolist())) == 600
    assert pi.min() >= 0 and pi.max() < 2**30
    assert bits.dtype == np.uint8 and set(bits.tolist()) == {0, 1}
    assert p.dtype == np.int8 and p.shape == (4097,) and set(p.tolist()) == {-1, 1}
    assert np.array_equal(K.watermark_integers(key, 700)[:600], pi) and np.array_equal(
        K.watermark_labels(key, 700)[:600], bits
    )
    assert not np.array_equal(K.head_signs(key, 4097, 1), p)
    assert not np.array_equal((p[:600] + 1) // 2, bits)
    assert K.keystream(key, b"mtlsign/v0/labels", 75) == np.packbits(bits).tobytes()


def test_repeated_integers_are_dropped_and_the_stream_read_on() -> None:
    key = bytes(32)
    for n in (2, 3, 5, 8):  # 3 to 9 bits, so that repeats are common
        m = m_bits(n)
        stream = K.keystream(key, b"mtlsign/v0/integers", 300)
        text = "".join(f"{byte:08b}" for byte in stream)
        expected = list(dict.fromkeys(int(text[i : i + m], 2) for i in range(0, len(text) - m, m)))[:n]
        assert K.watermark_integers(key, n).tolist() == expected


def test_keystream_limits() -> None:
    for bad in (b"short", "00" * 32):
        with pytest.raises(KeyMaterialError):
            K.watermark_labels(bad, 8)  # type: ignore[arg-type]
    calls: tuple[Callable[[], object], ...] = (
        lambda: K.watermark_labels(bytes(32), 0), lambda: K.watermark_integers(bytes(32), 1), lambda: K.head_signs(bytes(32), 0),
        lambda: K.head_signs(bytes(32), 1, -1), lambda: m_bits(1),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError):
            call()
