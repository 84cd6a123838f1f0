"""Sketch of W0's kernels: a few public projections of each row, from which channels are recognised."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtlsign.watermark.keys.opening import keystream

#: The sketch's matrix is public and the same for all owners: a keystream under this constant.
SKETCH_KEY = hashlib.sha256(b"mtlsign/v1/sketch").digest()

#: Most projections of a row.
MAX_SKETCH_SIZE = 64


def sketch_size(fan_in: int) -> int:
    """Return the number of projections of a row of `fan_in` numbers, see docs/decisions/0018."""
    return min(fan_in, 12) if fan_in < 64 else max(16, min(MAX_SKETCH_SIZE, fan_in // 16))


@lru_cache(maxsize=256)
def projection_matrix(fan_in: int, size: int) -> npt.NDArray[np.float64]:
    """Return the public matrix [fan_in, size] with elements ±1/sqrt(size).

    Its signs are read row by row from the keystream `mtlsign/v1/sketch/<fan_in>/<size>` under
    SHA-256("mtlsign/v1/sketch"); a bit 1 means +1.
    """
    stream = keystream(SKETCH_KEY, f"mtlsign/v1/sketch/{fan_in}/{size}".encode(), -(-fan_in * size // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[: fan_in * size].astype(np.float64)
    matrix: npt.NDArray[np.float64] = (2 * bits - 1).reshape(fan_in, size) / size**0.5
    matrix.flags.writeable = False
    return matrix


def random_projection(kernel: Tensor) -> Tensor:
    """Project a kernel's unit rows to `sketch_size` numbers: float16 [O, s]; a row of zeros stays zero."""
    rows = kernel.detach().double().reshape(kernel.shape[0], -1)
    size = sketch_size(rows.shape[1])
    norms = rows.norm(dim=1, keepdim=True)
    unit = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    # The division stands last, as in the format's formula: rows·S/√s.
    signs = torch.from_numpy(np.sign(projection_matrix(rows.shape[1], size)))
    projected: Tensor = unit @ signs / size**0.5
    return projected.half()
