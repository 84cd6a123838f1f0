from __future__ import annotations

from typing import Any

import pytest

from mtlsign.errors import SettingsError
from mtlsign.schemes import SCHEMES, WatermarkScheme, default_scheme, make_scheme
from mtlsign.schemes.mtlsign import MTLSignScheme


def test_make_scheme_passes_options() -> None:
    assert make_scheme("mtlsign", head="free", hidden=8) == MTLSignScheme(head="free", hidden=8)


def test_make_scheme_with_unknown_name_raises_settings_error() -> None:
    with pytest.raises(SettingsError, match="scheme: Unknown scheme 'other'"):
        make_scheme("other")


def test_schemes_are_registered_under_their_names() -> None:
    scheme: WatermarkScheme[Any] = default_scheme()
    assert scheme.name == "mtlsign" and scheme.access == "white-box"
    assert all(make_scheme(name).name == name for name in SCHEMES)
