"""Tokens of HTTP requests, read from the headers by the service and by Ray's proxy."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from mtlsign.config.service import ServiceSettings
from mtlsign.service.auth import tokens
from mtlsign.service.auth.request_tokens import TokenReader, session_cookie, token_id_of_request
from mtlsign.service.database import FILE_NAME, Database


def test_token_id_of_request_reads_header_or_cookie_from_another_process(tmp_path: Path) -> None:
    database = Database(tmp_path / FILE_NAME)
    text = tokens.issue(database, "test", ["verify"], 1)
    session, token_id = tokens.open_session(database, text), text.split("_")[1]
    reader = TokenReader(tmp_path / FILE_NAME)
    for headers, expected in (
        ({b"authorization": b"Bearer " + text.encode()}, token_id),
        ({b"authorization": b"Bearer " + text.encode()[:-1] + b"x"}, None),
        ({b"cookie": b"__Host-mtlsign_session=" + session.encode()}, token_id),
        ({b"cookie": b"other=1; mtlsign_session=" + session.encode()}, token_id),
        ({b"cookie": b"mtlsign_session=" + session[:-1].encode() + b"x"}, None),
        ({b"cookie": b"\xff=;;"}, None),
        ({}, None),
    ):
        assert token_id_of_request(reader, headers) == expected, headers
    assert tokens.revoke(database, token_id)
    assert token_id_of_request(reader, {b"authorization": b"Bearer " + text.encode()}) is None
    database.close()


def test_token_reader_without_database_raises_and_creates_no_file(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.Error):
        TokenReader(tmp_path / FILE_NAME).fetch_all("SELECT 1 FROM tokens")
    assert not list(tmp_path.iterdir())


def test_session_cookie_has_host_prefix_exactly_over_https() -> None:
    assert session_cookie(ServiceSettings.of({})) == "mtlsign_session"
    for values in ({"public_url": "https://x.example"}, {"tls_cert": "c.pem", "tls_key": "k.pem"}):
        assert session_cookie(ServiceSettings.of(values)) == "__Host-mtlsign_session"
