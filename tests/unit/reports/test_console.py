"""Progress lines, tables and JSON on the terminal."""

from __future__ import annotations

import json

import pytest

from mtlsign.reports import console
from mtlsign.reports.attack_console import format_result
from mtlsign.reports.embedding_console import EmbedLine


def test_live_line_without_a_terminal_is_plain_and_rare(capsys: pytest.CaptureFixture[str]) -> None:
    line = console.LiveLine(every=3600)
    for i in range(50):
        line.show(f"step {i}")
    line.show("done", final=True)
    line.log("whole")
    assert capsys.readouterr().err.splitlines() in (["step 0", "done", "whole"], ["done", "whole"])
    quiet = console.LiveLine(quiet=True)
    quiet.show("x", final=True)
    quiet.log("y")
    assert capsys.readouterr().err == ""


def test_embed_line_prints_a_warning_as_a_separate_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = EmbedLine()
    line.row({"phase": "mark", "step": 0, "of": 2, "warning": "The clean model is at chance."})
    line.row({"phase": "mark", "step": 2, "of": 2, "wm_accuracy": 1.0})
    line.end()
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "warning: The clean model is at chance." and "100%" in others[-1]


def test_embed_line_prints_one_line_per_phase(capsys: pytest.CaptureFixture[str]) -> None:
    line = EmbedLine()
    line.row({"phase": "clean", "step": 10, "of": 40, "epoch": 1, "loss": 1.25})
    line.row({"phase": "clean", "epoch": 2, "of": 2, "loss": 0.5, "validation_accuracy": 0.75, "seconds": 3})
    line.row({"phase": "mark", "step": 5, "of": 10, "wm_loss": 0.3, "wm_accuracy": 0.9})
    line.row({"phase": "mark", "step": 10, "of": 10, "wm_loss": 0.1, "wm_accuracy": 1.0})
    line.row({"phase": "mark", "step": 1, "of": 10, "wm_loss": 0.9})  # the next cell of a sweep
    line.row({"phase": "attacks", "step": 1, "of": 3, "attack": "int8"})
    line.end()
    *shown, next_cell, attacks = capsys.readouterr().err.splitlines()
    assert "10%" in next_cell and "0.900" in next_cell and "33% · now int8" in attacks
    assert "phase 1, task training 100%" in " ".join(shown[-2].split()) and "validation 75.00%" in shown[-2]
    assert "phase 2, watermark 100%" in shown[-1] and "bits 100.0%" in shown[-1]
    assert all(ord(c) >= 32 for text in shown for c in text)


def test_table_and_print_json_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.table([("a", "1"), ("long", "2")]) == "  a     1\n  long  2"
    console.print_json({"b": 1, "a": [0.5]})
    assert json.loads(capsys.readouterr().out) == {"b": 1, "a": [0.5]}
    with pytest.raises(ValueError):
        console.print_json({"a": float("nan")})


def test_embed_line_of_any_row_fits_80_columns_and_keeps_bits_and_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = EmbedLine()
    row = {"wm_loss": 12.345, "snapshot_loss": 12.345, "distillation_loss": 12.3456, "wm_accuracy": 1.0}
    row |= {"snapshot_accuracy": 1.0, "of": 1_000_000, "phase": "mark"}
    line.row({**row, "step": 10})
    line.row({**row, "step": 999_000})
    line.end()
    line.row({"phase": "clean", "epoch": 9999, "of": 10_000, "loss": 12.345, "validation_accuracy": 0.5})
    line.end()
    for text in capsys.readouterr().err.splitlines():
        assert len(text) < 80 and ("phase 1" in text or "bits 100.0%" in text), text


def test_attack_line_fits_80_columns_and_starts_with_removal() -> None:
    row = {
        "attack": "ftal", "parameters": "lr=quarter", "status": "ok", "verdict": "rejected",
        "evidence_bits": 1024.0, "points_lost": 10.25, "removed": True, "seconds": 1234.5,
    }  # fmt: skip
    text = format_result(row)
    assert text == "REMOVED · ftal lr=quarter · evidence 1024 bits, +10.25 points lost · 1234.5 s"
    assert len(f" 12/40 {format_result(row | {'removed': False})}") < 80
