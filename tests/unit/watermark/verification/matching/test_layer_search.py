"""Search for the matrices of vision transformers and recurrent networks among exchanged names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks.attention_symmetries import attention_symmetries, rotate_stream
from mtlsign.attacks.base import AttackerResources
from mtlsign.attacks.channel_symmetries import permute_channels
from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build
from mtlsign.tasks import from_tensors
from mtlsign.watermark.verification.alignment import RecurrentAligner, TransformerAligner, make_aligner
from mtlsign.watermark.verification.matching import ContentMatcher
from mtlsign.watermark.verification.reference import make_reference
from mtlsign.watermark.verification.response_bases import placeholder_bases, response_bases
from tests.unit.watermark.scenarios.exchanged_files import anonymous, exchanged
from tests.unit.watermark.verification.test_recurrent_alignment import SPEC, TAPS, changed
from tests.unit.watermark.verification.test_recurrent_alignment import network as recurrent_network
from tests.unit.watermark.verification.test_staged_alignment import (
    MAKERS,
    assert_equal_readings,
    owned,
    read,
    task,
)
from tests.unit.watermark.verification.test_transformer_alignment import network as transformer_network

Tensors = dict[str, Tensor]
Found = tuple[TransformerAligner | RecurrentAligner, Tensors]


def search(model: nn.Module, taps: tuple[str, ...], sample: Tensor, bases: Any, file: Tensors) -> Found:
    """Return the aligner of a network, and its tensors in a file as a search by sketches finds them."""
    reference = make_reference(model, taps, sample, bases=bases)
    aligner = make_aligner(model, taps, reference, sample)
    assert isinstance(aligner, TransformerAligner | RecurrentAligner)
    views = ContentMatcher(model, aligner).views(file)
    return aligner, next((dict(view.tensors) for view in views if not view.has_own_order), {})


def noisy_matrices(model: nn.Module, sources: tuple[str, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    return {
        n: t + 0.2 * t.std() * torch.randn(t.shape, generator=generator)
        if t.dim() > 1 and n not in sources
        else t
        for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("change", ["noise", "free changes", "independent"])
def test_search_finds_vision_transformer_of_timm(change: str) -> None:
    torch.manual_seed(0)
    architecture = architecture_for("timm/vit_tiny_patch16_224", channels=1, classes=4, size=32)
    model, images = build(architecture).eval(), torch.rand(64, 1, 32, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm" in name:
                parameter.add_(0.3 * torch.rand(parameter.shape))
    sources, other, taps = ("cls_token", "pos_embed", "patch_embed.proj.weight"), model, ("blocks.3",)
    task = from_tensors(images, torch.arange(64) % 4, test=(images, torch.arange(64) % 4))
    for attack in (rotate_stream, attention_symmetries, permute_channels) if change == "free changes" else ():
        other = attack(other, task, AttackerResources(), 3).model
    state = noisy_matrices(model, sources) if change == "noise" else dict(other.state_dict())
    if change == "independent":
        state = dict(build(architecture).state_dict())
    bases = response_bases(model, taps, images)
    aligner, found_tensors = search(model, taps, images[:2], bases, exchanged(state))
    if change == "independent":
        assert not found_tensors
        return
    matrices = {n for n in aligner.resizable_names if n != "cls_token"}  # one vector gives no coordinates
    assert all(torch.equal(found_tensors[name], state[name]) for name in matrices)
    gains = {n for n in aligner.further_names if n.endswith("norm1.weight")}
    assert gains
    for name in gains:  # a gain of ones may be absent
        torch.testing.assert_close(found_tensors.get(name, torch.ones(64 * 3)), state[name])


@pytest.mark.parametrize(("name", "layers"), [("gru", 3), ("bigru", 2), ("bilstm", 3), ("lstm", 1)])
def test_search_finds_recurrent_networks(name: str, layers: int) -> None:
    model, sample = recurrent_network(name, layers), SPEC.sample()
    bases = placeholder_bases(model, TAPS, sample)
    for state in (noisy_matrices(model, ("embedding.weight",)), dict(changed(model).state_dict())):
        aligner, found_tensors = search(model, TAPS, sample, bases, exchanged(state))
        names = {*aligner.layers, "embedding.weight"}
        assert all(torch.equal(found_tensors[n], state[n]) for n in names)
    independent = dict(recurrent_network(name, layers, 5).state_dict())
    assert not search(model, TAPS, sample, bases, exchanged(independent))[1]


@pytest.mark.parametrize(("count", "is_refused"), [(300, False), (4_900, True)])
def test_search_among_many_pairs_of_matrices_is_bounded(count: int, is_refused: bool) -> None:
    model, sample = transformer_network("pre"), SPEC.sample()
    file = {f"v{n}": torch.full((32, 24), 1.0 + n) for n in range(count)}
    file |= {f"o{n}": torch.full((24, 32), 1.0 + n) for n in range(count)}
    bases, taps = placeholder_bases(model, ("blocks.1",), sample), ("blocks.1",)
    if is_refused:
        with pytest.raises(ModelError, match="Too many tensors"):
            search(model, taps, sample, bases, file)
    else:
        assert not search(model, taps, sample, bases, file)[1]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("form", [anonymous, exchanged])
@pytest.mark.parametrize("free_changes", [False, True])
def test_search_finds_the_matrices_of_all_stages(kind: str, form: Any, free_changes: bool) -> None:
    _, _, aligner, suspect = owned(kind)
    other = suspect
    for attack in (rotate_stream, attention_symmetries, permute_channels) if free_changes else ():
        other = attack(other, task(), AttackerResources(), 3).model
    views = ContentMatcher(MAKERS[kind][0](seed=7), aligner).views(form(dict(other.state_dict())))
    (tensors,) = (dict(view.tensors) for view in views if not view.has_own_order)
    assert_equal_readings(read(aligner, dict(suspect.state_dict())), read(aligner, tensors))


@pytest.mark.parametrize("kind", MAKERS)
def test_search_leaves_out_an_independent_network_with_stages(kind: str) -> None:
    make, aligner = MAKERS[kind][0], owned(kind).aligner
    for seed in (2, 3, 4):
        views = ContentMatcher(make(seed=7), aligner).views(exchanged(dict(make(seed=seed).state_dict())))
        assert not [view for view in views if not view.has_own_order]
