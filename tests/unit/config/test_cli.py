"""Command line: precedence of the sources, unknown flags, help, exit codes, the job decorator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mtlsign.config import cli
from mtlsign.config.base import Settings
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import SettingsError, StorageError


def parse(*argv: str) -> EmbedSettings:
    return cli.parse(EmbedSettings, argv)


def test_parse_flag_and_file_flag_takes_precedence(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lambda1: 0.5\nlambda2: 3\nquiet: true\namp: false\nphase1: {epochs: 3, batch: 7}\n")
    s = parse("--config", str(path), "--lambda1", "0.25", "--no-quiet", "--json", "--phase1.batch", "8")
    assert (s.lambda1, s.lambda2, s.quiet, s.amp, s.json_output) == (0.25, 3.0, False, False, True)
    assert (s.phase1.epochs, s.phase1.batch) == (3, 8)
    assert s.given_values().keys() == {
        "lambda1", "lambda2", "quiet", "amp", "json_output", "phase1.epochs", "phase1.batch",
    }  # fmt: skip
    assert parse().given_values() == {}


def test_parse_environment_takes_precedence_over_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lambda1: 0.5\nlambda2: 3\nphase2: {steps: 5, lr: 0.5}\n")
    monkeypatch.setenv("MTLSIGN_LAMBDA1", "0.75")
    monkeypatch.setenv("MTLSIGN_PHASE2__STEPS", "9")
    monkeypatch.setenv("MTLSIGN_PERTURBATION__KINDS", "noise,spoiled")
    monkeypatch.setenv("LAMBDA2", "77")
    s = parse("--config", str(path), "--phase2.lr", "0.25")
    assert (s.lambda1, s.lambda2, s.phase2.steps, s.phase2.lr) == (0.75, 3.0, 9, 0.25)
    assert s.perturbation.kinds == ("noise", "spoiled")
    assert EmbedSettings.of({"head": "keyed"}).with_defaults().lambda1 == 0.001, (
        "a mapping in Python reads no environment"
    )
    monkeypatch.setenv("MTLSIGN_PHASE2__STEPZ", "9")
    with pytest.raises(SettingsError, match=r"stepz: Unknown setting. Did you mean 'phase2.steps'"):
        parse()
    monkeypatch.delenv("MTLSIGN_PHASE2__STEPZ")
    monkeypatch.setenv("MTLSIGN_PHASE2", "secret")
    with pytest.raises(SettingsError, match=r"^environment: .*MTLSIGN_PHASE2, .* is not a JSON") as caught:
        parse()
    assert "secret" not in str(caught.value)


def test_parse_environment_with_a_list_accepts_text_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLSIGN_SET", "width=8")
    assert cli.parse(SweepSettings, []).overrides == ("width=8",)
    monkeypatch.setenv("MTLSIGN_SET", json.dumps(["width=8", "taps=a,b"]))
    assert cli.parse(SweepSettings, []).overrides == ("width=8", "taps=a,b")


def test_parse_negative_or_joined_value_is_accepted() -> None:
    assert parse("--key-size=256").key_size == 256 and parse("--max-failures", "-1").max_failures == -1
    with pytest.raises(SettingsError, match=r"^lambda1: .*greater than or equal to 0 \(got '-1'\)"):
        parse("--lambda1", "-1")


@pytest.mark.parametrize("argv", [("--lamda1", "3"), ("--lamda1=3",), ("--lambda", "3")])
def test_parse_unknown_flag_names_the_nearest(argv: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"Unknown setting\. Did you mean 'lambda[12]'"):
        parse(*argv)


def test_parse_unknown_flag_is_reported_without_torch() -> None:
    program = "import sys; from mtlsign.commands import main\ntry: main(['embed', '--lamda1', '3'])\n"
    program += "finally: assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --lamda1: Unknown setting. Did you mean 'lambda1'?\n"


def test_parse_invalid_arguments_raise_settings_error(tmp_path: Path) -> None:
    for argv in (["--lambda1"], ["stray"], ["--config", str(tmp_path / "none.yaml")]):
        with pytest.raises(SettingsError):
            parse(*argv)
    path = tmp_path / "c.yaml"
    path.write_text("lamda1: 1\n")
    with pytest.raises(SettingsError, match="Did you mean 'lambda1'"):
        parse("--config", str(path))


def test_parse_repeated_flag_gives_a_list_and_keeps_commas() -> None:
    argv = ["--model", "a,b", "--model", "[c", "--kit", "k"]
    assert cli.parse(VerifySettings, argv).models == ("a,b", "[c")
    argv = ["--set", "perturbation.kinds=noise,pruned", "--set=taps=[1,2]"]
    assert cli.parse(SweepSettings, argv).overrides == ("perturbation.kinds=noise,pruned", "taps=[1,2]")
    assert parse("--lambda1", "1", "--lambda1", "2").lambda1 == 2, "the last value of a single setting counts"
    assert parse("--data", "null").data == Path("null")


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_parse_help_lists_the_settings_and_exits_0(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda argv: parse(*argv) and None, [flag])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in ("--lambda1", "--key-size", "--resume", "--config", "N, key samples", "--help-all"):
        assert name in text
    for name in ("--no-amp", "--json", "--phase1.epochs", "--perturbation.noise-sigma"):
        assert (name in text) == (flag == "--help-all"), name


def outcome(
    error: BaseException | None, capsys: pytest.CaptureFixture[str], **options: bool
) -> tuple[object, str]:
    def main(argv: Sequence[str]) -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(main, [], **options)
    return caught.value.code, capsys.readouterr().err


def test_run_outcome_becomes_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(None, capsys) == (0, "")
    assert outcome(SettingsError("Is odd.\n  Change it.", field="lr"), capsys) == (
        2,
        "error: lr: Is odd. Change it.\n",
    )
    assert outcome(StorageError("It is gone. Start it."), capsys) == (2, "error: It is gone. Start it.\n")
    code, message = outcome(KeyboardInterrupt(), capsys)
    assert (code, message) == (130, "interrupted\n")
    code, message = outcome(KeyboardInterrupt(), capsys, resumes=True)
    assert code == 130 and message.count("\n") == 1 and "--resume" in message


def test_run_without_optional_package_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str]) -> None:
        raise ModuleNotFoundError("No module named 'ray.train'", name="ray.train")

    with pytest.raises(SystemExit) as caught:
        cli.run(main, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: ray is not installed. Run pip install 'mtlsign[all]'.\n"


def test_run_without_other_package_keeps_its_traceback() -> None:
    def main(argv: Sequence[str]) -> None:
        raise ModuleNotFoundError("No module named 'mypackage'", name="mypackage")

    with pytest.raises(ModuleNotFoundError):
        cli.run(main, [])


def test_verification_imports_no_optional_package() -> None:
    modules = "watermark.kit, mtlsign.claims.commands.offline, mtlsign.commands.verify"
    script = f"import sys, mtlsign.{modules}; print(sorted(name.partition('.')[0] for name in sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "'torch'" in output.stdout
    imported = {name for name in cli.OPTIONAL_PACKAGES if f"'{name}'" in output.stdout}
    assert imported <= {"boto3", "botocore"}, "securesystemslib imports these two if they are installed"


def test_run_defect_keeps_its_traceback() -> None:
    def main(argv: Sequence[str]) -> None:
        raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError):  # the interpreter prints it and exits with 1
        cli.run(main, [])


def test_job_output_is_a_document_with_json_and_text_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.job(Settings)
    def demo_job(settings: Settings) -> cli.Output:
        """Demonstrate."""
        return cli.Output({"owner": str(settings.owner)}, f"owner: {settings.owner}")

    assert (demo_job.name, demo_job.description) == ("demo-job", "Demonstrate.")
    demo_job(["--owner", "x"])
    assert capsys.readouterr().out == "owner: x\n"
    demo_job(["--owner", "x", "--json"])
    assert json.loads(capsys.readouterr().out) == {"owner": "x"}
    with pytest.raises(SystemExit) as caught:
        demo_job.run(["--owner"])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: Argument --owner")


def test_job_positional_and_variants_select_setting_and_command() -> None:
    calls = []

    @cli.job(VerifySettings, name="first")
    def first(settings: VerifySettings) -> None:
        calls.append(("first", settings.kit))

    @cli.job(VerifySettings, positional="model", variants={"gamma": first})
    def second(settings: VerifySettings) -> None:
        calls.append(("second", *settings.models))

    second(["m", "--kit", "k"])
    second(["--kit", "k", "--model=n"])
    second(["--model", "m", "--kit", "k", "--gamma=0.8"])
    assert calls == [("second", "m"), ("second", "n"), ("first", "k")]


@pytest.mark.parametrize(
    ("problem", "code"), [(None, 0), ("The model is rejected. Raise --phase2.steps.", 3)]
)
def test_job_with_problem_prints_its_output_and_exits_with_3(
    problem: str | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @cli.job(Settings)
    def embed(settings: Settings) -> cli.Output:
        """Return an output."""
        return cli.Output({"a": 1}, "text", problem=problem)

    for flags, out in (((), "text\n"), (("--json",), '{\n "a": 1\n}\n')):
        with pytest.raises(SystemExit) as ended:
            cli.run(embed, flags)
        assert ended.value.code == code
        assert capsys.readouterr() == (out, "" if problem is None else f"error: {problem}\n")
