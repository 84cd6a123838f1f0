"""Tests of the numerical context of verifier models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mtlsign.watermark.verification import model
from mtlsign.watermark.verification.model import exact_fp32


def precisions() -> list[str]:
    return [operator.fp32_precision for operator in model._PRECISIONS]


@pytest.fixture(autouse=True)
def _restored_precisions() -> Iterator[None]:
    before = precisions()
    yield
    for operator, precision in zip(model._PRECISIONS, before, strict=True):
        operator.fp32_precision = precision


def test_exact_fp32_overrides_and_restores_autocast() -> None:
    a = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exact_fp32():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_exact_fp32_overrides_and_restores_general_precision() -> None:
    torch.backends.fp32_precision = "tf32"
    before = precisions()
    with exact_fp32():
        assert set(precisions()) == {"ieee"}
    assert precisions() == before and torch.backends.fp32_precision == "tf32"


def test_exact_fp32_overrides_and_restores_precision_of_one_operator() -> None:
    torch.set_float32_matmul_precision("medium")
    before = precisions()
    assert "bf16" in before, "oneDNN multiplies in bfloat16"
    try:
        with exact_fp32():
            assert set(precisions()) == {"ieee"}
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_exact_fp32_keeps_inheritance_of_general_precision() -> None:
    with exact_fp32():
        pass
    torch.backends.fp32_precision = "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_exact_fp32_overrides_and_restores_legacy_setting() -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with exact_fp32():
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
