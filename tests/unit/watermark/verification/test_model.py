"""Tests of the numerical context of verifier models."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mtlsign.watermark.verification import model
from mtlsign.watermark.verification.model import exact_fp32


def precisions() -> list[str]:
    return [operator.fp32_precision for operator in model._PRECISIONS]


def set_precisions(values: list[str]) -> None:
    for operator, precision in zip(model._PRECISIONS, values, strict=True):
        operator.fp32_precision = precision


@pytest.fixture(params=["none", "ieee", "tf32"], autouse=True)
def _earlier_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start from the settings that an earlier program may have left, and restore those of this process."""
    before = precisions()
    set_precisions([request.param] * len(before))
    if request.param == "none":  # as torch starts
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    set_precisions(before)


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
    with exact_fp32():
        assert set(precisions()) == {"ieee"}
    assert precisions() == before


def test_exact_fp32_keeps_inheritance_of_general_precision() -> None:
    with exact_fp32():
        pass
    torch.backends.fp32_precision = "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_exact_fp32_overrides_and_restores_legacy_setting() -> None:
    torch.backends.cudnn.allow_tf32 = True
    with exact_fp32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.allow_tf32


def test_exact_fp32_overlapping_threads_restore_settings_of_caller() -> None:
    before = precisions()
    first, second = exact_fp32(), exact_fp32()
    with ThreadPoolExecutor(1) as thread:
        first.__enter__()
        thread.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert set(precisions()) == {"ieee"}, "the second thread still computes"
        thread.submit(second.__exit__, None, None, None).result()
    assert precisions() == before
