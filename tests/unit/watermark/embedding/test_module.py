"""Tests of `mtlsign.embed` on modules, loaders and outputs of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import FrozenBatchNorm2d

import mtlsign
from mtlsign.errors import DataError, ModelError
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.kit import detector_for_kit

SIDE, CLASSES = 24, 5
IMAGES = torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % CLASSES
FAST: dict[str, Any] = {
    "trained": True,
    "key_size": 128,
    "phase1.epochs": 1,
    "phase1.batch": 8,
    "phase2.steps": 12,
    "phase2.batch": 8,
    "phase2.lr": 0.01,
    "insecure_test_key": True,
}


class Net(nn.Module):
    """A small network whose class stands for one of a notebook."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer,
        returned: Callable[[Tensor], Any] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = wrap(nn.Conv2d(3, 16, 3, padding=1)), norm(16)
        self.conv2, self.norm2 = wrap(nn.Conv2d(16, 16, 3, padding=1)), norm(16)
        self.fc, self.returned = nn.Linear(16, CLASSES), returned

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.returned(self.fc(torch.relu(self.norm2(self.conv2(x))).mean((2, 3))))


def frozen_net() -> Net:
    """Return a network with frozen batch norms; each call draws other values."""
    model = Net(FrozenBatchNorm2d)
    for name, buffer in model.named_buffers():
        buffer.uniform_(0.5, 2) if name.endswith("var") else buffer.uniform_(-1.5, 1.5)
    return model


def build_net() -> Net:
    return Net()


def loaders(targets: Tensor = LABELS) -> dict[str, Any]:
    loader = DataLoader(TensorDataset(IMAGES, targets), batch_size=8)
    return {"train": loader, "test": loader}


def mark(module: nn.Module, owner: mtlsign.Identity, data: Any = None, **options: Any) -> EmbeddingResult:
    torch.manual_seed(1)
    return mtlsign.embed(module, data or loaders(), identity=owner, **(FAST | options))


def matches_of_fresh_build(done: EmbeddingResult, build: Callable[[], nn.Module]) -> int:
    torch.manual_seed(7)
    kit = done.kit
    path = str(kit.opening.parse().architecture["arch"]).removeprefix("custom/")
    reference = mtlsign.Reference.from_bytes(kit.reference)
    detector = mtlsign.WatermarkDetector(kit.opening, reference, factories={path: build})
    return mtlsign.verify(done.tensors, detector, bits=40).matches


@pytest.mark.parametrize(
    ("options", "least"),
    [({"head": "spread"}, 100), ({"head": "keyed", "taps": "norm1", "phase2.steps": 2}, 0)],
)
def test_embed_into_frozen_batch_norms_is_read_by_fresh_build(
    owner: mtlsign.Identity, options: dict[str, Any], least: int
) -> None:
    done = mark(frozen_net().eval(), owner, **options)
    assert done.verdict.matches >= least
    assert matches_of_fresh_build(done, frozen_net) == done.verdict.matches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_embed_saves_tensors_in_the_types_of_the_module(owner: mtlsign.Identity, dtype: torch.dtype) -> None:
    module = Net().to(dtype).eval().requires_grad_(False)
    done = mark(module, owner)
    assert done.tensors["conv1.weight"].dtype == module.conv1.weight.dtype == dtype
    assert torch.equal(module.conv1.weight, done.tensors["conv1.weight"])
    assert not module.conv1.weight.requires_grad
    assert done.verdict.matches >= 120 and matches_of_fresh_build(done, Net) == done.verdict.matches


def test_embed_into_compiled_parametrized_module_gives_plain_names(owner: mtlsign.Identity) -> None:
    net = Net(wrap=weight_norm)
    with pytest.warns(UserWarning, match="2 parametrized weights, such as conv1.weight, conv2.weight"):
        done = mark(nn.DataParallel(torch.compile(net, backend="eager")), owner)
    assert sorted(done.tensors) == sorted(Net().state_dict())
    assert str(done.kit.opening.parse().architecture["arch"]).endswith(":Net")
    assert matches_of_fresh_build(done, lambda: Net(wrap=weight_norm)) == done.verdict.matches


def test_embed_into_module_that_returns_mappings_trains_both_phases(owner: mtlsign.Identity) -> None:
    data = [{"pixel_values": x, "labels": y} for x, y in zip(IMAGES, LABELS, strict=True)]
    loader = DataLoader(data, batch_size=8)  # type: ignore[arg-type]
    module = Net(returned=lambda logits: {"logits": logits, "features": logits + 1})
    done = mark(module, owner, {"train": loader, "test": loader}, trained=False)
    assert done.kit.opening.parse().architecture["classes"] == CLASSES
    assert done.history["phase2"][-1]["distillation_loss"] > 0


def test_embed_with_ambiguous_outputs_uses_logits_of(owner: mtlsign.Identity) -> None:
    def module() -> Net:
        return Net(returned=lambda logits: {"a": logits, "b": logits})

    with pytest.raises(DataError, match="Pass logits_of"):
        mark(module(), owner)
    assert mark(module(), owner, logits_of=lambda outputs: outputs["b"]).verdict.matches >= 120


def test_embed_inside_inference_mode_trains(owner: mtlsign.Identity) -> None:
    with torch.inference_mode():
        assert mark(Net(), owner).verdict.matches >= 120


class FixedSizeNet(Net):
    """A network that accepts one input size only."""

    def forward(self, x: Tensor) -> Any:
        assert x.shape[-1] == 80, "input size"
        return super().forward(x)


def test_embed_into_network_of_fixed_size_uses_its_size_for_key_images(owner: mtlsign.Identity) -> None:
    images = torch.rand(12, 3, 80, 80)
    loader = DataLoader(TensorDataset(images, LABELS[:12]), batch_size=4)
    done = mark(FixedSizeNet().eval(), owner, {"train": loader, "test": loader}, **{"phase2.steps": 2})
    assert done.kit.opening.parse().carrier.height == 80
    with pytest.raises(
        ModelError, match=r"^task: The network cannot read images of 3x24x24 \(AssertionError"
    ):
        mark(FixedSizeNet().eval(), owner)


def test_kit_of_a_class_is_verified_with_a_named_factory(owner: mtlsign.Identity) -> None:
    done = mark(Net(), owner)
    with pytest.raises(ModelError, match="Pass --trusted-factory with a function"):
        detector_for_kit(done.kit)
    detector = detector_for_kit(done.kit, f"{__name__}:build_net")
    assert mtlsign.verify(done.tensors, detector, bits=40).matches == done.verdict.matches
