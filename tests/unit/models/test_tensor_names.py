from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import ModelError
from mtlsign.models.tensor_names import map_names
from tests.unit.models.network import transformers_name


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


LAYERS = ["a.weight", "b.weight", "c.weight"]


def test_map_names_with_tolerated_names_takes_prefix_with_most_of_them() -> None:
    available = ["net.a.weight", "net.b.weight", "ema.c.weight", "net.other"]
    mapped = map_names(LAYERS, available, strict=True, tolerated=LAYERS)
    assert mapped == {"a.weight": "net.a.weight", "b.weight": "net.b.weight"}
    assert map_names(LAYERS, ["b.weight"], tolerated=LAYERS) == {"b.weight": "b.weight"}
    optional = map_names([*LAYERS, "n.weight"], [*available, "net.n.weight"], optional=["n.weight"],
                         strict=True, tolerated=LAYERS)  # fmt: skip
    assert optional["n.weight"] == "net.n.weight"


def test_map_names_with_complete_prefix_ignores_partial_ones() -> None:
    available = [*(f"net.{name}" for name in LAYERS), "ema.a.weight", "a.weight"]
    mapped = map_names(LAYERS, available, strict=True, tolerated=LAYERS)
    assert mapped == {name: f"net.{name}" for name in LAYERS}


@pytest.mark.parametrize(
    "available",
    [
        ["net.a.weight", "net.b.weight", "ema.b.weight", "ema.c.weight"],
        ["a.weight", "b.weight", "net.a.weight", "net.b.weight"],
        ["p.a.weight", "q.a.weight"],
    ],
)
def test_map_names_with_ambiguous_partial_prefixes_raises(available: list[str]) -> None:
    with pytest.raises(ModelError, match="Parts of the weights exist under several prefixes"):
        map_names(LAYERS, available, strict=True, tolerated=LAYERS)


def test_map_names_tolerates_only_the_given_names() -> None:
    available = ["net.a.weight", "net.b.weight"]
    mapped = map_names(LAYERS, available, tolerated=["c.weight", "a.weight"])
    assert set(mapped) == {"a.weight", "b.weight"}
    for tolerated in ([], ["a.weight"], ["a.weight", "b.weight"]):
        with pytest.raises(ModelError, match=r"1 of 3 tensors are missing, such as c\.weight"):
            map_names(LAYERS, available, tolerated=tolerated)
    # The prefix with all strict names is taken, even if another one has more of the others.
    available = ["net.a.weight", "ema.b.weight", "ema.c.weight", "net.b.weight"]
    assert map_names(LAYERS, available, tolerated=["b.weight", "c.weight"]) == {
        "a.weight": "net.a.weight", "b.weight": "net.b.weight",
    }  # fmt: skip


@pytest.mark.parametrize("available", [[], ["x"], ["xa.weight", "a.weight.y"]])
def test_map_names_with_none_of_the_tolerated_names_raises(available: list[str]) -> None:
    with pytest.raises(ModelError, match="3 of 3 tensors are missing"):
        map_names(LAYERS, available, strict=True, tolerated=LAYERS)


def test_map_names_of_other_library_tolerates_missing_names() -> None:
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    available = [f"model.{transformers_name(name)}" for name in names[:2]]
    mapped = map_names(names, available, strict=True, tolerated=names)
    assert mapped == dict(zip(names, available, strict=False))


@given(
    wanted=st.lists(words, unique=True, min_size=1, max_size=5),
    available=st.lists(words | st.text(max_size=12), max_size=8),
    count=st.integers(0, 5),
)
def test_map_names_with_tolerated_names_returns_consistent_names_or_raises(
    wanted: list[str], available: list[str], count: int
) -> None:
    try:
        mapped = map_names(wanted, available, strict=True, tolerated=wanted[:count])
    except ModelError:
        return
    assert set(wanted[count:]) <= set(mapped) <= set(wanted) and set(mapped.values()) <= set(available)
    assert len({source.removesuffix(name) for name, source in mapped.items()}) <= 1 or not mapped
