from __future__ import annotations

import pytest

from mtlsign.errors import SettingsError
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.schemes.options import scheme_from_texts
from mtlsign.schemes.uchida import UchidaScheme


def test_scheme_from_texts_converts_values() -> None:
    scheme = scheme_from_texts("uchida", ["key_size=64", "strength=0.5"], min_evidence_bits=30.0)
    assert scheme == UchidaScheme(min_evidence_bits=30.0, key_size=64, strength=0.5)
    own = scheme_from_texts("mtlsign", ["head=keyed", "key_size=128"], min_evidence_bits=30.0)
    assert own == MTLSignScheme(head="keyed", key_size=128, min_evidence_bits=30.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key_size", "is no option of 'uchida'. Write NAME=VALUE with one of key_size"),
        ("other=1", "'other=1' is no option"),
        ("min_evidence_bits=1", "is no option"),
        ("key_size=0", "key_size=0 is invalid"),
        ("key_size=1e9", "key_size=1e9 is invalid"),
        ("strength=nan", "strength=nan is invalid"),
        ("strength=-1", "strength=-1 is invalid"),
        ("key_size=" + "9" * 300, "is no option"),
    ],
)
def test_invalid_option_raises_settings_error(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match="scheme-options: ") as raised:
        scheme_from_texts("uchida", [text], min_evidence_bits=40.0)
    assert message in str(raised.value)


def test_unknown_scheme_raises_settings_error() -> None:
    with pytest.raises(SettingsError, match="Unknown scheme 'none'"):
        scheme_from_texts("none", [], min_evidence_bits=40.0)
