"""Tests of the numerical context of verifier models."""

from __future__ import annotations

import torch

from mtlsign.watermark.verification.model import exact_fp32


def test_exact_fp32_overrides_and_restores_caller_settings() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        a = torch.randn(8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert (a @ a).dtype == torch.bfloat16
            with exact_fp32():
                assert (a @ a).dtype == torch.float32
                assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
