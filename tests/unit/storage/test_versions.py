"""Tests of the refusal of documents of version 0."""

from __future__ import annotations

import pytest

from mtlsign.errors import OldVersionError
from mtlsign.storage.versions import refuse_version_0


@pytest.mark.parametrize(
    "tag",
    ["mtlsign/v0", "mtlsign/key-opening/v0", "urn:mtlsign:v0:vote", "mtlsign/ledger/v0/00"],
)
def test_refuse_version_0_names_tag_and_fix(tag: str) -> None:
    with pytest.raises(OldVersionError) as caught:
        refuse_version_0({"format": tag}, "format", where="spec", fix="Embed the watermark again.")
    assert str(caught.value) == (
        f"spec: The format is {tag!r}, version 0, which this release does not read. "
        "Embed the watermark again."
    )


@pytest.mark.parametrize(
    "document",
    [
        {"format": "mtlsign/v1"}, {"format": "mtlsign/v01"}, {"format": "mtlsign/v0\n"}, {"format": 0}, {},
        [], None, {"format": "mtlsign/v0/" + "x" * 101}, {"version": "mtlsign/v0"}, {"format": "https://mtlsign/v0"},
    ],
)  # fmt: skip
def test_refuse_version_0_passes_every_other_document(document: object) -> None:
    refuse_version_0(document, "format", where="spec", fix="Embed the watermark again.")
