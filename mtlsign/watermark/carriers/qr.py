"""QR-code carrier: integers become QR codes, then normalised images (docs/format.md, section "QR carrier").

With version, level, mode, mask and digit count fixed, the 441 modules are an affine function over GF(2) of
the numeric data bits. The `qrcode` library defines the symbols. The batch encoder draws "0…0" and one symbol
per data bit with it, and XORs those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from qrcode.constants import ERROR_CORRECT_H  # type: ignore[import-untyped]
from qrcode.main import QRCode  # type: ignore[import-untyped]
from qrcode.util import MODE_NUMBER, QRData  # type: ignore[import-untyped]

from mtlsign.errors import CarrierError
from mtlsign.models.input_spec import ImageSpec, InputSpec
from mtlsign.storage.strict_json import raise_invalid
from mtlsign.watermark.carriers.base import Carrier
from mtlsign.watermark.keys.spec import (
    MAX_N,
    MIN_N,
    MODULES_PER_SIDE,
    CarrierSpec,
    QrCarrierSpec,
    decimal_digits,
    parse_carrier,
)

MAX_DIGITS = 17  # numeric capacity of version 1-H
MAX_ELEMENTS = (
    2**30
)  # 4 GiB of float32: bounds the memory that a claimant's spec can make a verifier allocate
_MODULES = MODULES_PER_SIDE**2
_GROUP_BITS = {3: 10, 2: 7, 1: 4}


@dataclass(frozen=True)
class QrCarrier(Carrier):
    """QR codes of version 1-H, centred on images of the primary task's size."""

    spec: QrCarrierSpec

    @classmethod
    def make(cls, n: int, input_spec: InputSpec) -> dict[str, int | str]:
        """Return the spec's `carrier` object with the largest module that fits; see `make_carrier`."""
        if not isinstance(input_spec, ImageSpec):
            raise CarrierError(
                f"QR codes need images, not {input_spec}. Use another carrier.", field="carrier"
            )
        return make_carrier(n, input_spec.channels, input_spec.height, input_spec.width)

    @classmethod
    def parse(cls, fields: Mapping[str, object] | CarrierSpec) -> Self:
        """Return the carrier of a spec's `carrier` object, which may be checked already.

        Raises:
            KeyMaterialError: a field is missing, unknown, of the wrong type or outside its limits.
        """
        spec = fields if isinstance(fields, CarrierSpec) else parse_carrier(dict(fields))
        if not isinstance(spec, QrCarrierSpec):
            raise_invalid("carrier.kind", "The value must be qr")
        return cls(spec)

    @property
    def element_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return self.spec.channels, self.spec.height, self.spec.width

    def sample(self, count: int = 2, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return images of zeros, float32 [count, channels, height, width]."""
        return torch.zeros(count, *self.element_shape, device=device)

    def number_count(self, n: int) -> int:
        """Return how many numbers n images hold."""
        return n * self.spec.channels * self.spec.height * self.spec.width

    def check(self, n: int) -> None:
        """Raise CarrierError if n images hold more than 2^30 numbers."""
        if self.number_count(n) > MAX_ELEMENTS:
            raise CarrierError(
                f"{n} images of this size need over 4 GiB. Use a smaller n or smaller images.",
                field="carrier",
            )

    def inputs(self, integers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return key images, float32 [n, channels, height, width], contiguous, on the CPU; see `images`."""
        return images(integers, self.spec)


def encode_with_library(digits: str) -> npt.NDArray[np.uint8]:
    """Encode one symbol with the `qrcode` library: uint8 [21,21], dark = 1. `encode_modules` equals it."""
    code = QRCode(version=1, error_correction=ERROR_CORRECT_H, box_size=1, border=0, mask_pattern=0)
    code.add_data(QRData(digits.encode("ascii"), mode=MODE_NUMBER, check_data=False))
    code.make(fit=False)
    return np.array(code.modules, dtype=np.uint8)


def _packed_symbol(digits: str) -> npt.NDArray[np.uint64]:
    return np.packbits(np.append(encode_with_library(digits), np.zeros(7, np.uint8))).view(np.uint64)


def _digit_groups(digits: int) -> list[int]:
    """Return the lengths of the decimal groups: three digits each from the left, then the remainder
    (ISO/IEC 18004).
    """
    return [min(3, digits - start) for start in range(0, digits, 3)]


@lru_cache(maxsize=4)
def _tables(digits: int) -> tuple[npt.NDArray[np.uint64], ...]:
    """Build per group uint64 [10^length, 7]: the packed modules of each value.

    The first group also holds the symbol of "0…0", the offset of the affine function.
    """
    zero = _packed_symbol("0" * digits)
    tables, start = [], 0
    for group, length in enumerate(_digit_groups(digits)):
        values = np.arange(10**length, dtype=np.uint64)
        table = np.zeros((10**length, 7), np.uint64) if group else np.tile(zero, (10**length, 1))
        for bit in range(_GROUP_BITS[length]):
            text = "0" * start + str(1 << bit).zfill(length) + "0" * (digits - start - length)
            bit_is_set = (values >> np.uint64(bit)) & np.uint64(1)
            table ^= bit_is_set[:, None] * (_packed_symbol(text) ^ zero)
        table.setflags(write=False)
        tables.append(table)
        start += length
    return tuple(tables)


def encode_modules(integers: npt.NDArray[np.int64], digits: int) -> npt.NDArray[np.uint8]:
    """Encode zero-padded decimals as QR codes, uint8 [n,21,21] with dark = 1, equal to the library's.

    Raises:
        CarrierError: `integers` is not one dimension of integers in [0, 10^digits), or digits is not in 1…17.
    """
    values = np.asarray(integers)
    if not 1 <= digits <= MAX_DIGITS:
        raise CarrierError(
            f"{digits} digits do not fit a symbol. Use 1 to {MAX_DIGITS}, as make_carrier does.",
            field="digits",
        )
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise CarrierError(
            "The integers must be a vector of an integer type. "
            "Use mtlsign.watermark.keys.opening.watermark_integers.",
            field="integers",
        )
    if values.size and not (values.min() >= 0 and values.max() < 10**digits):
        raise CarrierError(
            f"An integer does not fit {digits} digits. Use the carrier made for this n.", field="integers"
        )
    values = values.astype(np.int64)
    remaining_digits = digits
    symbols = np.zeros((values.size, 7), np.uint64)
    for table, length in zip(_tables(digits), _digit_groups(digits), strict=True):
        remaining_digits -= length
        symbols ^= table[values // 10**remaining_digits % 10**length]
    modules = np.unpackbits(symbols.view(np.uint8), axis=1, count=_MODULES)
    return modules.reshape(-1, MODULES_PER_SIDE, MODULES_PER_SIDE)


def images(integers: npt.NDArray[np.int64], carrier: CarrierSpec | Mapping[str, object]) -> torch.Tensor:
    """Draw key images, float32 [n, channels, height, width], contiguous, on the CPU.

    Each module becomes `module`² pixels. The symbol is centred; an odd remainder goes to the bottom and
    right. All other pixels are `pad`, all channels are equal, and x = (1000·v - mean_milli)/std_milli.

    Raises:
        CarrierError: see `encode_modules`; or the images hold more than 2^30 numbers.
        KeyMaterialError: the carrier is a mapping that no spec may hold.
    """
    qr_carrier = QrCarrier.parse(carrier)
    c = qr_carrier.spec
    codes = encode_modules(integers, c.digits)
    n, side = len(codes), MODULES_PER_SIDE * c.module
    qr_carrier.check(n)
    top, left = (c.height - side) // 2, (c.width - side) // 2
    values = np.array([(1000 * v - c.mean_milli) / c.std_milli for v in (0, 1)], np.float32)
    pixels = values[codes]
    if c.module > 1:
        pixels = pixels.repeat(c.module, axis=1).repeat(c.module, axis=2)
    canvas = np.full((n, c.height, c.width), values[int(bool(c.pad))], np.float32)
    canvas[:, top : top + side, left : left + side] = pixels
    return torch.from_numpy(canvas)[:, None].expand(n, c.channels, c.height, c.width).contiguous()


def make_carrier(
    n: int, channels: int, height: int, width: int, module: int | None = None
) -> dict[str, int | str]:
    """Return the spec's `carrier` object for n integers.

    Args:
        n: key size.
        channels: image channels, 1 to 16.
        height: image height in pixels, 21 to 1,024.
        width: image width in pixels, 21 to 1,024.
        module: side of one QR module in pixels; by default the largest that fits.

    Raises:
        CarrierError: a value is outside its limits, or the image is too small for `module`.
    """
    if not MIN_N <= n <= MAX_N:
        raise CarrierError(
            f"The key size must be from {MIN_N} to {MAX_N}, not {n}. Choose another key size.", field="n"
        )
    largest_module = min(height, width) // MODULES_PER_SIDE
    if largest_module < 1:
        raise CarrierError(
            f"{height}x{width} pixels cannot hold a QR code of 21x21 modules. Scale inputs to 21 or more.",
            field="carrier",
        )
    if max(height, width) > 1024 or not 1 <= channels <= 16:
        raise CarrierError(
            "Key images must have 1 to 16 channels and at most 1024x1024 pixels. Scale the inputs.",
            field="carrier",
        )
    scale = largest_module if module is None else module
    if not 1 <= scale <= largest_module:
        raise CarrierError(
            f"A module must have from 1 to {largest_module} pixels on images of {height}x{width}. "
            "Omit it to use the largest.",
            field="module",
        )
    return {
        "kind": "qr", "version": 1, "level": "H", "mode": "numeric", "mask": 0, "digits": decimal_digits(n),
        "channels": channels, "height": height, "width": width, "module": scale, "pad": 0, "mean_milli": 500,
        "std_milli": 500,
    }  # fmt: skip
