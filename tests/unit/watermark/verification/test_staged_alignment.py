"""Alignment of networks with stages: each stage has its turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks.attention_symmetries import attention_symmetries, dummy_block, rotate_stream
from mtlsign.attacks.base import AttackerResources
from mtlsign.attacks.channel_symmetries import permute_channels
from mtlsign.errors import ArtifactError
from mtlsign.models.untrusted import MappedTensors
from mtlsign.tasks import Task, from_tensors
from mtlsign.watermark.verification.alignment import TransformerAligner, make_aligner
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import placeholder_bases, response_bases
from mtlsign.watermark.verification.response_model import ResponseModel, attention_products
from tests.unit.models.swin_examples import timm_swin, torchvision_swin

REDUCTION, PATCHES = "layers.1.downsample.reduction.weight", "patch_embed.proj.weight"
MAKERS: dict[str, tuple[Callable[..., nn.Module], tuple[str]]] = {
    "timm": (timm_swin, ("layers.1",)),
    "torchvision": (torchvision_swin, ("features.3",)),
}


class Owned(NamedTuple):
    """W0, its reference and aligner, and a descendant with a little noise on its matrices."""

    model: nn.Module
    reference: Reference
    aligner: TransformerAligner
    suspect: nn.Module


@cache
def images() -> Tensor:
    return torch.rand(64, 1, 24, 24, generator=torch.Generator().manual_seed(0))


def task() -> Task:
    labels = torch.arange(64) % 4
    return from_tensors(images(), labels, test=(images(), labels))


@cache
def owned(kind: str) -> Owned:
    make, taps = MAKERS[kind]
    model = make(seed=1)
    reference = make_reference(model, taps, images()[:2], bases=response_bases(model, taps, images()))
    aligner = make_aligner(make(seed=7), taps, reference, images()[:2])
    assert isinstance(aligner, TransformerAligner)
    suspect, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in suspect.named_parameters():
            if parameter.dim() > 1 and name not in aligner.further_shapes:
                parameter.add_(0.03 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return Owned(model, reference, aligner, suspect)


def read(aligner: TransformerAligner, state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {*aligner.resizable_names, *aligner.further_names}
    return dict(aligner.align({name: t for name, t in state.items() if name in names}).kernels)


def assert_equal_readings(expected: dict[str, Tensor], aligned: dict[str, Tensor]) -> None:
    """Compare with a tolerance for turns that are found from the float16 vectors of the reference."""
    assert expected.keys() == aligned.keys()
    for name, kernel in expected.items():
        scale = float(kernel.abs().max())
        torch.testing.assert_close(
            aligned[name].double() / scale, kernel.double() / scale, atol=1e-2, rtol=0, msg=name
        )


@pytest.mark.parametrize("kind", MAKERS)
def test_all_attention_layers_and_mlps_are_read(kind: str) -> None:
    make, taps = MAKERS[kind]
    _, reference, aligner, suspect = owned(kind)
    model = ResponseModel(make(seed=3), taps, reference, images()[:2])
    own = model.select_weights(suspect.state_dict())
    aligned = read(aligner, dict(suspect.state_dict()))
    assert len(aligner.heads) == 8 and len(aligner.layers) == 16
    assert own.keys() == aligned.keys() == aligner.layers.keys() == model.kernel_shapes.keys()
    assert all(torch.equal(kernel, aligned[name]) for name, kernel in own.items())
    widths = [model.kernel_shapes[name][1] for name in aligner.heads]
    assert sorted(widths) == [16] * 4 + [32] * 4


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("attack", [attention_symmetries, rotate_stream, permute_channels])
def test_align_undoes_free_change_of_every_stage(kind: str, attack: Any) -> None:
    _, _, aligner, suspect = owned(kind)
    other = attack(suspect, task(), AttackerResources(), 3).model
    state = other.state_dict()
    assert any(not torch.equal(t, suspect.state_dict()[name]) for name, t in state.items())
    assert_equal_readings(read(aligner, dict(suspect.state_dict())), read(aligner, state))


@pytest.mark.parametrize("seed", range(3))
def test_align_undoes_all_free_changes_together(seed: int) -> None:
    _, _, aligner, suspect = owned("timm")
    other = suspect
    for attack in (rotate_stream, attention_symmetries, permute_channels):
        other = attack(other, task(), AttackerResources(), seed).model
    assert_equal_readings(read(aligner, dict(suspect.state_dict())), read(aligner, dict(other.state_dict())))


def test_common_part_of_the_columns_of_readers_changes_nothing() -> None:
    _, _, aligner, suspect = owned("timm")
    state = dict(suspect.state_dict())
    for name in aligner.products.stream.readers - {REDUCTION}:
        gain = state[aligner.products.stream.gains[name]]
        state[name] = state[name] + torch.randn(len(state[name]), 1) / gain
    assert_equal_readings(read(aligner, dict(suspect.state_dict())), read(aligner, state))


def test_dummy_blocks_of_two_stages_are_left_out_in_one_view() -> None:
    _, _, aligner, suspect = owned("timm")
    longer = dummy_block(suspect, task(), AttackerResources(), 3, place=3).model
    longer = dummy_block(longer, task(), AttackerResources(), 4, place=0).model

    def select(tensors: Any) -> list[MappedTensors]:
        names = {*aligner.resizable_names, *aligner.further_names}
        return [MappedTensors({name: tensors[name] for name in names if name in tensors}, None)]

    (view,) = aligner.renumbered(dict(longer.state_dict()), select)
    assert {n for n in view if "qkv.weight" in n} == {n for n in suspect.state_dict() if "qkv.weight" in n}
    assert all(torch.equal(view[name], t) for name, t in suspect.state_dict().items() if "blocks" in name)
    assert list(aligner.renumbered(dict(suspect.state_dict()), select)) == []


def test_recognizes_turned_descendants_only() -> None:
    _, _, aligner, suspect = owned("timm")
    turned = rotate_stream(suspect, task(), AttackerResources(), 2).model.state_dict()
    names = {*aligner.resizable_names, *aligner.further_names}
    assert aligner.recognizes({name: t for name, t in turned.items() if name in names})
    for seed in range(1, 4):
        state = timm_swin(seed=seed + 10).state_dict()
        assert not aligner.recognizes({name: t for name, t in state.items() if name in names})


def test_reference_that_was_made_without_stages_is_read_as_before() -> None:
    _, reference, _, suspect = owned("timm")
    old = {n: t for n, t in reference.tensors.items() if not n.startswith(("layers.1.", f"{REDUCTION}/"))}
    products = attention_products(timm_swin(), ("layers.1",), images()[:2], Reference(b"", old))
    assert products is not None and products.stream.stages == ()
    kernels = products.apply(dict(suspect.state_dict()))
    assert torch.equal(
        kernels["layers.1.blocks.0.attn.qkv.weight"],
        suspect.state_dict()["layers.1.blocks.0.attn.qkv.weight"],
    )
    responses = ResponseModel(timm_swin(), ("layers.1",), Reference(b"", old), images()[:2])
    assert {name.split(".")[1] for name in responses.kernel_shapes} == {"0"}


HOSTILE_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "no width": lambda rows: rows[:, :0],
    "no vectors": lambda rows: rows[:0],
    "width of the other stage": lambda rows: rows[:, :16],
    "vectors without a dimension": lambda rows: rows[:, 0],
    "more vectors than the matrix has": lambda rows: rows.repeat(40, 1),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("case", HOSTILE_ROWS)
def test_hostile_vectors_of_a_stage_leave_the_stage_unturned(case: str) -> None:
    _, reference, aligner, suspect = owned("timm")
    rows = HOSTILE_ROWS[case](reference.tensors[f"{REDUCTION}/rows"])
    damaged = Reference(reference.raw_bytes, {**reference.tensors, f"{REDUCTION}/rows": rows})
    other = make_aligner(timm_swin(), ("layers.1",), damaged, images()[:2])
    assert isinstance(other, TransformerAligner)
    state = dict(suspect.state_dict())
    kernels = read(other, state) if case == "zeros" else {}
    if case != "zeros":
        kernels = {name: kernel for name, kernel in read(other, state).items() if "blocks" in name}
    assert_equal_readings(read(aligner, state), kernels)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{REDUCTION}/rows", None),
        ("layers.1.blocks.0.attn.query_key/basis", lambda t: t[:, :16]),
        ("layers.1.blocks.0.attn.value_output/columns", lambda t: t[:, :16]),
        ("layers.0.blocks.1.attn.value_output/sketch", lambda t: t.repeat(2, 1)),
        ("layers.1.blocks.1.mlp.fc1/basis", lambda t: t[:, :0]),
    ],
)
def test_reference_of_contradicting_widths_raises_artifact_error(name: str, change: Any) -> None:
    _, reference, _, _ = owned("timm")
    tensors = {n: t for n, t in reference.tensors.items() if n != name}
    if change is not None:
        tensors[name] = change(reference.tensors[name])
    build_reader = make_aligner if name.endswith("sketch") else ResponseModel  # only alignment reads sketches
    with pytest.raises(ArtifactError):
        build_reader(timm_swin(), ("layers.1",), Reference(b"", tensors), images()[:2])


def test_placeholder_bases_have_the_width_of_each_stage() -> None:
    model = timm_swin()
    measured = response_bases(model, ("layers.1",), images())
    placeholder = placeholder_bases(model, ("layers.1",), images()[:2])
    assert list(measured) == list(placeholder) and PATCHES.removesuffix(".weight") not in measured
    for name, basis in measured.items():
        assert basis.shape[:2] == placeholder[name].shape[:2]
        assert basis.shape[2] <= placeholder[name].shape[2]
