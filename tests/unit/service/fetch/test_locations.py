"""Allowed locations."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import SettingsError
from mtlsign.service.fetch.locations import AllowedLocations, HttpsResource, LocalFile, S3Object, UploadedFile
from mtlsign.service.problems import Problem
from tests.unit.service.fixtures import ALLOWED, problem_kind


def test_resolve_below_prefix_returns_location() -> None:
    assert ALLOWED.resolve("sha256:" + "ab" * 32) == UploadedFile("ab" * 32)
    assert ALLOWED.resolve("file:///srv/models/x/m.safetensors") == LocalFile(
        "/srv/models", ("x", "m.safetensors")
    )
    assert ALLOWED.resolve("s3://good/pre/models/d") == S3Object("good", "pre/models/d")
    assert ALLOWED.resolve("https://models.example.org/a/m.safetensors?v=1") == HttpsResource(
        "models.example.org", 443, "/a/m.safetensors?v=1"
    )
    assert ALLOWED.resolve("https://CDN.example.net:8443/z") == HttpsResource("cdn.example.net", 8443, "/z")


@pytest.mark.parametrize(
    "pointer",
    [
        "", "x" * 3000, "/etc/passwd", "file:///etc/passwd", "file:///srv/models/../../etc/passwd",
        "file:///srv/models/%2e%2e/x", "file:///srv/modelsX/a", "file://host/srv/models/a", "file:///srv/models\x00",
        "file:///srv/models/a\\..\\b", "s3://good/other/a", "s3://good/prefix", "s3://evil/pre/a",
        "s3://good/pre/a?endpoint_override=127.0.0.1:80&scheme=http", "s3://k:s@good/pre/a", "http://models.example.org/a/x",
        "https://models.example.org/b/x", "https://models.example.org:444/a/x", "https://user@models.example.org/a/x",
        "https://127.0.0.1/a/x", "https://[::1]/a", "https://2130706433/a", "https://0x7f.1/a", "https://localhost/a",
        "https://models.example.org.evil.com/a/x", "https://models.example.org/a/../b", "https://models.example.org/a/x#f",
        "ftp://models.example.org/a", "data:,x", "gopher://x", "sha256:" + "AB" * 32, "sha256:abc", "s3://good/pre/ü",
        "https://mödels.example.org/a", "file:///srv/models/a//b",
    ],
)  # fmt: skip
def test_resolve_outside_prefixes_is_refused(pointer: str) -> None:
    assert problem_kind(lambda: ALLOWED.resolve(pointer)) == "pointer-refused"


@given(
    st.text(max_size=60)
    | st.text("/.%:@s3filehtp\\?#[]", max_size=40).map(lambda t: "file:///srv/models/" + t)
)
def test_resolve_any_text_is_refused_or_below_prefix(text: str) -> None:
    try:
        location = ALLOWED.resolve(text)
    except Problem as problem:
        assert problem.kind == "pointer-refused" and (not text or text not in problem.detail or len(text) < 3)
        return
    if isinstance(location, LocalFile):
        assert os.path.normpath(os.path.join(location.root, *location.parts)).startswith("/srv/models")
        assert ".." not in location.parts


def test_parse_invalid_prefix_raises_settings_error() -> None:
    for text in ("ftp://x", "/srv", "https://127.0.0.1/", "s3://A"):
        with pytest.raises(SettingsError, match="allowed-locations"):
            AllowedLocations.parse(text)
