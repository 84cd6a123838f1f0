from __future__ import annotations

import hashlib

import pytest
import torch

from mtlsign.watermark.verification.sketches import (
    SKETCH_KEY,
    projection_matrix,
    random_projection,
    sketch_size,
)


@pytest.mark.parametrize(
    ("fan_in", "size"), [(1, 1), (9, 9), (27, 12), (63, 12), (64, 16), (576, 36), (4608, 64)]
)
def test_sketch_size_grows_slowly_with_the_row(fan_in: int, size: int) -> None:
    assert sketch_size(fan_in) == size


def test_random_projection_is_linear_in_unit_rows() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(5, 4, 3, 3)
    sketch = random_projection(kernel)
    scaled = random_projection(kernel * torch.tensor([1, 2, 0.25, 64, 1]).reshape(-1, 1, 1, 1))
    assert torch.equal(scaled, sketch) and sketch.shape == (5, 12) and sketch.dtype == torch.float16
    assert torch.equal(random_projection(-kernel), -sketch)
    assert not random_projection(torch.zeros(2, 8)).any()


def test_projection_matrix_is_the_public_keystream() -> None:
    assert hashlib.sha256(b"mtlsign/v1/sketch").digest() == SKETCH_KEY
    matrix = torch.from_numpy(projection_matrix(8, 8).copy())
    assert torch.equal(random_projection(torch.eye(8)), matrix.half())
    torch.testing.assert_close(matrix.abs(), torch.full((8, 8), 8**-0.5, dtype=torch.float64))
