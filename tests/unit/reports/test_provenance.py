"""Tests of the origin that every report states."""

from __future__ import annotations

from typing import Any

import pytest

from mtlsign.reports.attacks import costless_removals, render_attack_report
from mtlsign.reports.embedding import render_embedding_report
from mtlsign.reports.provenance import provenance
from mtlsign.reports.sweeps import render_sweep_report

ORIGIN: dict[str, Any] = {
    "created": "2026-11-28T21:30:00Z", "run": "r1", "mtlsign": "0.1.0", "bits_required": 120.0,
    "public_key": "ab" * 32,
}  # fmt: skip
ROW: dict[str, Any] = {
    "attack": "int8", "parameters": "", "kind": "function_preserving", "status": "ok",
    "verdict": "rejected", "removed": True, "accepted": False,
    "points_lost": 0.0, "evidence_bits": 3.0, "wm_accuracy": 0.5, "primary_after": 0.9,
    "steps": None, "images": None, "seconds": 1.0, "reason": None,
}  # fmt: skip


def attack_result(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        **ORIGIN, "task": "digits", "model": "m", "rows": list(rows), "attacks": len(rows), "marked": 1,
        "removed": sum(row["removed"] is True for row in rows), "max_points_lost": 5.0, "budget": 0.0,
        "seed": 0, "lr": 0.1, "diverged": 0, "not_applicable": 0, "failed": 0,
        "command": "mtlsign attack --model m",
    }  # fmt: skip


def sweep_result() -> dict[str, Any]:
    return {
        **ORIGIN, "space": "smoke", "groups": [], "front": [], "rows": [], "recommended": None, "why": "",
        "vary": [], "cells": 0, "ok": 0, "stopped": 0, "diverged": 0, "failed": 0, "attacks": "int8",
        "max_drop": 0.3, "command": "mtlsign sweep --space smoke",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["embedding", "attack", "sweep"])
def test_page_states_date_run_version_policy_key_and_command(kind: str) -> None:
    if kind == "embedding":
        text = render_embedding_report(ORIGIN | {"model_path": "/a b/m", "kit": "k"}, {}, {})
        command = "mtlsign verify --model &#39;/a b/m&#39; --kit k"
    elif kind == "attack":
        text, command = render_attack_report(attack_result(ROW)), "mtlsign attack --model m"
    else:
        text, command = render_sweep_report(sweep_result()), "mtlsign sweep --space smoke"
    assert f"<code>{command}</code>" in text
    for value in ("2026-11-28T21:30:00Z", "r1", "mtlsign 0.1.0", "from 120 bits of evidence", "ab" * 32):
        assert value in text, value
    assert "prefers-color-scheme: dark" in text and 'content="light dark"' in text


def test_provenance_of_incomplete_result_leaves_rows_out() -> None:
    assert provenance({}) == []
    assert provenance({"run": "<b>", "bits_required": None}) == [("Run", "<b>")]


def test_attack_report_names_removals_without_cost() -> None:
    costly = ROW | {"attack": "prune", "parameters": "ratio=0.9", "kind": "removal", "points_lost": 2.5}
    kept = ROW | {"attack": "noise", "removed": False}
    assert costless_removals([ROW, costly, kept, ROW | {"points_lost": -0.1, "attack": "x"}]) == ["int8", "x"]
    text = render_attack_report(attack_result(ROW, costly, kept))
    assert "2 of 3 attacks removed the watermark, and 1 of them cost no accuracy: int8." in text
    assert text.count(", at no cost") == 1
    assert "Each of them costs accuracy." in render_attack_report(attack_result(costly, kept))
