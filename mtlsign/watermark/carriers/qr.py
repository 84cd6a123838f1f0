"""Integers → QR codes → normalised images (design decision 1; `docs/format.md`, section "QR carrier").

With version, level, mode, mask and digit count fixed, the 441 modules are an affine function over GF(2) of
the numeric data bits. The `qrcode` library defines the symbols: it draws "0…0" and one symbol per data bit,
and the batch encoder XORs those.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from qrcode.constants import ERROR_CORRECT_H  # type: ignore[import-untyped]
from qrcode.main import QRCode  # type: ignore[import-untyped]
from qrcode.util import MODE_NUMBER, QRData  # type: ignore[import-untyped]

from mtlsign.errors import CarrierError
from mtlsign.watermark.keys.spec import MAX_N, MIN_N, MODULES_PER_SIDE, Carrier, decimal_digits, parse_carrier

MAX_DIGITS = 17  # numeric capacity of version 1-H
MAX_ELEMENTS = 2**30  # 4 GiB of float32: bounds what a stranger's spec can make a verifier allocate
_CELLS = MODULES_PER_SIDE**2
_GROUP_BITS = {3: 10, 2: 7, 1: 4}


def encode_with_library(digits: str) -> npt.NDArray[np.uint8]:
    """One symbol by the `qrcode` library, uint8 [21,21], dark = 1: what `modules` must equal."""
    code = QRCode(version=1, error_correction=ERROR_CORRECT_H, box_size=1, border=0, mask_pattern=0)
    code.add_data(QRData(digits.encode("ascii"), mode=MODE_NUMBER, check_data=False))
    code.make(fit=False)
    return np.array(code.modules, dtype=np.uint8)


def _packed_symbol(digits: str) -> npt.NDArray[np.uint64]:
    return np.packbits(np.append(encode_with_library(digits), np.zeros(7, np.uint8))).view(np.uint64)


def _digit_groups(digits: int) -> list[int]:
    """Lengths of the decimal groups, three digits each from the left, the rest last (ISO/IEC 18004)."""
    return [min(3, digits - start) for start in range(0, digits, 3)]


@lru_cache(maxsize=4)
def _tables(digits: int) -> tuple[npt.NDArray[np.uint64], ...]:
    """Per group uint64 [10^length, 7]: each value's packed modules; the first group also holds the offset."""
    zero = _packed_symbol("0" * digits)
    tables, start = [], 0
    for group, length in enumerate(_digit_groups(digits)):
        values = np.arange(10**length, dtype=np.uint64)
        table = np.zeros((10**length, 7), np.uint64) if group else np.tile(zero, (10**length, 1))
        for bit in range(_GROUP_BITS[length]):
            text = "0" * start + str(1 << bit).zfill(length) + "0" * (digits - start - length)
            on = (values >> np.uint64(bit)) & np.uint64(1)
            table ^= on[:, None] * (_packed_symbol(text) ^ zero)
        table.setflags(write=False)
        tables.append(table)
        start += length
    return tuple(tables)


def encode_modules(integers: npt.NDArray[np.int64], digits: int) -> npt.NDArray[np.uint8]:
    """QR codes of zero-padded decimals, uint8 [n,21,21] with dark = 1; bit-identical to `draw`.

    Raises:
        CarrierError: `integers` is not one dimension of integers in [0, 10^digits), or digits is not in 1…17.
    """
    values = np.asarray(integers)
    if not 1 <= digits <= MAX_DIGITS:
        raise CarrierError(f"must be from 1 to {MAX_DIGITS}; use make_carrier", field="digits")
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise CarrierError(
            "must be a vector of integers; use mtlsign.watermark.keys.opening.integers", field="integers"
        )
    if values.size and not (values.min() >= 0 and values.max() < 10**digits):
        raise CarrierError(f"do not fit {digits} digits; use the carrier made for this n", field="integers")
    values = values.astype(np.int64)
    rest = digits
    symbols = np.zeros((values.size, 7), np.uint64)
    for table, length in zip(_tables(digits), _digit_groups(digits), strict=True):
        rest -= length
        symbols ^= table[values // 10**rest % 10**length]
    cells = np.unpackbits(symbols.view(np.uint8), axis=1, count=_CELLS)
    return cells.reshape(-1, MODULES_PER_SIDE, MODULES_PER_SIDE)


def images(integers: npt.NDArray[np.int64], carrier: Carrier | Mapping[str, object]) -> torch.Tensor:
    """Key images, float32 [n, channels, height, width], contiguous, on the CPU.

    Each module becomes `module`² pixels, the symbol is centred with an odd rest to the bottom and right,
    everything else is `pad`, all channels are equal, and x = (1000·v - mean_milli)/std_milli.

    Raises:
        CarrierError: see `modules`, or more than 2^30 numbers were asked for.
        KeyMaterialError: the carrier given as a mapping is not a spec's.
    """
    c = carrier if isinstance(carrier, Carrier) else parse_carrier(dict(carrier))
    codes = encode_modules(integers, c.digits)
    n, side = len(codes), MODULES_PER_SIDE * c.module
    if n * c.channels * c.height * c.width > MAX_ELEMENTS:
        raise CarrierError(
            f"{n} images of this size are over 4 GiB; use a smaller n or image", field="carrier"
        )
    top, left = (c.height - side) // 2, (c.width - side) // 2
    values = np.array([(1000 * v - c.mean_milli) / c.std_milli for v in (0, 1)], np.float32)
    cells = values[codes]
    if c.module > 1:
        cells = cells.repeat(c.module, axis=1).repeat(c.module, axis=2)
    canvas = np.full((n, c.height, c.width), values[int(bool(c.pad))], np.float32)
    canvas[:, top : top + side, left : left + side] = cells
    return torch.from_numpy(canvas)[:, None].expand(n, c.channels, c.height, c.width).contiguous()


def make_carrier(
    n: int, channels: int, height: int, width: int, module: int | None = None
) -> dict[str, int | str]:
    """The spec's carrier object for n integers; `module` in pixels, by default the largest that fits.

    Raises:
        CarrierError: the image is under 21 pixels, over 1,024 or too small for `module`; or n or channels.
    """
    if not MIN_N <= n <= MAX_N:
        raise CarrierError(f"must be from {MIN_N} to {MAX_N}, got {n}; choose another key size", field="n")
    fits = min(height, width) // MODULES_PER_SIDE
    if fits < 1:
        raise CarrierError(
            f"{height}x{width} pixels cannot hold a QR code of 21x21 modules; scale inputs to 21 or more",
            field="carrier",
        )
    if max(height, width) > 1024 or not 1 <= channels <= 16:
        raise CarrierError(
            "images have 1 to 16 channels and at most 1024x1024 pixels; scale inputs", field="carrier"
        )
    scale = fits if module is None else module
    if not 1 <= scale <= fits:
        raise CarrierError(
            f"must be from 1 to {fits} for {height}x{width} pixels; leave it out", field="module"
        )
    return {
        "kind": "qr", "version": 1, "level": "H", "mode": "numeric", "mask": 0, "digits": decimal_digits(n),
        "channels": channels, "height": height, "width": width, "module": scale, "pad": 0, "mean_milli": 500,
        "std_milli": 500,
    }  # fmt: skip
