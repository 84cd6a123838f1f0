"""Parser of form bodies."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.service.web.forms import unquote


@given(
    st.lists(st.sampled_from([b"%", b"4", b"1", b"%41", b"+", b"%c3%a9", b"x"])).map(b"".join),
    st.integers(3, 9),
)
def test_unquote_agrees_with_library(value: bytes, piece: int) -> None:
    try:
        expected = unquote_to_bytes(value.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            unquote(value, piece)
    else:
        assert unquote(value, piece) == expected
