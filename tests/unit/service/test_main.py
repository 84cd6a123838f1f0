"""Commands of the operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtlsign.errors import SettingsError
from mtlsign.service import __main__ as command
from mtlsign.service.auth import tokens
from mtlsign.service.database import Database


@pytest.mark.parametrize("hours", ["0", "-5", "nan", "inf", "87601"])
def test_token_command_with_invalid_hours_is_refused(hours: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="hours"):
        command.main(["token", "n", f"--hours={hours}", "--state-dir", str(tmp_path / "s")])
    assert not (tmp_path / "s").exists()


def test_token_command_with_new_state_folder_prints_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_new in (True, False):
        command.main(["token", "n", "--hours", "2", "--state-dir", str(tmp_path / "s")])
        out, err = capsys.readouterr()
        assert ("is new" in err) is is_new and len(out.split()) == 1
    database = Database(tmp_path / "s" / "service.sqlite")
    assert tokens.check(database, out.strip()).name == "n"
    ((created, expires),) = database.fetch_all("SELECT created, expires FROM tokens LIMIT 1")
    assert expires - created == pytest.approx(7200)
