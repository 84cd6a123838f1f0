"""The `mtlsign` command: list of commands, version, one function for a command and its job file."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import mtlsign
from mtlsign import commands
from mtlsign.config.base import setting_names
from mtlsign.errors import SettingsError
from tests.helpers.job_harness import ROOT


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        commands.main(argv)
    return caught.value.code, *capsys.readouterr()


def test_main_version_help_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "--version") == (0, f"mtlsign {mtlsign.__version__}\n", "")
    code, text, _ = outcome(capsys, "--help")
    assert code == 0 and all(name in text for name in commands.COMMANDS)
    code, out, err = outcome(capsys)
    assert (code, out, err) == (2, "", text)
    for flags in (("-V",), ("verify", "--version")):
        assert outcome(capsys, *flags) == (0, f"mtlsign {mtlsign.__version__}\n", "")
    assert outcome(capsys, "verify", "-h") == outcome(capsys, "verify", "--help")
    assert outcome(capsys, "xyz")[2] == "error: The command 'xyz' is unknown. See mtlsign --help.\n"
    assert outcome(capsys, "embbed") == (
        2,
        "",
        "error: The command 'embbed' is unknown. Did you mean 'embed'?\n",
    )


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_command_is_the_function_of_its_job_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands.command(name)
    path = ROOT / "jobs" / f"{name.replace('-', '_')}.py"
    assert runpy.run_path(str(path))["main"] is command and command.name == name
    code, text, err = outcome(capsys, name, "--help")
    assert (code, err) == (0, "") and f"usage: mtlsign {name} " in text and "--help-all" in text
    assert set(command.kind.common) <= set(setting_names(command.kind)) and command.description


@pytest.mark.parametrize(
    "name", ["verify", "publish", "claim", "council", "dispute", "reproduce", "verify-batch"]
)
def test_command_without_a_required_setting_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = outcome(capsys, name)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.endswith("is required. See --help.\n")


def test_command_without_several_required_settings_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "verify") == (
        2, "", "error: model: This setting, like --kit, is required. See --help.\n",
    )  # fmt: skip


def test_misspelt_flag_is_reported_before_torch_and_ray_are_imported() -> None:
    code = (
        "import sys\nfrom mtlsign.commands import main\n"
        "try:\n    main(['embed', '--stpes', '3'])\n"
        "finally:\n    print(*sorted({'torch', 'ray', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "\n")
    assert result.stderr == "error: --stpes: Unknown setting. Did you mean 'phase2.steps'?\n"


def test_command_unknown_name_raises_settings_error() -> None:
    with pytest.raises(SettingsError, match="The command 'x' is unknown"):
        commands.command("x")


def test_job_file_started_from_another_folder_finds_its_package(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "embed.py"), "--lamda1", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "error: --lamda1: Unknown setting. Did you mean 'lambda1'?\n",
    )
    result = subprocess.run(
        [sys.executable, "-m", "mtlsign", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"mtlsign {mtlsign.__version__}\n")
