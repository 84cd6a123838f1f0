"""Tests of the embedding report: missing data, escaping of values, self-containment."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mtlsign.reports.embedding import render_embedding_report

N = 128


def example_run() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, list[float]]]:
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
    """Parser that collects tags, attributes and the labels of figures."""

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


def test_report_of_complete_run_is_self_contained_and_has_text_alternatives(tmp_path: Path) -> None:
    text = render_embedding_report(*example_run())
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
    assert "128 of 128 watermark bits" in text and "10<sup>−38.5</sup>" in text
    assert "fell by 0.27 points" in text and "360 samples" in text


def test_report_of_equal_data_has_equal_bytes() -> None:
    assert render_embedding_report(*example_run()) == render_embedding_report(*example_run())


def test_report_of_hostile_values_escapes_markup_and_formulas() -> None:
    result, history, scores = example_run()
    hostile = "<script>alert(1)</script>{{ 7*7 }}\x00"
    result |= {"task": hostile, "kit": hostile, "status": hostile, "model_digest": "x" * 10_000}
    result["deviation_by_layer"] = {hostile: 1.0, "$\\frac{": 2.0}
    text = render_embedding_report(result, history, scores)
    assert "<script" not in text and "49" not in re.findall(r"<td>(.*?)</td>", text)[0]
    assert "\x00" not in text and "x" * 301 not in text


@pytest.mark.parametrize("result", [{}, {"evidence_bits": math.nan}, {"primary_clean": "high", "n": None}])
def test_report_without_data_leaves_parts_out(result: dict[str, Any]) -> None:
    text = render_embedding_report(result, {}, {})
    assert "<svg" not in text and "No verdict" in text
    partial = render_embedding_report(
        result, {"phase1": [{"epoch": 0}, {"loss": 1.0}], "phase2": []}, {"marked": []}
    )
    assert "<svg" not in partial


def test_report_headline_states_each_verdict() -> None:
    result, _, _ = example_run()
    assert "too weak to count" in render_embedding_report(result | {"evidence_bits": 20.0}, {}, {})
    assert "too weak to count" in render_embedding_report(result | {"accepted": False}, {}, {})
    assert "committed" in render_embedding_report(result | {"status": "needs_commitment"}, {}, {})
    assert "does not mean" in render_embedding_report(result | {"status": "not_verifiable"}, {}, {})
