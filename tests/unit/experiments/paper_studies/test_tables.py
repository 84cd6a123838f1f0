"""Tests of the studies' tables."""

from __future__ import annotations

from typing import Any

import pytest

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.experiments.paper_studies.definitions import RATIOS
from mtlsign.experiments.paper_studies.tables import markdown, table

DEFAULT_KINDS = "noise,pruned,decorrelated,spoiled"


def study(name: str) -> ReproduceSettings:
    return ReproduceSettings.of({"study": name})


def ablation_row(
    ratio: float | None, seed: int = 0, attack: str = "prune_channels", **changes: Any
) -> dict[str, Any]:
    """Return a row whose watermark falls below γ at pruning ratio `ratio`; a ratio r costs 10 r points."""
    row: dict[str, Any] = {
        "status": "ok", "head": "keyed", "lambda1": 0.1, "lambda2": 0.1, "seed": seed,
        "primary_marked": 0.9 + seed / 100, f"wm fine_{attack} ratio=0.5 epochs=5": 0.95,
    }  # fmt: skip
    for r in RATIOS:
        removed = ratio is not None and r >= ratio
        row[f"wm {attack} ratio={r:g} bn=kept"] = 0.69 if removed else 0.7
        row[f"points lost {attack} ratio={r:g} bn=kept"] = 10 * r
    return row | changes


@pytest.mark.parametrize("attack", ["prune", "prune_channels"])
def test_ablation_table_averages_cost_of_pruning_over_seeds(attack: str) -> None:
    rows = [
        ablation_row(0.4, attack=attack),
        ablation_row(0.6, 1, attack),
        ablation_row(None, 2, attack),
        ablation_row(0.1, attack=attack, status="diverged"),
    ]
    (row,) = table(study("ablation"), rows)
    assert row["n"] == 3 and row["R_func"] and row["R_DA"] and row["NP never does"] == 1
    assert row["primary"] == pytest.approx(0.91) and row["sd primary"] == pytest.approx(0.01)
    assert row["points lost until NP takes the mark below gamma"] == pytest.approx((4 + 6 + 9) / 3)
    assert row["wm accuracy after FP"] == pytest.approx(0.95)
    text = markdown([row])
    assert "0.91 ± 0.01" in text and "| with |" in text and len(text.splitlines()) == 3


def test_overwriting_table_compares_with_values_of_the_paper() -> None:
    columns = {f"wm overwrite epochs={e} head=free n=0": 1 - e / 10_000 for e in (50, 350)}
    columns |= {f"bits overwrite epochs={e} head=free n=0": 600.0 - e for e in (50, 350)}
    rows = [{"status": "ok", "head": "free", "wm_accuracy": 1.0, "seed": i, **columns} for i in range(2)]
    table_rows = table(study("overwriting"), rows)
    assert [(r["epochs"], r["the paper"], r["n"]) for r in table_rows] == [(50, 2.0, 2), (350, 2.5, 2)]
    assert table_rows[1]["points of wm accuracy lost"] == pytest.approx(3.5)
    assert table_rows[1]["bits left"] == 250


@pytest.mark.parametrize(
    ("task", "dataset", "values"),
    [
        ("sst2@0.5", "SST", [2.5, 2.5]),
        ("sst5", "SST", [2.5, 2.5]),
        ("imdb@0.05", "IMDb", [3.0, 3.0]),
        ("files", "VirusShare", [0.0, 0.5]),
        ("voc", "VOC", [1.3, 2.1]),
        ("digits", None, [None, None]),
    ],
)
def test_overwriting_table_names_the_data_of_the_paper(
    task: str, dataset: str | None, values: list[float | None]
) -> None:
    columns = {f"wm overwrite epochs={e} head=same n=0": 0.99 for e in (50, 350)}
    common = {"status": "ok", "wm_accuracy": 1.0, "seed": 1, "task": task, **columns}
    rows = [{**common, "head": "free", "preset": "paper"}, {**common, "head": "spread"}]
    table_rows = table(study("overwriting"), rows)
    assert [r["owner's head"] for r in table_rows] == ["paper", "paper", "spread", "spread"]
    assert [r["the paper"] for r in table_rows] == values * 2
    assert {r["the paper's data"] for r in table_rows} == {dataset}


def test_ablation_table_separates_preset_and_heads() -> None:
    rows = [ablation_row(0.4, head="free", preset="paper"), ablation_row(0.4, head="free")]
    assert [r["head"] for r in table(study("ablation"), rows)] == ["free", "paper"]


def test_attack_table_has_means_per_variant_and_attack() -> None:
    rows = [
        {"status": "ok", "lambda2": 1.0, "seed": i, "wm_accuracy": 1.0, "evidence_bits": 1000.0 + i,
         "primary_clean": 0.91, "primary_marked": 0.9, "wm int8": 0.9, "bits int8": 500.0 + 100 * i,
         "points lost int8": 0.5}
        for i in range(3)
    ]  # fmt: skip
    table_rows = table(study("attacks"), rows)
    assert [(r["head"], r["R_DA"], r["attack"], r["n"]) for r in table_rows] == [
        ("keyed", DEFAULT_KINDS, "none", 3), ("keyed", DEFAULT_KINDS, "int8", 3),
    ]  # fmt: skip
    assert table_rows[0]["points lost"] == pytest.approx(1.0)
    assert (table_rows[1]["bits"], table_rows[1]["sd bits"], table_rows[1]["fewest bits"]) == (600, 100, 500)


def test_markdown_of_no_rows_is_an_empty_table() -> None:
    assert markdown([]) == "|  |\n|"
