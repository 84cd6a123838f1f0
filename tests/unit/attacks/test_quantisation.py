from __future__ import annotations

import pytest
import torch

from mtlsign.attacks.quantisation import quantise


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise_rounds_rows_to_few_levels_near_weights(bits: int) -> None:
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    w[2] = 0
    q = quantise(w, bits)
    assert (q[2] == 0).all()
    for row, original in zip(q, w, strict=True):
        step = original.abs().max() / (2 ** (bits - 1) - 1)
        assert len(torch.unique(row)) < 2**bits and (row - original).abs().max() <= 0.5001 * step
