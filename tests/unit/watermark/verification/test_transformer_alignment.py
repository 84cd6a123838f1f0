from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks.attention_symmetries import attention_symmetries, rotate_stream
from mtlsign.attacks.base import AttackerResources
from mtlsign.attacks.channel_symmetries import permute_channels
from mtlsign.attacks.recurrent_symmetries import permute_vocabulary
from mtlsign.errors import ArtifactError
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.attention_layers import AttentionLayer, MatrixRows
from mtlsign.models.residual_stream import ResidualStream, residual_stream
from mtlsign.tasks import from_tensors
from mtlsign.watermark.verification.alignment import TransformerAligner, make_aligner
from mtlsign.watermark.verification.attention_products import AttentionProducts
from mtlsign.watermark.verification.input_moments import input_moments
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import (
    placeholder_bases,
    readable_layers,
    response_bases,
)
from mtlsign.watermark.verification.response_model import ResponseModel
from tests.unit.attacks.text_examples import SPEC, text_task

TAPS = ("blocks.1",)
FIELDS = {"vocabulary": 80, "embedding": 24, "classes": 3}
KINDS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"order": "post"},
    "rms": {
        "norm": "rms", "positions": "rotary", "kv_heads": 1, "gated": 1, "activation": "silu", "bias": 0,
        "pooling": "last", "causal": 1,
    },
}  # fmt: skip
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def network(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = build(
        architecture_for("transformer", **FIELDS, width=32) | {"length": 16, "inner": 40} | KINDS[kind]
    )
    with torch.no_grad():  # norms as after training
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.rand(parameter.shape))
    return model.eval()


@cache
def aligned_network(kind: str) -> tuple[TransformerAligner, Any, Reference]:
    """Return the aligner of a network, and the network with a little noise on its matrices."""
    model, sample = network(kind), SPEC.sample()
    tokens = text_task().splits["train"].tokens  # type: ignore[attr-defined]
    reference = make_reference(model, TAPS, sample, bases=response_bases(model, TAPS, tokens))
    suspect = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in suspect.named_parameters():
            if parameter.dim() > 1 and name not in ("embedding.weight", "positions.weight"):
                parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    aligner = make_aligner(network(kind, seed=7), TAPS, reference, sample)
    assert isinstance(aligner, TransformerAligner)
    return aligner, suspect, reference


def read(aligner: TransformerAligner, model: nn.Module) -> dict[str, Tensor]:
    names = {*aligner.resizable_names, *aligner.further_names}
    return dict(aligner.align({n: t for n, t in model.state_dict().items() if n in names}).kernels)


def assert_equal_readings(kind: str, other: nn.Module) -> None:
    """Compare with a tolerance for a turn that is found from the float16 vectors of the reference."""
    aligner, suspect, _ = aligned_network(kind)
    expected, aligned = read(aligner, suspect), read(aligner, other)
    assert expected.keys() == aligned.keys() == aligner.layers.keys()
    for name, kernel in expected.items():
        scale = float(kernel.abs().max())
        torch.testing.assert_close(
            aligned[name].double() / scale, kernel.double() / scale, atol=4e-3, rtol=0, msg=name
        )


@ALL_KINDS
@pytest.mark.parametrize("attack", [attention_symmetries, rotate_stream, permute_channels])
def test_align_undoes_free_change(kind: str, attack: Any) -> None:
    suspect = aligned_network(kind)[1]
    if attack is rotate_stream and kind == "rms":  # RMS norms have no bias that would need one
        assert not any("bias" in name for name, _ in suspect.named_parameters() if "blocks" in name)
    other = attack(suspect, text_task(), AttackerResources(), 3).model
    before = suspect.state_dict()
    assert any(not torch.equal(t, before[n]) for n, t in other.state_dict().items())
    assert_equal_readings(kind, other)


@ALL_KINDS
def test_align_undoes_all_free_changes_together(kind: str) -> None:
    model = aligned_network(kind)[1]
    for attack in (permute_vocabulary, rotate_stream, attention_symmetries, permute_channels):
        model = attack(model, text_task(), AttackerResources(), 5).model
    assert_equal_readings(kind, model)


def test_align_leaves_unchanged_network_as_it_is() -> None:
    aligner, suspect, reference = aligned_network("pre")
    model = ResponseModel(network("pre", seed=3), TAPS, reference, SPEC.sample())
    own = model.select_weights(suspect.state_dict())
    aligned = read(aligner, suspect)
    assert own.keys() == aligned.keys() == model.kernel_shapes.keys()
    assert all(torch.equal(kernel, aligned[name]) for name, kernel in own.items())
    shapes = {name: tuple(kernel.shape) for name, kernel in own.items()}
    assert shapes == dict(model.kernel_shapes)


def test_align_drops_further_heads_and_fills_missing_ones() -> None:
    aligner, suspect, _ = aligned_network("pre")
    state = {n: t.clone() for n, t in suspect.state_dict().items()}
    prefix = "blocks.0.attention"
    for part in ("query", "key", "value"):
        weight = state[f"{prefix}.{part}.weight"]
        state[f"{prefix}.{part}.weight"] = torch.cat([torch.randn(16, 24), weight])
        single = state[f"blocks.1.attention.{part}.weight"]
        state[f"blocks.1.attention.{part}.weight"] = single[16:]
    output = state[f"{prefix}.output.weight"]
    state[f"{prefix}.output.weight"] = torch.cat([torch.zeros(24, 16), output], 1)
    state["blocks.1.attention.output.weight"] = state["blocks.1.attention.output.weight"][:, 16:]
    names = {*aligner.resizable_names, *aligner.further_names}
    aligned = aligner.align({n: t for n, t in state.items() if n in names}).kernels
    expected = read(aligner, suspect)
    torch.testing.assert_close(aligned[f"{prefix}.value_output"], expected[f"{prefix}.value_output"])
    first, second = aligned["blocks.1.attention.value_output"].chunk(2)
    assert not first.any()
    torch.testing.assert_close(second, expected["blocks.1.attention.value_output"].chunk(2)[1])


def test_align_without_sources_or_with_sizes_that_do_not_fit_reads_the_rest() -> None:
    aligner, suspect, _ = aligned_network("pre")
    state = {n: t for n, t in suspect.state_dict().items() if n in aligner.resizable_names}
    state = {n: t for n, t in state.items() if n not in ("embedding.weight", "positions.weight")}
    state["blocks.0.attention.key.weight"] = torch.ones(30, 24)
    state["blocks.1.attention.output.weight"] = torch.ones(24, 31)
    aligned = aligner.align(state).kernels
    assert "blocks.0.attention.query_key" not in aligned and "blocks.0.attention.value_output" in aligned
    assert "blocks.1.attention.value_output" not in aligned
    assert aligner.align({}).kernels == {} and aligner.align({}).similarity == 0


def test_recognizes_descendants_only() -> None:
    aligner, suspect, _ = aligned_network("pre")

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        names = {*aligner.resizable_names, *aligner.further_names}
        return {n: t for n, t in model.state_dict().items() if n in names}

    turned = rotate_stream(suspect, text_task(), AttackerResources(), 2).model
    assert aligner.recognizes(tensors(turned))
    assert not any(aligner.recognizes(tensors(network("pre", seed=seed))) for seed in range(1, 4))
    assert not aligner.recognizes({})


def test_products_of_joint_matrix_equal_those_of_separate_ones() -> None:
    size, generator = 6, torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(8, size, generator=generator) for _ in range(3))
    output, basis = torch.randn(size, 8, generator=generator), torch.eye(size)[:, :3].double()

    def products(layer: AttentionLayer, matrices: dict[str, Tensor]) -> dict[str, Tensor]:
        stream = ResidualStream(size, (layer,), (), {}, {}, frozenset(), frozenset(), True)
        return AttentionProducts(stream, {layer.query_key: basis}, {"a": 4}).apply(matrices)

    parts = [MatrixRows(name, 0, 8) for name in ("q", "k", "v")]
    separate = products(
        AttentionLayer("a", 2, 2, *parts, "o"), {"q": query, "k": key, "v": value, "o": output}
    )
    thirds = [MatrixRows("qkv", 8 * i, 8 * i + 8) for i in range(3)]
    joint = products(
        AttentionLayer("a", 2, 2, *thirds, "o"), {"qkv": torch.cat([query, key, value]), "o": output}
    )
    for name, kernel in separate.items():
        assert torch.equal(joint[name], kernel)
    first = (query[:4].double().T @ key[:4].double())[:3]
    torch.testing.assert_close(separate["a.query_key"][:3], first)
    torch.testing.assert_close(separate["a.value_output"][size:], output[:, 4:].double() @ value[4:].double())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("blocks.0.attention.query_key/basis", lambda t: t[:, :5]),
        ("blocks.0.attention.query_key/basis", lambda t: t.expand(1, 24, -1).repeat(1, 1, 40)),
        ("blocks.1.attention.value_output/sketch", lambda t: t[:5]),
        ("blocks.1.attention.value_output/columns", lambda t: t[:, :5]),
    ],
)
def test_reference_of_other_shapes_raises_artifact_error(name: str, change: Any) -> None:
    _, _, reference = aligned_network("pre")
    damaged = Reference(reference.raw_bytes, {**reference.tensors, name: change(reference.tensors[name])})
    build_reader = make_aligner if name.endswith("sketch") else ResponseModel  # only alignment reads sketches
    with pytest.raises(ArtifactError):
        build_reader(network("pre"), TAPS, damaged, SPEC.sample())


def test_placeholder_bases_have_the_layers_of_measured_ones() -> None:
    model = network("rms")
    tokens = text_task().splits["train"].tokens  # type: ignore[attr-defined]
    measured = response_bases(model, TAPS, tokens)
    placeholder = placeholder_bases(model, TAPS, SPEC.sample())
    assert list(measured) == list(placeholder)
    for name, basis in measured.items():
        assert basis.shape[:2] == placeholder[name].shape[:2]
        assert basis.shape[2] <= placeholder[name].shape[2]


@ALL_KINDS
def test_layers_with_equal_inputs_share_moments_equal_to_their_own(kind: str) -> None:
    model, sample = network(kind), SPEC.sample()
    tokens = text_task().splits["train"].tokens  # type: ignore[attr-defined]
    stream = residual_stream(model, TAPS, sample)
    assert stream is not None
    names = [layer.key for layer in readable_layers(model, TAPS, sample, stream)]
    together = input_moments(model, TAPS, tokens, names, stream=stream)
    assert list(together) == names and len({id(m) for m in together.values()}) < len(names)
    for name in names:
        alone = input_moments(model, TAPS, tokens, [name], stream=stream)[name]
        assert torch.equal(alone.covariance, together[name].covariance), name
        assert torch.equal(alone.mean, together[name].mean), name


def test_align_undoes_changes_of_a_vision_transformer_of_timm() -> None:
    torch.manual_seed(0)
    architecture = architecture_for("timm/vit_tiny_patch16_224", channels=1, classes=4, size=32)
    model, images = build(architecture).eval(), torch.rand(64, 1, 32, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm" in name:
                parameter.add_(0.3 * torch.rand(parameter.shape))
    reference = make_reference(model, TAPS, images[:2], bases=response_bases(model, TAPS, images))
    aligner = make_aligner(build(architecture), TAPS, reference, images[:2])
    assert isinstance(aligner, TransformerAligner) and len(aligner.heads) == 4
    task = from_tensors(images, torch.arange(64) % 4, test=(images, torch.arange(64) % 4))
    other = model
    for attack in (attention_symmetries, permute_channels):
        other = attack(other, task, AttackerResources(), 3).model
    with torch.no_grad():  # move the gain of the first norm into the matrix after it
        norm, qkv = other.blocks[0].norm1, other.blocks[0].attn.qkv  # type: ignore[union-attr, index]
        qkv.bias.add_(qkv.weight @ norm.bias)  # type: ignore[union-attr, operator]
        qkv.weight.mul_(norm.weight)  # type: ignore[union-attr, operator]
        norm.weight.fill_(1)  # type: ignore[union-attr, operator]
        norm.bias.zero_()  # type: ignore[union-attr, operator]
        torch.testing.assert_close(other(images[:4]), model(images[:4]), atol=1e-4, rtol=1e-3)
    expected, aligned = read(aligner, model), read(aligner, other)
    for name, kernel in expected.items():
        torch.testing.assert_close(aligned[name].double(), kernel.double(), atol=1e-4, rtol=1e-3, msg=name)
