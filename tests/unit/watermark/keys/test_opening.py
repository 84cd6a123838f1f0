"""Tests of key openings and keystreams: hostile bytes only ever raise KeyMaterialError."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.errors import KeyMaterialError
from mtlsign.watermark.keys import identity
from mtlsign.watermark.keys import opening as opening_module
from mtlsign.watermark.keys.spec import m_bits, parse_spec
from tests.unit.watermark.keys.examples import OPENING, OWNER, SPEC, changed

#: SHA-256 of `spread_order(bytes(range(32)), 10_000)` as little-endian int64.
GOLDEN = "81ccdaedd5464f596e2958b18a3c7a279585f2c16018fd441e0bcda7daa6790d"

P = 2**255 - 19


L = 2**252 + 27742317777372353535851937790883648493


D = -121665 * pow(121666, -1, P) % P


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.sampled_from([SPEC, OPENING.to_json().encode()]), st.data())
def test_parsers_of_hostile_bytes_raise_only_key_material_error(base: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(base)))
    cut = data.draw(st.integers(0, 3))
    mutated = base[:at] + data.draw(st.binary(max_size=4)) + base[at + cut :]
    for parse in (parse_spec, lambda raw: opening_module.KeyOpening.from_json(raw).key()):
        try:
            parse(mutated)
        except KeyMaterialError as error:
            assert str(error)


def test_key_opening_round_trips_and_gives_key() -> None:
    again = opening_module.KeyOpening.from_json(OPENING.to_json())
    assert (
        again == OPENING == opening_module.KeyOpening.from_json(OPENING.to_json().encode())
        and len(OPENING.key()) == 32
    )
    assert again.parse().n == 600 and pickle.loads(pickle.dumps(OPENING)).key() == OPENING.key()
    assert OPENING.signature.hex() not in repr(OPENING) and repr(OPENING.signature) not in repr(OPENING)
    other = opening_module.sign_spec(OWNER, changed("nonce", "00" * 32))
    assert other.key() != OPENING.key()
    with pytest.raises(KeyMaterialError):
        opening_module.sign_spec(OWNER, b"{}")


def test_key_of_forged_opening_raises() -> None:
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
            opening_module.KeyOpening(*parts).key()


def test_key_opening_from_json_is_strict() -> None:
    fields = json.loads(OPENING.to_json())
    loose = base64.b64encode(SPEC + b"  ")[:-2] + b"g="  # other bits under the padding
    for change in (
        {"format": "x"}, {"spec": "!"}, {"spec": loose.decode()}, {"spec": fields["spec"] + "\n"},
        {"spec": 1},
        {"spec": base64.b64encode(bytes(16385)).decode()}, {"signature": "00"}, {"public_key": None},
        {"more": 1},
    ):  # fmt: skip
        with pytest.raises(KeyMaterialError):
            opening_module.KeyOpening.from_json(json.dumps(fields | change)).key()
    for raw in ("", "\ud800", "[]", OPENING.to_json() + " " * 32768):
        with pytest.raises(KeyMaterialError):
            opening_module.KeyOpening.from_json(raw)


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


def test_key_refuses_small_order_and_non_canonical_public_keys() -> None:
    points = small_order_points()
    canonical = {(y | (x & 1) << 255).to_bytes(32, "little") for x, y in points}
    assert len(canonical) == 8
    ys = {y for _, y in points}
    assert ys == opening_module._SMALL_ORDER_Y and len(ys) == 5
    either_sign = {
        (y | sign << 255).to_bytes(32, "little") for y in ys for sign in (0, 1)
    }  # also x = 0, sign 1
    beyond = {(y | sign << 255).to_bytes(32, "little") for y in range(P, 2**255) for sign in (0, 1)}
    assert canonical < either_sign
    for encoded in either_sign | beyond:
        with pytest.raises(KeyMaterialError, match="small order"):
            opening_module.KeyOpening(SPEC, encoded, OPENING.signature).key()


def test_key_refuses_point_that_verifies_every_message() -> None:
    # A = 0, R = 0, S = 0 satisfies S·B = R + k·A for every message: the reason for the check.
    with pytest.raises(KeyMaterialError, match="public_key"):
        opening_module.KeyOpening(SPEC, b"\x01" + bytes(31), b"\x01" + bytes(63)).key()


def test_keystreams_are_separate_and_prefix_consistent() -> None:
    key = OPENING.key()
    pi, bits, p = (
        opening_module.watermark_integers(key, 600),
        opening_module.watermark_labels(key, 600),
        opening_module.head_signs(key, 4097),
    )
    assert pi.dtype == np.int64 and pi.shape == (600,) and len(set(pi.tolist())) == 600
    assert pi.min() >= 0 and pi.max() < 2**30
    assert bits.dtype == np.uint8 and set(bits.tolist()) == {0, 1}
    assert p.dtype == np.int8 and p.shape == (4097,) and set(p.tolist()) == {-1, 1}
    assert np.array_equal(opening_module.watermark_integers(key, 700)[:600], pi) and np.array_equal(
        opening_module.watermark_labels(key, 700)[:600], bits
    )
    assert not np.array_equal(opening_module.head_signs(key, 4097, 1), p)
    assert not np.array_equal((p[:600] + 1) // 2, bits)
    assert opening_module.keystream(key, b"mtlsign/v1/labels", 75) == np.packbits(bits).tobytes()


def test_watermark_integers_skip_repeated_values() -> None:
    key = bytes(32)
    for n in (2, 3, 5, 8):  # 3 to 9 bits, so that repeats are common
        m = m_bits(n)
        stream = opening_module.keystream(key, b"mtlsign/v1/integers", 300)
        text = "".join(f"{byte:08b}" for byte in stream)
        expected = list(dict.fromkeys(int(text[i : i + m], 2) for i in range(0, len(text) - m, m)))[:n]
        assert opening_module.watermark_integers(key, n).tolist() == expected


def test_keystream_functions_refuse_invalid_arguments() -> None:
    for bad in (b"short", "00" * 32):
        with pytest.raises(KeyMaterialError):
            opening_module.watermark_labels(bad, 8)  # type: ignore[arg-type]
    calls: tuple[Callable[[], object], ...] = (
        lambda: opening_module.watermark_labels(bytes(32), 0),
        lambda: opening_module.watermark_integers(bytes(32), 1),
        lambda: opening_module.head_signs(bytes(32), 0),
        lambda: opening_module.head_signs(bytes(32), 1, -1),
        lambda: m_bits(1),
    )
    for call in calls:
        with pytest.raises(ValueError):
            call()


def test_spread_order_is_permutation_with_golden_digest() -> None:
    key = bytes(range(32))
    order = opening_module.spread_order(key, 10_000)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(10_000))
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == GOLDEN
    assert not np.array_equal(order, opening_module.spread_order(bytes(32), 10_000))


@pytest.mark.parametrize("d", [1, 2, 777])
def test_spread_order_sorts_big_endian_integers_of_keystream(d: int) -> None:
    key = bytes(range(32))
    stream = opening_module.keystream(key, b"mtlsign/v1/spread", 8 * d)
    numbers = [int.from_bytes(stream[8 * i : 8 * i + 8], "big") for i in range(d)]
    expected = sorted(range(d), key=lambda i: (numbers[i], i))
    assert opening_module.spread_order(key, d).tolist() == expected


@pytest.mark.parametrize("d", [0, -1, 2**26 + 1])
def test_spread_order_refuses_invalid_sizes(d: int) -> None:
    with pytest.raises(ValueError, match="d must be"):
        opening_module.spread_order(bytes(32), d)
