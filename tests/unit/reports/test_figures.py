"""Tests of the figures in the embedding report."""

from __future__ import annotations

import re

from mtlsign.reports import figures


def test_draw_scores_near_zero_count_as_wrong() -> None:
    drawn = figures.draw({}, {}, {"marked": [1.0, 5e-5, -1.0, 0.0]})
    assert "marked 1 of 4 agree" in drawn["scores"]


def test_draw_long_run_stays_small() -> None:
    rows = [{"step": s, "wm_loss": 1.0 + s % 7} for s in range(50_000)]
    assert len(figures.draw({}, {"phase2": rows}, {})["phase2_loss"]) < 200_000


def test_draw_layers_keeps_order_of_network_and_legible_text() -> None:
    names = ["conv1", "layer10.conv", "layer2.conv", "a_head", *(f"block{i}" for i in range(40))]
    deviations = {name: 100.0 - i for i, name in enumerate(names)}
    text = figures.draw({"deviation_by_layer": deviations}, {}, {})["layers"]
    places = [text.index(f">{name}<") for name in names[:24]]
    assert places == sorted(places) and names[24] not in text
    box = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text)
    assert box is not None and float(box[1]) < 400 < float(box[2])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([0-9.]+)px", text)]
    assert sizes and min(sizes) >= 9
