from __future__ import annotations

from typing import Any

import pytest

from mtlsign.experiments.paper_studies.scheme_tables import false_claim_table, fig6_table, scheme_table


def row(attack: str, parameters: str = "", **values: Any) -> dict[str, Any]:
    defaults = {"status": "ok", "verdict": "accepted", "reason": None, "accepted": True, "n": 100,
                "null_rate": 0.5, "matches": 100, "evidence_bits": 100.0, "points_lost": 0.0,
                "wm_accuracy": 1.0}  # fmt: skip
    return {"attack": attack, "parameters": parameters, **defaults, **values}


def result(seed: int, rows: list[dict[str, Any]], scheme: str = "uchida") -> dict[str, Any]:
    embedding = {"primary_clean": 0.9, "primary_marked": 0.89 - 0.01 * seed, "deviation": 0.1, "epochs": 5.5}
    return {"scheme": scheme, "seed": seed, "status": "ok", "embedding": embedding, "rows": rows}


UNSUPPORTED = {"scheme": "adi", "seed": 0, "status": "not_supported", "reason": "No images."}


def test_scheme_table_has_means_over_seeds_and_reasons() -> None:
    failed = row("ftal", status="diverged", reason="the loss", accepted=None, matches=None)
    table = scheme_table(
        [
            result(0, [row("none"), row("ftal", matches=80, evidence_bits=30.0, points_lost=2.0)]),
            result(1, [row("none"), failed]),
            UNSUPPORTED,
        ]
    )
    none, ftal, adi = table
    assert (none["n"], none["matches"], none["of"], none["sd bits"]) == (2, 100.0, 100, 0.0)
    assert none["points lost"] == pytest.approx(1.5) and none["sd points lost"] == pytest.approx(0.5**0.5)
    assert (none["accepted"], ftal["accepted"], adi["accepted"]) == (2, 1, 0)
    assert (none["epochs"], ftal["epochs"]) == (5.5, None)
    assert (ftal["n"], ftal["bits"], ftal["sd bits"]) == (1, 30.0, None)
    assert ftal["reason"] == "diverged: the loss"
    assert (adi["scheme"], adi["n"], adi["bits"], adi["reason"]) == ("adi", 0, None, "No images.")


def test_scheme_table_counts_seeds_of_each_attack() -> None:
    seeds = [result(0, [row("none"), row("int8"), row("ftal")]), result(1, [row("none"), row("ftal")])]
    counts = {line["attack"]: line["n"] for line in scheme_table(seeds)}
    assert counts == {"none": 2, "int8": 1, "ftal": 2}


def test_fig6_table_takes_first_ratio_that_invalidates() -> None:
    rows = [
        row("none"),
        row("fine_prune_channels", "ratio=0.5", wm_accuracy=0.8),
        row("prune_channels", "ratio=0.1", points_lost=1.0),
        row("prune_channels", "ratio=0.2", points_lost=3.0, accepted=False),
        row("prune_channels", "ratio=0.3", points_lost=9.0, accepted=False),
        row("spoil", "steps=20"),
    ]
    uchida, adi = fig6_table([result(0, rows), UNSUPPORTED])
    assert (uchida["points lost until NP"], uchida["points lost until spoil"]) == (3.0, None)
    assert (uchida["wm accuracy after FP"], uchida["deviation"]) == (0.8, 0.1)
    assert (adi["n"], adi["deviation"], adi["reason"]) == (0, None, "No images.")


def test_false_claim_table_counts_accepted_claims() -> None:
    claim = {"method": "tries", "tries": 5, "seconds": 2.0, "matched": 60, "n": 100, "evidence_bits": 5.0}
    results = [
        {"scheme": "zhu2020", "status": "ok", "forgery": {**claim, "accepted": accepted}}
        for accepted in (True, False)
    ]
    zhu, label = false_claim_table([*results, {"scheme": "new_label", "status": "ok", "forgery": None}])
    assert (zhu["accepted"], zhu["n"], zhu["tries"], zhu["of"], zhu["seconds"]) == (1, 2, 5, 100, 2.0)
    assert (label["method"], label["n"], label["bits"]) == ("no way known", 0, None)
