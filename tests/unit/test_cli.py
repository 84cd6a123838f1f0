"""Jobs at the terminal: flags over config, one-line errors, exit codes, the live line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import SettingsError, StorageError
from mtlsign.reports import console
from mtlsign.reports.embedding_console import EmbedLine


def parse(*argv: str) -> EmbedSettings:
    return cli.parse(EmbedSettings, argv, description="")


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lambda1: 0.5\nlambda2: 3\nquiet: true\namp: false\n")
    s = parse("--config", str(path), "--lambda1", "0.25", "--no-quiet", "--json")
    assert (s.lambda1, s.lambda2, s.quiet, s.amp, s.json_output) == (0.25, 3.0, False, False, True)
    assert s.model_fields_set == {"lambda1", "lambda2", "quiet", "amp", "json_output"}
    assert parse().model_fields_set == set()


def test_values_may_be_negative_or_joined_by_an_equals_sign() -> None:
    assert parse("--key-size=256").key_size == 256 and parse("--max-failures", "-1").max_failures == -1
    with pytest.raises(SettingsError, match=r"^lambda1: .*greater than or equal to 0 \(got '-1'\)"):
        parse("--lambda1", "-1")


@pytest.mark.parametrize("argv", [("--lamda1", "3"), ("--lamda1=3",), ("--lambda", "3")])
def test_an_unknown_flag_names_the_nearest(argv: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"unknown setting; did you mean 'lambda[12]'"):
        parse(*argv)


def test_other_refusals(tmp_path: Path) -> None:
    for argv in (["--lambda1"], ["stray"], ["--config", str(tmp_path / "none.yaml")]):
        with pytest.raises(SettingsError):
            parse(*argv)
    path = tmp_path / "c.yaml"
    path.write_text("lamda1: 1\n")
    with pytest.raises(SettingsError, match="did you mean 'lambda1'"):
        parse("--config", str(path))


def test_a_repeated_model_is_a_list() -> None:
    argv = ["--model", "a", "--model", "b", "--kit", "k"]
    settings = cli.parse(VerifySettings, argv, description="", aliases={"model": "append"})
    assert settings.models == ["a", "b"]


def test_help_lists_every_option_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda argv: parse(*argv) and None, ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in ("--lambda1", "--key-size", "--no-amp", "--json", "--resume", "--config", "N, key samples"):
        assert name in shown


def outcome(
    error: BaseException | None, capsys: pytest.CaptureFixture[str], **more: bool
) -> tuple[object, str]:
    def main(argv: Sequence[str]) -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(main, [], **more)
    return caught.value.code, capsys.readouterr().err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(None, capsys) == (0, "")
    assert outcome(SettingsError("is odd;\n  mend it", field="lr"), capsys) == (
        2,
        "error: lr: is odd; mend it\n",
    )
    assert outcome(StorageError("gone; start it"), capsys) == (2, "error: gone; start it\n")
    code, said = outcome(KeyboardInterrupt(), capsys)
    assert (code, said) == (130, "interrupted\n")
    code, said = outcome(KeyboardInterrupt(), capsys, resumes=True)
    assert code == 130 and said.count("\n") == 1 and "--resume" in said


def test_a_bug_keeps_its_traceback() -> None:
    def main(argv: Sequence[str]) -> None:
        raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError):  # the interpreter prints it and exits with 1
        cli.run(main, [])


def test_the_line_without_a_terminal_is_plain_and_rare(capsys: pytest.CaptureFixture[str]) -> None:
    line = console.LiveLine(every=3600)
    for i in range(50):
        line.show(f"step {i}")
    line.show("done", final=True)
    line.say("whole")
    assert capsys.readouterr().err.splitlines() in (["step 0", "done", "whole"], ["done", "whole"])
    quiet = console.LiveLine(quiet=True)
    quiet.show("x", final=True)
    quiet.say("y")
    assert capsys.readouterr().err == ""


def test_progress_rows_become_one_line_per_phase(capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "phase 1, the task 100%" in " ".join(shown[-2].split()) and "validation 75.00%" in shown[-2]
    assert "phase 2, the mark 100%" in shown[-1] and "bits 100.0%" in shown[-1]
    assert all(ord(c) >= 32 for text in shown for c in text)


def test_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.table([("a", "1"), ("long", "2")]) == "  a     1\n  long  2"
    console.print_json({"b": 1, "a": [0.5]})
    assert json.loads(capsys.readouterr().out) == {"b": 1, "a": [0.5]}
    with pytest.raises(ValueError):
        console.print_json({"a": float("nan")})
