"""Tests of the reference: canonical-form values of W0, a small sketch, and hashed bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_model import ResponseModel
from mtlsign.watermark.verification.scaling import apply_bn_sign, column_norms
from mtlsign.watermark.verification.sketches import random_projection

SAMPLE = torch.zeros(2, 1, 24, 24)


def test_make_reference_holds_values_of_each_tapped_convolution(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    state = model.state_dict()
    reference = make_reference(model, ["layer1"], SAMPLE)
    convs = ["conv1", *(f"layer1.{b}.conv{c}" for b in (0, 1) for c in (1, 2))]
    parts = ("gamma", "beta", "eps", "columns", "sketch")
    assert set(reference.tensors) == {f"{conv}/{part}" for conv in convs for part in parts}
    gamma, kernel = state["layer1.0.bn2.weight"], state["layer1.0.conv2.weight"]
    values = {part: reference.tensors[f"layer1.0.conv2/{part}"] for part in parts}
    assert (gamma < 0).any() and torch.equal(values["gamma"], gamma.abs())
    assert torch.equal(values["beta"], state["layer1.0.bn2.bias"]) and float(values["eps"]) == 1e-5
    assert torch.equal(values["columns"], column_norms(kernel)) and values["columns"].dtype == torch.float64
    assert torch.equal(values["sketch"], random_projection(apply_bn_sign(kernel, gamma))) and values[
        "sketch"
    ].shape == (8, 16)
    assert not torch.equal(values["sketch"], random_projection(kernel))
    assert reference.digest == hashlib.sha256(reference.raw_bytes).hexdigest()


def test_make_reference_ignores_mode_and_leaves_model_unchanged(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    one = make_reference(model, ["layer1"], SAMPLE)
    two = make_reference(model.train(), ["layer1"], torch.ones(1, 1, 24, 24))
    assert one.raw_bytes == two.raw_bytes and model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_reference_digest_changes_with_every_change_of_w0(tiny_model: Callable[..., nn.Module]) -> None:
    digests = {make_reference(tiny_model(), ["layer1"], SAMPLE).digest}
    for name in ("conv1.weight", "layer1.1.conv2.weight", "bn1.bias", "layer1.0.bn1.weight"):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name)[0] += 0.5
        digests.add(make_reference(model, ["layer1"], SAMPLE).digest)
    assert len(digests) == 5
    late = tiny_model()
    with torch.no_grad():
        late.get_parameter("layer2.0.conv1.weight").zero_()
    assert (
        make_reference(late, ["layer1"], SAMPLE).digest in digests
    )  # parameters after the taps are not stored


def test_make_reference_of_networks_without_affine_or_batch_norm() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False, eps=1e-3), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)
    )
    tensors = make_reference(net, ["3"], SAMPLE).tensors
    assert torch.equal(tensors["0/gamma"], torch.ones(4)) and not tensors["0/beta"].any()
    assert float(tensors["0/eps"]) == 1e-3
    assert {name for name in tensors if name.startswith("=")} == {"=2.bias", "=3.weight", "=3.bias"}


def test_apply_bn_sign_reads_only_the_sign() -> None:
    kernel = torch.ones(4, 2, 1, 1)
    gamma = torch.tensor([-3.0, 0.0, -0.0, 2.0])
    assert apply_bn_sign(kernel, gamma)[:, 0, 0, 0].tolist() == [-1, 1, 1, 1]
    assert apply_bn_sign(kernel, None) is kernel


def test_reference_from_hostile_bytes_raises() -> None:
    good = make_reference(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), ["1"], SAMPLE)
    assert Reference.from_bytes(good.raw_bytes).digest == good.digest
    bad = dict(good.tensors) | {"0/beta": torch.full((4,), float("nan"))}
    for data in (b"", b"\x80\x04.", good.raw_bytes[:-1], serialize_safetensors(bad)):
        with pytest.raises(ArtifactError, match=r"reference: .*\. Use the reference of the same kit"):
            Reference.from_bytes(data)


class ScaledConv(nn.Conv2d):
    """Convolution with a gain of several dimensions, as networks without norms have it."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * self.gain, self.bias)


def test_make_reference_with_further_weight_of_marked_layer_holds_values_of_kernel() -> None:
    model = nn.Sequential(ScaledConv(), nn.Identity())
    reference = make_reference(
        model, ["1"], torch.zeros(2, 3, 8, 8), bases={"0": torch.zeros(1, 27, 4).half()}
    )
    assert torch.equal(reference.tensors["0/columns"], column_norms(model[0].weight.detach()))
    assert reference.tensors["0/sketch"].shape == (8, 12)
    reader = ResponseModel(model, ["1"], reference, torch.zeros(2, 3, 8, 8))
    assert set(reader.weight_shapes) == {"0.weight"}


def changed(reference: Reference, name: str, value: object) -> bytes:
    tensor = reference.tensors[name]
    tensor = (
        tensor.to(value) if isinstance(value, torch.dtype) else torch.full_like(tensor, float(str(value)))
    )
    return serialize_safetensors({**reference.tensors, name: tensor})


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("gamma", -1), ("gamma", 3e38), ("gamma", "nan"), ("beta", 2000), ("beta", "-inf"), ("eps", -1),
        ("eps", 0), ("eps", 1e30), ("columns", -1), ("columns", 1e6), ("sketch", 5000),
        ("gamma", torch.float64), ("gamma", torch.int32), ("eps", torch.float32), ("columns", torch.bool),
        ("sketch", torch.bfloat16),
    ],
)  # fmt: skip
def test_reference_with_value_or_type_outside_the_format_is_refused(
    part: str, value: object, tiny_model: Callable[..., nn.Module]
) -> None:
    reference = make_reference(tiny_model(), ["layer1"], SAMPLE)
    assert Reference.from_bytes(reference.raw_bytes) is not None
    with pytest.raises(ArtifactError, match=r"reference: A tensor of the reference (is|has)"):
        Reference.from_bytes(changed(reference, f"conv1/{part}", value))


def test_reference_with_unknown_name_is_refused(tiny_model: Callable[..., nn.Module]) -> None:
    reference = make_reference(tiny_model(), ["layer1"], SAMPLE)
    data = serialize_safetensors({**reference.tensors, "conv1/code": torch.ones(1)})
    with pytest.raises(ArtifactError, match="has a name that the format does not have"):
        Reference.from_bytes(data)


def test_make_reference_of_network_with_value_outside_the_format_raises(
    tiny_model: Callable[..., nn.Module],
) -> None:
    model = tiny_model()
    model.bn1.eps = 1e-8  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="model: 'conv1/eps' has a number that is not between"):
        make_reference(model, ["layer1"], SAMPLE)
