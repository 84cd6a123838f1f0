"""Tests of the exception hierarchy."""

from __future__ import annotations

import pickle

import pytest

from mtlsign import errors
from mtlsign.errors import DataError, FormatError, MTLSignError


@pytest.mark.parametrize(
    "error",
    [
        DataError("The file is missing. Pass --download.", field="data"),
        DataError("The file is missing. Pass --download."),
        FormatError("The field is missing", "Use another file.", field="spec"),
    ],
)
def test_error_pickled_keeps_message_and_fields(error: MTLSignError) -> None:
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is type(error) and str(restored) == str(error)
    assert vars(restored) == vars(error)


def test_every_error_class_is_documented() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert MTLSignError in kinds and all(kind.__doc__ for kind in kinds)
