from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import ModelError
from mtlsign.models.tensor_names import map_names


def test_map_names_keeps_own_transformers_names() -> None:
    names = ["resnet.embedder.embedder.convolution.weight", "classifier.1.weight"]
    assert map_names(names, names) == {name: name for name in names}


def test_map_names_with_several_prefixes_raises_unless_one_is_empty() -> None:
    wanted = ["a.weight", "a.bias"]
    both = [prefix + name for prefix in ("model.", "ema.") for name in wanted]
    with pytest.raises(ModelError, match=r"several prefixes \('ema.', 'model.'\)"):
        map_names(wanted, both)
    assert map_names(wanted, [*both, *wanted]) == {name: name for name in wanted}


words = st.text("ab.", min_size=1, max_size=6)


@given(
    wanted=st.lists(words, unique=True, min_size=1, max_size=5),
    prefix=words,
    other=st.lists(words, max_size=8),
)
def test_map_names_returns_consistent_names_or_raises(
    wanted: list[str], prefix: str, other: list[str]
) -> None:
    available = [f"{prefix}.{name}" for name in wanted] + other
    try:
        mapped = map_names(wanted, available)
    except ModelError as error:
        assert "several prefixes" in str(error)
        return
    assert list(mapped) == wanted and set(mapped.values()) <= set(available)
    (start,) = {mapped[name][: -len(name)] for name in wanted}
    assert not start or start.endswith(".")
    assert all(mapped[name] == start + name for name in wanted)


@given(wanted=st.lists(st.text(max_size=8), max_size=4), available=st.lists(st.text(max_size=12), max_size=6))
def test_map_names_of_any_text_raises_model_error_only(wanted: list[str], available: list[str]) -> None:
    with contextlib.suppress(ModelError):
        assert set(map_names(wanted, available)) <= set(wanted)
