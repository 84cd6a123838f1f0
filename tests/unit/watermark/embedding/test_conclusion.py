"""Tests of the last step of embedding: the written bytes decide, not the trained network in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlsign
from mtlsign.errors import ArtifactError, ModelError
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import read_model
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import conclusion
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret

OPTIONS: dict[str, Any] = {
    "head": "keyed", "key_size": 128, "lambda2": 0, "phase2.steps": 8, "phase2.batch": 16, "phase2.lr": 0.01,
    "insecure_test_key": True, "taps": "stem", "trained": True,
}  # fmt: skip


class Net(nn.Module):
    """Network whose marked layer reads a value that is in no state dict, if `hidden` is set."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 5, stride=2), Gate(hidden), nn.ReLU())
        self.rest = nn.Sequential(nn.Flatten(), nn.Linear(1200, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(self.stem(x))
        return out


class Gate(nn.Module):
    """Per-channel shift, in a buffer or drawn for every copy."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.register_buffer("shift", torch.linspace(-1, 1, 12).reshape(12, 1, 1), persistent=not hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift

    def __deepcopy__(self, memo: Any) -> Gate:
        copied = Gate(self.hidden)
        copied.shift = torch.randn(12, 1, 1) if self.hidden else self.shift.clone()
        return copied


def test_written_bits_equal_trained_bits_for_values_in_buffers(tiny_task: Task, owner: Identity) -> None:
    torch.manual_seed(0)
    done = mtlsign.embed(Net(hidden=False), tiny_task, identity=owner, **OPTIONS)
    assert done.verdict.n == 128 and done.result["matches"] == done.verdict.matches


def test_values_outside_of_file_and_kit_fail_with_error_that_names_both_readings(
    tiny_task: Task, owner: Identity
) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ModelError, match=r"^model: The written model shows \d+ of 128 bits, and the trained network"
    ):
        mtlsign.embed(Net(hidden=True), tiny_task, identity=owner, **OPTIONS)


@pytest.fixture(scope="module")
def weak(tiny_task: Task, owner: Identity) -> EmbeddingResult:
    """Return the result of one step on a network that returns the same class for every input."""
    torch.manual_seed(0)
    network = Net(hidden=False)
    nn.init.zeros_(network.rest[1].weight)
    nn.init.zeros_(network.rest[1].bias)
    return mtlsign.embed(network, tiny_task, identity=owner, **OPTIONS | {"phase2.steps": 1})


def test_save_with_altered_file_or_kit_raises(
    weak: EmbeddingResult, store_dir: str, owner: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, secret = open_storage(store_dir), EncryptionSecret.from_kit_key(owner.kit_key)
    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="not the one that was written"):
        patch.setattr(conclusion, "read_kit", lambda *_, **__: None)
        weak.save(storage, secret)
    weak.save(storage, secret)
    path = Path(weak.result["model_path"])
    assert read_model(str(path)).digest == path.name
    (path / "model.safetensors").write_bytes(b"\0" * (path / "model.safetensors").stat().st_size)
    with pytest.raises(ArtifactError, match=r"does not match manifest"):
        weak.save(storage, secret)


def test_result_states_rejection_and_warnings_of_weak_embedding(weak: EmbeddingResult) -> None:
    assert weak.verdict.status == weak.kit.info["status"] == "rejected"
    assert "is rejected: " in weak.result["problem"]
    assert "only if 127 of them match" in weak.result["warnings"][0]
    assert "is chance for 4 classes" in weak.result["warnings"][1]
