from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import ModelError
from mtlsign.models.tensor_names import MAX_MAPPINGS, map_names, suspect_mappings
from tests.unit.models.network import transformers_name


def test_map_names_keeps_own_transformers_names() -> None:
    names = ["resnet.embedder.embedder.convolution.weight", "classifier.1.weight"]
    assert map_names(names, names) == {name: name for name in names}


def test_map_names_of_two_transformers_spellings_raises() -> None:
    names = ["conv1.weight", "layer1.0.conv1.weight"]
    full = [transformers_name(name) for name in names]
    backbone = [name.removeprefix("resnet.") for name in full]
    assert map_names(names, backbone) == dict(zip(names, backbone, strict=True))
    with pytest.raises(ModelError, match="several prefixes"):
        map_names(names, [*full, *backbone])


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


def mappings(available: list[str], **options: Any) -> list[dict[str, str]]:
    """Return the mappings of LAYERS, which are equal for every order of the file's names."""
    found = suspect_mappings(LAYERS, available, **options)
    assert suspect_mappings(LAYERS, available[::-1], **options) == found
    return found


def prefixed(prefix: str, names: list[str] = LAYERS) -> dict[str, str]:
    return {name: prefix + name for name in names}


def test_suspect_mappings_returns_every_complete_prefix() -> None:
    available = [prefix + name for prefix in ("", "net.", "x/", "y:", "z" * 600 + ".") for name in LAYERS]
    found = mappings(available)
    assert len(found) == 5
    assert all(prefixed(prefix) in found for prefix in ("", "net.", "x/", "y:", "z" * 600 + "."))
    assert mappings([f"x{name}" for name in LAYERS] + LAYERS) == [prefixed("")], (
        "a prefix is no part of a word"
    )


def test_suspect_mappings_returns_every_spelling_with_its_own_optional_names() -> None:
    names = ["conv1.weight", "layer1.0.conv1.weight"]
    norm = "bn1.weight"
    full = {name: transformers_name(name) for name in (*names, norm)}
    backbone = {name: theirs.removeprefix("resnet.") for name, theirs in full.items()}
    decoys = {name: name for name in (*names, norm)}
    available = [*backbone.values(), *decoys.values(), *full.values()]
    found = suspect_mappings([*names, norm], available, optional=[norm])
    assert found == [decoys, full, backbone]
    kernels = {name: full[name] for name in names}
    assert suspect_mappings([*names, norm], [*kernels.values(), norm], optional=[norm]) == [kernels]


def test_suspect_mappings_without_tolerance_needs_every_name() -> None:
    with pytest.raises(ModelError, match=r"1 of 3 tensors are missing, such as c\.weight"):
        mappings(["net.a.weight", "net.b.weight"])


def test_suspect_mappings_over_the_limit_raises() -> None:
    available = [f"p{i}.{name}" for i in range(MAX_MAPPINGS + 1) for name in LAYERS]
    assert len(mappings(available[: -len(LAYERS)])) == MAX_MAPPINGS
    with pytest.raises(ModelError, match="over 8 places"):
        mappings(available)
    many = [f"p{i}.{name}" for i in range(3000) for name in LAYERS[:2]]
    with pytest.raises(ModelError, match="over 8 places"):
        mappings(many, tolerated=LAYERS)


def test_suspect_mappings_with_tolerated_names_takes_prefix_with_most_of_them() -> None:
    available = ["net.a.weight", "net.b.weight", "ema.c.weight", "net.other"]
    assert mappings(available, tolerated=LAYERS) == [prefixed("net.", LAYERS[:2])]
    assert mappings(["b.weight"], tolerated=LAYERS) == [{"b.weight": "b.weight"}]
    assert mappings(["n/a.weight", "n/b.weight"], tolerated=LAYERS) == [prefixed("n/", LAYERS[:2])]
    (mapping,) = suspect_mappings(
        [*LAYERS, "n.weight"], [*available, "net.n.weight"], optional=["n.weight"], tolerated=LAYERS
    )
    assert mapping["n.weight"] == "net.n.weight"


def test_suspect_mappings_with_complete_prefix_adds_partial_ones_with_half_of_the_names() -> None:
    complete = [f"net.{name}" for name in LAYERS]
    assert mappings([*complete, "ema.a.weight", "a.weight"], tolerated=LAYERS) == [prefixed("net.")]
    partial = [f"ema.{name}" for name in LAYERS[:2]]
    assert mappings([*complete, *partial], tolerated=LAYERS) == [
        prefixed("net."), prefixed("ema.", LAYERS[:2]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "available",
    [
        ["net.a.weight", "net.b.weight", "ema.b.weight", "ema.c.weight"],
        ["a.weight", "b.weight", "net.a.weight", "net.b.weight"],
        ["p.a.weight", "q.a.weight"],
    ],
)
def test_suspect_mappings_returns_every_partial_prefix_of_equal_size(available: list[str]) -> None:
    found = mappings(available, tolerated=LAYERS)
    assert len(found) == 2 and sorted(name for m in found for name in m.values()) == sorted(available)


def test_suspect_mappings_tolerates_only_the_given_names() -> None:
    available = ["net.a.weight", "net.b.weight"]
    assert mappings(available, tolerated=["c.weight", "a.weight"]) == [prefixed("net.", LAYERS[:2])]
    for tolerated in ([], ["a.weight"], ["a.weight", "b.weight"]):
        with pytest.raises(ModelError, match=r"1 of 3 tensors are missing, such as c\.weight"):
            mappings(available, tolerated=tolerated)
    # The prefix with all strict names is taken, even if another one has more of the others.
    available = ["net.a.weight", "ema.b.weight", "ema.c.weight", "net.b.weight"]
    assert mappings(available, tolerated=["b.weight", "c.weight"]) == [prefixed("net.", LAYERS[:2])]


@pytest.mark.parametrize("available", [[], ["x"], ["xa.weight", "a.weight.y"]])
def test_suspect_mappings_with_none_of_the_tolerated_names_raises(available: list[str]) -> None:
    with pytest.raises(ModelError, match="3 of 3 tensors are missing"):
        mappings(available, tolerated=LAYERS)


def test_suspect_mappings_of_other_library_tolerates_missing_names() -> None:
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    available = [f"model.{transformers_name(name)}" for name in names[:2]]
    assert suspect_mappings(names, available, tolerated=names) == [dict(zip(names, available, strict=False))]


@given(
    wanted=st.lists(words, unique=True, min_size=1, max_size=5),
    available=st.lists(words | st.text(max_size=12), max_size=8),
    count=st.integers(0, 5),
)
def test_suspect_mappings_returns_consistent_names_or_raises(
    wanted: list[str], available: list[str], count: int
) -> None:
    try:
        found = suspect_mappings(wanted, available, tolerated=wanted[:count])
    except ModelError:
        return
    assert 1 <= len(found) <= MAX_MAPPINGS
    for mapping in found:
        assert set(wanted[count:]) <= set(mapping) <= set(wanted) and set(mapping.values()) <= set(available)
        assert len({source.removesuffix(name) for name, source in mapping.items()}) <= 1 or not mapping


def test_suspect_mappings_of_detector_body_is_found_under_any_prefix() -> None:
    names = ["backbone.body.conv1.weight", "backbone.body.layer1.weight"]
    for prefix in ("", "backbone.body.", "student.model."):
        available = [f"{prefix}conv1.weight", f"{prefix}layer1.weight", "rpn.head.weight"]
        expected = dict(zip(names, available[:2], strict=True))
        assert suspect_mappings(names, available) == [expected]


def test_suspect_mappings_of_detector_body_tolerates_missing_and_optional_names() -> None:
    names = [f"backbone.body.{name}" for name in ("conv1.weight", "layer1.weight", "bn1.weight")]
    mappings = suspect_mappings(
        names, ["conv1.weight", "bn1.weight"], optional=[names[2]], tolerated=names[:2]
    )
    assert mappings == [{names[0]: "conv1.weight", names[2]: "bn1.weight"}]
    with pytest.raises(ModelError, match="missing"):
        suspect_mappings(names, ["conv1.weight", "bn1.weight"], optional=[names[2]])
