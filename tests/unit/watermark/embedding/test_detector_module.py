"""Tests of `mtlsign.embed` on a user's own detector, and of verifiers, which have its body alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import mtlsign
from mtlsign.models import architectures
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.conftest import OWNER
from tests.unit.models.detector_examples import (
    Objects,
    cascade_architecture,
    faster_rcnn,
    frozen_norm,
)

FAST: dict[str, Any] = {
    "trained": True,
    "key_size": 256,
    "phase2.steps": 12,
    "phase2.batch": 1,
    "phase2.lr": 0.02,
    "lambda1": 0.1,
    "insecure_test_key": True,
    "identity": OWNER,
}


def loaders() -> dict[str, Any]:
    """Return the data of a user's detector; the test part has the form of torchvision's references."""
    pairs = DataLoader(Objects(2, 50), 2, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    return {"train": Objects(16), "test": pairs, "validation": Objects(1, 90)}


@pytest.fixture(scope="module")
def marked_cascade() -> EmbeddingResult:
    """Return a marked Cascade Mask R-CNN with an architecture that verifiers build themselves."""
    torch.manual_seed(0)
    network = architectures.build(cascade_architecture())
    return mtlsign.embed(network, loaders(), architecture=cascade_architecture(), **FAST)


def test_embed_marks_all_stages_of_the_body(marked_cascade: EmbeddingResult) -> None:
    result = marked_cascade.result
    assert marked_cascade.verdict.status == "accepted", result
    assert 0.3 < result["wm_accuracy_on_clean"] < 0.7
    assert result["primary_is_mean"] is False and result["primary_samples"] == 2
    layers = detector_for_kit(marked_cascade.kit).kernel_shapes
    assert all(name.startswith("backbone.body.") for name in layers)
    assert {name.split(".")[2] for name in layers} == {"conv1", *(f"layer{k}" for k in range(1, 5))}


def test_verifier_builds_no_detector(
    marked_cascade: EmbeddingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a verifier built a detector")

    monkeypatch.setattr(GeneralizedRCNN, "__init__", refuse)
    with pytest.raises(AssertionError, match="built a detector"):
        architectures.build(cascade_architecture())
    verdict = verify(marked_cascade.tensors, detector_for_kit(marked_cascade.kit))
    assert (verdict.status, verdict.matches) == ("accepted", marked_cascade.verdict.matches)


@pytest.mark.parametrize("prefix", ["", "teacher.backbone.body."])
def test_verify_reads_the_body_under_any_prefix(marked_cascade: EmbeddingResult, prefix: str) -> None:
    body = {
        prefix + name.removeprefix("backbone.body."): tensor
        for name, tensor in marked_cascade.tensors.items()
        if name.startswith("backbone.body.")
    }
    verdict = verify(body, detector_for_kit(marked_cascade.kit))
    assert (verdict.status, verdict.matches) == ("accepted", marked_cascade.verdict.matches)


def test_verify_of_unrelated_detector_accepts_nothing(marked_cascade: EmbeddingResult) -> None:
    torch.manual_seed(7)
    other = architectures.build(cascade_architecture()).state_dict()
    assert verify(other, detector_for_kit(marked_cascade.kit)).status == "not_verifiable"
    body = {name: tensor for name, tensor in other.items() if name.startswith("backbone.body.")}
    assert verify(body, detector_for_kit(marked_cascade.kit)).status == "unrelated"


@pytest.mark.parametrize("norm", [pytest.param(nn.BatchNorm2d, marks=pytest.mark.slow), frozen_norm])
def test_embed_marks_a_users_detector(norm: Any) -> None:
    torch.manual_seed(0)
    network = faster_rcnn(norm)
    network.backbone.body.conv1.requires_grad_(False)  # as torchvision freezes the stem
    before: dict[str, Tensor] = {name: t.clone() for name, t in network.state_dict().items()}
    result = mtlsign.embed(network, loaders(), **FAST)
    assert result.verdict.status == "accepted", result.result
    assert not network.backbone.body.conv1.weight.requires_grad
    after = network.state_dict()
    assert not torch.equal(after["backbone.body.conv1.weight"], before["backbone.body.conv1.weight"])
    if norm is frozen_norm:
        names = [name for name in before if ".norm" in name or ".1." in name.split("stage")[-1]]
        vectors = [name for name in names if "backbone.body" in name and before[name].dim() == 1]
        assert vectors and all(torch.equal(after[name], before[name]) for name in vectors)
    path = str(result.kit.opening.parse().architecture["arch"]).removeprefix("custom/")
    name = "frozen_faster_rcnn" if norm is frozen_norm else "faster_rcnn"
    detector = detector_for_kit(result.kit, f"{path}=tests.unit.models.detector_examples:{name}")
    assert verify(result.tensors, detector).matches == result.verdict.matches
