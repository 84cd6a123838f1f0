"""Tests of standardised features."""

from __future__ import annotations

import torch

from mtlsign.watermark.verification.features import MIN_STD, Features


def test_features_from_taps_standardises_and_zeroes_constant_coordinates() -> None:
    flat = torch.tensor(
        [[1.0, 5.0, 0.0], [3.0, 5.0, 1.5 * MIN_STD], [5.0, 5.0, 0.0], [7.0, 5.0, 1.5 * MIN_STD]]
    )
    f = Features.from_taps(flat.requires_grad_(True))
    assert f.inverse_std[1] == 0 and f.inverse_std[2] == 0  # std 0 and 0.75e-5
    torch.testing.assert_close(f.inverse_std[0], torch.tensor(5.0**-0.5))
    torch.testing.assert_close(f.standardised[:, 0], torch.tensor([-3.0, -1, 1, 3]) / 5**0.5)
    assert not f.standardised[:, 1:].any()
    f.standardised.square().mul(torch.rand(4, 3)).sum().backward()
    assert torch.isfinite(flat.grad).all()  # type: ignore[arg-type]
    alive = Features.from_taps(flat.detach() * 3)
    assert alive.inverse_std[2] > 0
