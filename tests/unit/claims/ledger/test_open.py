"""Opening of ledgers by URI."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.view import read_ledger
from mtlsign.errors import LedgerError


def test_open_ledger_with_invalid_uri_or_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE a(b)").connection.close()
    for uri in (
        "sqlite:///", "sqlite://x", "postgres://x", "etcd://", "etcd://nowhere", f"sqlite:///{tmp_path}/none.db",
        f"sqlite:///{tmp_path}/text", f"sqlite:///{tmp_path}/other.db", f"sqlite:///{tmp_path}",
    ):  # fmt: skip
        with pytest.raises(LedgerError, match="ledger: "):
            open_ledger(uri)
    empty = open_ledger(f"sqlite:///{tmp_path}/new.db", create=True)
    with pytest.raises(LedgerError, match=r"is empty\. Create it"):
        read_ledger(empty)
    empty.append(b"junk first")
    with pytest.raises(LedgerError, match="Entry 0 is not the membership"):
        read_ledger(empty)
