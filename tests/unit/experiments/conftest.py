"""Fixture: runs without curves in their reports."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _empty_figures(request: pytest.FixtureRequest) -> None:
    """Draw curves only in the tests marked `figures`."""
    if request.node.get_closest_marker("figures") is None:
        request.getfixturevalue("empty_figures")
