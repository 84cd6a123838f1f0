"""Tests of the page that compares schemes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mtlsign.reports.comparison import (
    cheapest_removals,
    render_comparison_report,
    rows_by_scheme,
    short_labels,
)


def row(scheme: str, attack: str, bits: float | None, lost: float | None, **values: Any) -> dict[str, Any]:
    return {
        "scheme": scheme, "attack": attack, "n": 0 if bits is None else 3, "matches": bits,
        "sd matches": 1.0, "of": None if bits is None else 256, "null rate": 0.5, "bits": bits,
        "sd bits": 2.0, "points lost": lost, "sd points lost": 0.5, "epochs": None, "reason": None,
        "accepted": int(bits is not None and bits >= 40), **values,
    }  # fmt: skip


ROWS = [
    row("uchida", "none", 200.0, 0.3, epochs=11.1),
    row("uchida", "ftal lr=full", 190.0, 4.0),
    row("uchida", "scale_filters", 0.0, 0.0),
    row("uchida", "extract", 0.0, 12.0),
    row("<adi>", "none", 100.0, 1.0),
    row("<adi>", "ftal lr=full", 10.0, 2.0),
    row("<adi>", "scale_filters", 100.0, 0.0),
    row("<adi>", "extract", None, None, reason="diverged: the loss"),
    row("ipr_gan", "none", None, None, reason="A classifier generates no images."),
]


def test_front_has_attacks_that_no_cheaper_one_beats() -> None:
    uchida, adi, gan = rows_by_scheme(ROWS)
    assert cheapest_removals(uchida) == [(0.0, 0.0, "scale_filters")]
    assert cheapest_removals(adi) == [(0.0, 100.0, "scale_filters"), (2.0, 10.0, "ftal lr=full")]
    assert gan.bits is None and cheapest_removals(gan) == []
    assert adi.share_left(ROWS[5]) == pytest.approx(0.1) and gan.share_left(ROWS[8]) is None


def test_labels_keep_parameters_that_differ() -> None:
    attacks = ["prune ratio=0.5 bn=kept", "prune ratio=0.7 bn=kept", "ftal lr=full", "int8"]
    assert list(short_labels(attacks).values()) == ["prune ratio=0.5", "prune ratio=0.7", "ftal", "int8"]


def test_page_has_spread_reasons_and_escapes_names() -> None:
    page = render_comparison_report({"task": "digits", "run": "r", "rows": ROWS, "bits_required": 40.0})
    assert "2 of 3 schemes marked the network. 3 attacks ran on each, with 3 seeds." in page
    fewer = [{**line, "n": 1} if line["scheme"] == "uchida" else line for line in ROWS]
    assert "on each, with 1 to 3 seeds." in render_comparison_report({"task": "digits", "rows": fewer})
    assert "<adi>" not in page and "&lt;adi&gt;" in page
    assert "200 ± 2" in page and "11.1" in page and "diverged: the loss" in page
    assert "A classifier generates no images." in page
    assert page.count("<svg") == 3, "a heat map and a panel for each scheme with attacks"
    assert "a claim is accepted from 40 bits" in page
    cells = re.findall(r">(\(?\d+\)?|–)</text>", page)
    assert {"190", "(10)", "(0)", "–"} <= set(cells), "brackets mark rejected claims"
