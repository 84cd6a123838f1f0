"""The report page: graceful with missing data, deaf to markup in its data, self-contained."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mtlsign.reports import figures, formatting
from mtlsign.reports.embedding import format_p, render_embedding_report

N = 128


def made_up() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, list[float]]]:
    draw = random.Random(1)
    result: dict[str, Any] = {
        "task": "digits", "model": "resnet18", "seed": 0, "lambda1": 0.02, "lambda2": 1.0, "n": N,
        "primary_clean": 0.9833, "primary_marked": 0.9806, "primary_samples": 360, "wm_accuracy": 1.0,
        "wm_accuracy_on_clean": 0.5, "p_value": 2.0**-128, "evidence_bits": 128.0, "deviation_l2": 3.5,
        "seconds_phase1": 61.0, "seconds_phase2": 3.25, "model_digest": "ab" * 32, "kit": "kits/0a1b",
        "deviation_by_layer": {"conv1": 0.5, "layer1.0.conv1": 1.5},
    }  # fmt: skip
    phase1 = [{"epoch": e, "loss": 2.0 / (e + 1), "validation_accuracy": 0.9} for e in range(4)]
    constant = {"snapshot_loss": 0.7, "distillation_loss": 0.0, "wm_accuracy": 1.0}
    phase2 = [{"step": s, "wm_loss": 0.7 / (s + 1), **constant} for s in range(5)]
    scores = {
        "marked": [1.0 + draw.random() for _ in range(N)],
        "w0": [draw.gauss(0, 1) for _ in range(N)],
        "wrong_key": [draw.gauss(0, 2) for _ in range(N)],
    }
    return result, {"phase1": phase1, "phase2": phase2}, scores


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "svg":
            self.labels.append(dict(attrs).get("aria-label") or "")


@pytest.mark.parametrize(
    ("bits", "text"),
    [(1024, "10^-308.3"), (4096.0, "10^-1233.0"), (120, "10^-36.1"), (1, "0.5"), (0, "1"), (-0.0, "1"),
     (None, "not available"), (math.inf, "not available"), (math.nan, "not available")],
)  # fmt: skip
def test_p_is_written_from_bits_because_floats_underflow(bits: float | None, text: str) -> None:
    assert format_p(bits) == text


def test_whole_page_is_self_contained_and_described(tmp_path: Path) -> None:
    text = render_embedding_report(*made_up())
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "img", "object", "embed", "form", "base"} & set(page.tags)
    pairs = page.attributes
    assert any(name == "content" and value.startswith("default-src 'none';") for name, value in pairs)
    assert "://" not in text and "@import" not in text
    assert all(value.startswith("#") for name, value in pairs if name in ("href", "xlink:href", "src"))
    assert not re.findall(r"url\((?!['\"]?#)", text)
    assert page.tags.count("svg") == 8 and all(page.labels)
    assert "128 of 128 hidden questions" in text and "10<sup>−38.5</sup>" in text
    assert "fell by 0.27 points" in text and "360 samples" in text


def test_equal_data_give_equal_bytes() -> None:
    assert render_embedding_report(*made_up()) == render_embedding_report(*made_up())


def test_data_are_escaped_and_never_read_as_markup_or_formulas() -> None:
    result, history, scores = made_up()
    hostile = "<script>alert(1)</script>{{ 7*7 }}\x00"
    result |= {"task": hostile, "kit": hostile, "status": hostile, "model_digest": "x" * 10_000}
    result["deviation_by_layer"] = {hostile: 1.0, "$\\frac{": 2.0}
    text = render_embedding_report(result, history, scores)
    assert "<script" not in text and "49" not in re.findall(r"<td>(.*?)</td>", text)[0]
    assert "\x00" not in text and "x" * 301 not in text


@pytest.mark.parametrize("result", [{}, {"evidence_bits": math.nan}, {"primary_clean": "high", "n": None}])
def test_missing_parts_are_left_out(result: dict[str, Any]) -> None:
    text = render_embedding_report(result, {}, {})
    assert "<svg" not in text and "No verdict" in text
    partial = render_embedding_report(
        result, {"phase1": [{"epoch": 0}, {"loss": 1.0}], "phase2": []}, {"marked": []}
    )
    assert "<svg" not in partial


def test_verdicts_are_told_apart() -> None:
    result, _, _ = made_up()
    assert "too weak to count" in render_embedding_report(result | {"evidence_bits": 20.0}, {}, {})
    assert "too weak to count" in render_embedding_report(result | {"accepted": False}, {}, {})
    assert "committed" in render_embedding_report(result | {"status": "needs_commitment"}, {}, {})
    assert "does not mean" in render_embedding_report(result | {"status": "not_verifiable"}, {}, {})


def test_scores_below_the_floor_count_as_wrong() -> None:
    drawn = figures.draw({}, {}, {"marked": [1.0, 5e-5, -1.0, 0.0]})
    assert "marked 1 of 4 agree" in drawn["scores"]


def test_wilson_interval_agrees_with_the_textbook() -> None:
    low, high = formatting.wilson(0.5, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)
    assert (formatting.wilson(0.0, 10)[0], formatting.wilson(1.0, 10)[1]) == pytest.approx((0.0, 1.0))


def test_long_runs_stay_small() -> None:
    rows = [{"step": s, "wm_loss": 1.0 + s % 7} for s in range(50_000)]
    assert len(figures.draw({}, {"phase2": rows}, {})["phase2_loss"]) < 200_000
