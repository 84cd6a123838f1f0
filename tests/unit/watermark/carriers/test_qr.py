"""Tests of QR codes: equal to the `qrcode` library bit for bit, with the documented geometry."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from qrcode import util  # type: ignore[import-untyped]
from qrcode.constants import ERROR_CORRECT_H  # type: ignore[import-untyped]
from qrcode.main import QRCode  # type: ignore[import-untyped]

from mtlsign.errors import CarrierError, KeyMaterialError
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.spec import parse_carrier

CODE = QRCode(version=1, error_correction=ERROR_CORRECT_H, box_size=1, border=0, mask_pattern=0)


def library(value: int, digits: int) -> bytes:
    """Encode with the library by the shortest way: reuse one object and replace its data."""
    CODE.data_list = [util.QRData(b"%0*d" % (digits, value), mode=util.MODE_NUMBER, check_data=False)]
    CODE.data_cache = None
    CODE.makeImpl(False, 0)
    return bytes(map(bool, (cell for row in CODE.modules for cell in row)))


def same_as_library(values: np.ndarray, digits: int) -> bool:
    drawn = qr.encode_modules(values, digits)
    assert drawn.dtype == np.uint8 and drawn.shape == (len(values), 21, 21)
    return all(
        code.tobytes() == library(int(value), digits) for code, value in zip(drawn, values, strict=True)
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_encode_modules_equals_library_on_random_integers(count: int) -> None:
    rng = np.random.default_rng(20240601)
    values = np.concatenate([[0, 2**30 - 1], rng.integers(0, 2**30, count)])
    assert same_as_library(values, 10)


@pytest.mark.parametrize(("digits", "m"), [(7, 21), (8, 24), (9, 27), (10, 33), (11, 36)])
def test_encode_modules_equals_library_at_every_digit_count(digits: int, m: int) -> None:
    values = np.concatenate(
        [[0, 1, 2**m - 1, 10**digits - 1], np.random.default_rng(digits).integers(0, 2**m, 200)]
    )
    assert same_as_library(values, digits)
    assert np.array_equal(
        qr.encode_with_library("7".zfill(digits)), qr.encode_modules(np.array([7]), digits)[0]
    )


def test_encode_modules_gives_distinct_symbols() -> None:
    rest = qr.encode_modules(np.arange(1, 31) * 0 + (1 << np.arange(30)), 10)
    assert len({code.tobytes() for code in rest}) == 30
    assert len({code.tobytes() for code in qr.encode_modules(np.arange(5000), 10)}) == 5000


def test_encode_modules_of_thousand_integers_takes_milliseconds() -> None:
    values = np.random.default_rng(0).integers(0, 2**30, 1024)
    qr.encode_modules(values, 10)
    best = min(_timed(values) for _ in range(5))
    assert best < 0.03


def _timed(values: np.ndarray) -> float:
    start = time.perf_counter()
    qr.encode_modules(values, 10)
    return time.perf_counter() - start


def test_images_are_centred_scaled_padded_and_normalised() -> None:
    values = np.array([0, 5, 2**30 - 1])
    carrier = qr.make_carrier(600, 3, 46, 51, module=2) | {"pad": 1, "mean_milli": 286, "std_milli": 353}
    x = qr.images(values, carrier)
    assert x.dtype == torch.float32 and x.shape == (3, 3, 46, 51) and x.is_contiguous()
    dark, light = np.float32(714 / 353), np.float32(-286 / 353)
    codes = qr.encode_modules(values, 10)
    expected = np.full((3, 46, 51), dark)
    for row in range(42):
        for column in range(42):  # 46 - 42 = 4: two above; 51 - 42 = 9: four left, five right
            expected[:, 2 + row, 4 + column] = np.where(codes[:, row // 2, column // 2] == 1, dark, light)
    for channel in range(3):
        assert np.array_equal(x[:, channel].numpy(), expected)
    assert torch.equal(qr.images(values, parse_carrier(carrier)), x)
    plain = qr.images(values, qr.make_carrier(600, 1, 28, 28))
    assert set(plain.flatten().tolist()) == {-1.0, 1.0} and plain[0, 0, 0, 0] == -1 and plain[0, 0, 3, 3] == 1


def test_make_carrier_uses_largest_module_by_default() -> None:
    sizes = [(21, 1), (28, 1), (32, 1), (41, 1), (42, 2), (64, 3), (224, 10), (1024, 48)]
    for size, module in sizes:
        carrier = qr.make_carrier(1024, 1, size, size)
        assert carrier["module"] == module and parse_carrier(carrier).digits == 10
    assert (
        qr.make_carrier(128, 1, 1024, 30)["module"] == 1 and qr.make_carrier(4096, 1, 32, 32)["digits"] == 11
    )


@pytest.mark.parametrize("arguments", [
    (600, 1, 20, 28), (600, 1, 28, 20), (600, 1, 8, 8), (600, 0, 28, 28), (600, 17, 28, 28),
    (600, 1, 1025, 28),
    (600, 1, 28, 28, 2), (600, 1, 28, 28, 0), (100, 1, 28, 28), (5000, 1, 28, 28),
])  # fmt: skip
def test_make_carrier_refuses_values_outside_limits(arguments: tuple[int, ...]) -> None:
    with pytest.raises(CarrierError):
        qr.make_carrier(*arguments)


def test_make_carrier_of_small_image_names_its_size() -> None:
    with pytest.raises(CarrierError, match="20x28 pixels cannot hold a QR code of 21x21 modules"):
        qr.make_carrier(600, 1, 20, 28)


def test_encode_modules_refuses_invalid_integers() -> None:
    for values, digits in (
        (np.array([-1]), 10), (np.array([10**10]), 10), (np.array([1.0]), 10), (np.array([[1]]), 10),
        (np.array([True]), 10), (np.array([1]), 0), (np.array([1]), 18),
        (np.array([2**63], dtype=np.uint64), 17),
    ):  # fmt: skip
        with pytest.raises(CarrierError):
            qr.encode_modules(values, digits)  # type: ignore[arg-type]
    assert qr.encode_modules(np.array([], dtype=np.int64), 10).shape == (0, 21, 21)
    assert qr.encode_modules(np.array([10**17 - 1]), 17).shape == (1, 21, 21)


def test_images_refuse_over_four_gib_and_invalid_carriers() -> None:
    with pytest.raises(CarrierError, match="4 GiB"):
        qr.images(np.arange(1024), qr.make_carrier(1024, 3, 1024, 1024))
    with pytest.raises(KeyMaterialError):
        qr.images(np.arange(3), {"kind": "qr"})
