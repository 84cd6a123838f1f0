from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mtlsign.models.untrusted import MappedTensors, has_unread_tensors, select_tensors_untrusted


def select_single(*args: Any, **options: Any) -> MappedTensors:
    """Return the result for a file that has the tensors once, or not at all."""
    (result,) = select_tensors_untrusted(*args, **options)
    return result


def test_select_tensors_untrusted_reads_requested_tensors() -> None:
    tensors = {
        "net.a.weight": torch.ones(2, 2).bfloat16(),
        "net.n.weight": torch.ones(2),
        "net.evil": torch.ones(1),
    }
    mapped = select_single({"a.weight": (2, 2)}, tensors, optional={"n.weight": (2,), "m.weight": (2,)})
    assert mapped.problem is None
    assert set(mapped.tensors) == {"a.weight", "n.weight"}
    assert all(value.dtype == torch.float32 for value in mapped.tensors.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.full((2, 2), math.nan), "NaN"),
        (torch.full((2, 2), 1e300, dtype=torch.float64), "infinity"),
        (torch.ones(2, 2, dtype=torch.int32), "int32"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.ones(3, 2), "should be"),
        (torch.ones(1).expand(10**12), "should be"),
        (torch.ones(2, 2).to_sparse(), "plain tensor"),
        (torch.ones(2, 2, device="meta"), "plain tensor"),
        ("text", "plain tensor"),
        (None, "plain tensor"),
    ],
)
def test_select_tensors_untrusted_of_invalid_tensor_gives_reason(value: Any, text: str) -> None:
    mapped = select_single({"a.weight": (2, 2)}, {"a.weight": value})
    assert not mapped.tensors and mapped.problem is not None and text in mapped.problem


def test_select_tensors_untrusted_of_invalid_names_gives_reason() -> None:
    for names in ([], ["xa.weight"], [f"p{i}.a.weight" for i in range(9)]):
        mapped = select_single({"a.weight": (1,)}, {name: torch.ones(1) for name in names})
        assert not mapped.tensors and mapped.problem
    odd: Any = {7: torch.ones(1), None: torch.ones(1)}
    assert select_single({"a.weight": (1,)}, odd).problem
    broken: Any = 5
    assert "TypeError" in (select_single({"a.weight": (1,)}, broken).problem or "")


def test_select_tensors_untrusted_yields_decoys_and_real_tensors() -> None:
    real, decoy = torch.ones(4, 1, 3, 3), torch.zeros(4, 1, 3, 3)
    wanted = {"conv1.weight": (4, 1, 3, 3)}
    both = {"net.conv1.weight": real, "conv1.weight": decoy}
    first, second = select_tensors_untrusted(wanted, both)
    assert torch.equal(first.tensors["conv1.weight"], decoy)
    assert torch.equal(second.tensors["conv1.weight"], real)
    damaged, second = select_tensors_untrusted(wanted, both | {"conv1.weight": torch.ones(3)})
    assert damaged.problem is not None and "should be" in damaged.problem
    assert torch.equal(second.tensors["conv1.weight"], real)


@pytest.mark.parametrize(
    "value", [torch.tensor([math.nan, 1]), torch.ones(3), torch.ones(2, dtype=torch.int32), None], ids=str
)
def test_select_tensors_untrusted_reads_damaged_optional_tensor_as_absent(value: Any) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "n.weight": value}
    mapped = select_single({"a.weight": (2, 2)}, tensors, optional={"n.weight": (2,)})
    assert mapped.problem is None and set(mapped.tensors) == {"a.weight"} and mapped.missing == ()


def test_select_tensors_untrusted_ignores_tensors_that_are_not_needed() -> None:
    tensors = {
        "a.weight": torch.ones(2, 2),
        "x" * 2000: torch.ones(1),
        "c": torch.ones(1, dtype=torch.complex64),
        "f8": torch.ones(1).to(torch.float8_e4m3fnuz),
        "nan": torch.tensor([math.nan]),
    }
    assert select_single({"a.weight": (2, 2)}, tensors).problem is None


def test_select_tensors_untrusted_never_quotes_a_name_of_the_file() -> None:
    prefix = "<!-- evil -->."
    for value in (torch.full((2, 2), math.nan), torch.ones(3), torch.ones(2, 2, dtype=torch.int32)):
        problem = select_single({"a.weight": (2, 2)}, {f"{prefix}a.weight": value}).problem
        assert problem is not None and "evil" not in problem and problem.startswith("'a.weight' ")


SHAPES = {"a.weight": (2, 2), "b.weight": (3,)}


@pytest.mark.parametrize(
    "value",
    [
        torch.full((2, 2), math.nan),
        torch.full((2, 2), 1e300, dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.int32),
        torch.ones(3, 2),
        torch.ones(2, 2, device="meta"),
        "text",
        None,
    ],
    ids=["nan", "overflow", "int8", "shape", "meta", "text", "none"],
)
def test_select_tensors_untrusted_tolerates_damaged_tensors(value: Any) -> None:
    tensors: Any = {"net.a.weight": value, "net.b.weight": torch.ones(3).half()}
    mapped = select_single(SHAPES, tensors, tolerated=SHAPES)
    assert mapped.problem is None and mapped.missing == ("a.weight",)
    assert set(mapped.tensors) == {"b.weight"} and mapped.tensors["b.weight"].dtype == torch.float32
    strict = select_single(SHAPES, tensors, tolerated=["b.weight"])
    assert strict.problem is not None and not strict.tensors


def test_select_tensors_untrusted_lists_missing_tolerated_tensors_in_order() -> None:
    shapes = {name: (1,) for name in ("c", "a", "b")}
    mapped = select_single(shapes, {"a": torch.ones(1)}, tolerated=shapes)
    assert (mapped.problem, mapped.missing, set(mapped.tensors)) == (None, ("c", "b"), {"a"})
    complete = select_single(shapes, dict.fromkeys(shapes, torch.ones(1)), tolerated=shapes)
    assert complete.missing == ()


def test_select_tensors_untrusted_without_readable_tensor_gives_reason() -> None:
    damaged = {"a.weight": torch.full((2, 2), math.nan), "b.weight": torch.ones(4)}
    mapped = select_single(SHAPES, damaged, tolerated=SHAPES)
    assert mapped.problem == "none of the layers can be read" and not mapped.tensors
    for tensors in ({}, {"x": torch.ones(1)}):
        absent = select_single(SHAPES, tensors, tolerated=SHAPES)
        assert absent.problem is not None and "2 of 2 tensors are missing" in absent.problem


def test_select_tensors_untrusted_yields_equal_partial_prefixes() -> None:
    tensors = {"net.a.weight": torch.ones(2, 2), "ema.a.weight": torch.zeros(2, 2)}
    ema, net = select_tensors_untrusted(SHAPES, tensors, tolerated=SHAPES)
    assert not ema.tensors["a.weight"].any() and net.tensors["a.weight"].all()
    assert ema.missing == net.missing == ("b.weight",)


@pytest.mark.parametrize(("shape", "selected"), [
    ((1, 2), True), ((8, 8), True), ((2, 3), True), ((9, 2), False), ((2, 9), False), ((0, 2), False),
    ((2, 2, 1), False), ((2,), False),
])  # fmt: skip
def test_select_tensors_untrusted_reads_resizable_kernel_up_to_four_times_its_size(
    shape: tuple[int, ...], selected: bool
) -> None:
    tensors = {"a.weight": torch.ones(shape), "b.weight": torch.ones(3)}
    mapped = select_single(SHAPES, tensors, resizable=["a.weight"])
    assert (mapped.problem is None) is selected
    assert select_single(SHAPES, tensors).problem is not None


@pytest.mark.parametrize("size", [(5, 5), (3, 5), (7, 3)])
def test_select_tensors_untrusted_drops_a_rim_of_zeros(size: tuple[int, int]) -> None:
    kernel = torch.rand(4, 3, 3, 3) + 1
    rows, columns = ((total - 3) // 2 for total in size)
    padded = torch.nn.functional.pad(kernel, (columns, columns, rows, rows))
    mapped = select_single({"a.weight": (4, 3, 3, 3)}, {"a.weight": padded.double()})
    assert torch.equal(mapped.tensors["a.weight"], kernel)


@pytest.mark.parametrize("size", [(5, 5), (4, 4), (1, 1)])
def test_select_tensors_untrusted_of_kernel_with_other_positions_gives_reason(size: tuple[int, int]) -> None:
    shapes = {"a.weight": (4, 3, 3, 3)}
    other = select_single(shapes, {"a.weight": torch.ones(4, 3, *size)}, resizable=shapes)
    assert other.problem is not None and "should be" in other.problem


@pytest.mark.parametrize(("further", "unread"), [
    ({}, False), ({"lora_A": torch.ones(2, 4)}, True), ({"step": torch.ones(1)}, False),
    ({"scales": torch.ones(7)}, False), ({"other.a.weight": torch.ones(2, 2)}, False),
    ({"xa.weight": torch.ones(2, 2)}, True), ({"x": torch.ones(1, 9, 1)}, False),
])  # fmt: skip
def test_has_unread_tensors_finds_matrices_of_no_layer(further: dict[str, Any], unread: bool) -> None:
    tensors = {"net.a.weight": torch.ones(2, 2), "net.b.weight": torch.ones(3), **further}
    assert has_unread_tensors(SHAPES, tensors) is unread


def test_has_unread_tensors_of_hostile_mapping_is_true() -> None:
    class Hostile(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise ValueError(name)

    assert has_unread_tensors(SHAPES, Hostile({"x": None}))
