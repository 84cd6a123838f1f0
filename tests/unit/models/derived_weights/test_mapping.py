"""Names, views and laziness of the mapping, and arbitrary files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.derived_weights import DerivedWeights
from mtlsign.models.derived_weights.forms import FORMS
from tests.unit.models.derived_weights.files import codes, nf4_file, numbers, packed_file

SUFFIXES = sorted({suffix for form in FORMS for suffix in (*form.required, *form.optional)})


class UnreadableFile(Mapping[str, Tensor]):
    """Names without tensors."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError("a tensor was read")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_names_are_recognised_without_reading_a_tensor() -> None:
    names = ["b.bias", "b.weight_g", "b.weight_v", "a.weight", "c.weight", "c.weight_scale", "xweight_g"]
    view = DerivedWeights(UnreadableFile(*names))
    assert list(view) == ["a.weight", "b.bias", "b.weight", "c.weight", "xweight_g"]
    assert len(view) == 5 and "b.weight" in view and "b.weight_g" not in view
    assert [list(other) for other in view.alternatives()] == [list(view), list(view)]
    with pytest.raises(KeyError):
        view["b.weight_g"]


def test_names_without_all_companions_are_unchanged() -> None:
    names = ["a.weight_g", "b.weight_packed", "b.weight_shape", "c.SCB", "d.parametrizations.weight.original"]
    assert list(DerivedWeights(UnreadableFile(*names))) == names


def test_ten_thousand_long_names_are_recognised_quickly() -> None:
    names = [f"{'x' * 700}.{i // 2}.{('weight_g', 'weight_v')[i % 2]}" for i in range(10_000)]
    view = DerivedWeights(UnreadableFile(*names))
    assert len(view) == 5_000 and len(view.alternatives()) == 1


def test_other_tensors_are_passed_through() -> None:
    file = {"bn.num_batches_tracked": torch.tensor(3), "l.weight": numbers(3, 4).half(), "u": codes(0, 9, 2)}
    (view,) = DerivedWeights(file).alternatives()
    assert all(view[name] is tensor for name, tensor in file.items()) and len(view) == 3


def test_decoy_under_the_plain_name_gives_two_views() -> None:
    decoy, g, v = numbers(4, 5, seed=9), numbers(4, 1), numbers(4, 5)
    file = {"l.weight": decoy, "l.weight_g": g, "l.weight_v": v, "m.weight": decoy}
    stored, derived = DerivedWeights(file).alternatives()
    assert torch.equal(stored["l.weight"], decoy) and torch.equal(derived["m.weight"], decoy)
    torch.testing.assert_close(derived["l.weight"], g * v / v.norm(dim=1, keepdim=True))
    assert stored.form_of("l.weight") != derived.form_of("l.weight")
    assert stored.form_of("m.weight") == derived.form_of("m.weight") == stored.form_of("absent")


def test_layers_of_different_forms_with_decoys_are_derived_in_one_view() -> None:
    packed, kernel = packed_file(4)
    decoy = numbers(5, 24, seed=9)
    file = {
        **packed,
        "l.weight": decoy,
        "m.weight": decoy,
        "m.weight_orig": kernel,
        "m.weight_mask": torch.ones(5, 24),
    }
    stored, derived, _ = DerivedWeights(file).alternatives()  # the last one scales the decoy of l
    assert torch.equal(stored["l.weight"], decoy) and torch.equal(stored["m.weight"], decoy)
    torch.testing.assert_close(derived["l.weight"], kernel)
    torch.testing.assert_close(derived["m.weight"], kernel)


def test_two_forms_of_one_layer_give_a_view_each() -> None:
    packed, kernel = packed_file(4)
    file = {**packed, "l.weight_orig": 2 * kernel, "l.weight_mask": torch.ones(5, 24)}
    views = DerivedWeights(file).alternatives()
    assert [round(float((view["l.weight"] / kernel).nanmedian()), 3) for view in views] == [2.0, 1.0]


def test_all_forms_of_one_layer_give_a_view_each() -> None:
    views = DerivedWeights(UnreadableFile(*(f"l.{suffix}" for suffix in SUFFIXES))).alternatives()
    assert sorted(view.form_of("l.weight") for view in views) == list(range(-1, len(FORMS)))


def test_decoys_of_other_layers_do_not_refuse_a_file() -> None:
    decoys = {f"decoy.{suffix}": numbers(2) for suffix in SUFFIXES}
    views = DerivedWeights({**decoys, "l.weight": numbers(4, 5)}).alternatives()
    assert {view.form_of("l.weight") for view in views} == {-1}
    assert all(torch.equal(view["l.weight"], numbers(4, 5)) for view in views)


def test_order_of_the_file_has_no_influence() -> None:
    nf4, _ = nf4_file()
    file = {**nf4, "m.weight_g": numbers(4, 1), "m.weight_v": numbers(4, 5), "m.weight": numbers(4, 5)}
    readings = [
        [
            [(name, view[name].tolist()) for name in view]
            for view in DerivedWeights(dict(order)).alternatives()
        ]
        for order in (file.items(), reversed(file.items()), sorted(file.items()))
    ]
    assert readings[0] == readings[1] == readings[2]


def test_computed_tensors_are_float32_without_gradients() -> None:
    file = {"l.weight_g": numbers(4, 1).double().requires_grad_(), "l.weight_v": numbers(4, 5).bfloat16()}
    weight = DerivedWeights(file)["l.weight"]
    assert weight.dtype == torch.float32 and not weight.requires_grad


DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16),
    *(torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e8m0fnu, torch.uint16),
]


@st.composite
def stored_tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    size = torch.empty(shape, dtype=dtype).nbytes
    fill = draw(st.sampled_from([b"\0", b"\1", b"\x7f", b"\xff", b"[", b"\x3f\x80"]))
    content = bytearray((fill * size)[:size] or b"\0" * 16)
    return (
        torch.frombuffer(content, dtype=torch.uint8)[:size].clone().view(dtype).reshape(shape)
        if size
        else (torch.empty(shape, dtype=dtype))
    )


NAMES = (
    st.tuples(st.sampled_from(["", "l.", "m.", "l.weight."]), st.sampled_from(SUFFIXES)).map("".join)
    | st.text()
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, stored_tensors(), max_size=14))
def test_arbitrary_files_raise_nothing_but_model_error(file: dict[str, Tensor]) -> None:
    view = DerivedWeights(file)
    views = view.alternatives()
    for name, other in itertools.product(view, views):
        try:
            value = other[name]
        except ModelError as error:
            assert error.field == "checkpoint" and repr(name) not in str(error)
        else:
            assert value.numel() <= 16 * max(tensor.nbytes for tensor in file.values())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FORMS), st.data())
def test_arbitrary_companions_raise_nothing_but_model_error(form: object, data: st.DataObject) -> None:
    suffixes = (*form.required, *form.optional)  # type: ignore[attr-defined]
    file = {f"l.{suffix}": data.draw(stored_tensors()) for suffix in suffixes}
    for view in DerivedWeights(file).alternatives():
        try:
            view["l.weight"]
        except ModelError:
            continue
        assert view["l.weight"].numel() <= 16 * max(tensor.nbytes for tensor in file.values())
