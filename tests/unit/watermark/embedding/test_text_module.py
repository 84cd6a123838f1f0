"""Embedding into a user's own network of texts, with the user's loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mtlsign
from mtlsign.errors import DataError
from mtlsign.tasks.user_task import from_loaders
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.text_examples import OPTIONS, text_task


class Sentences(nn.Module):
    """Network that returns a dict, as a user may write it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(80, 12)
        self.gru = nn.GRU(12, 20, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(20, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        outputs, _ = self.gru(self.words(tokens))
        return {"logits": self.classifier(outputs.mean(1))}


def rows(split: str) -> list[dict[str, Tensor]]:
    data = text_task().splits[split]
    x, y = data.batch(torch.arange(len(data)))
    return [{"input_ids": tokens, "labels": label} for tokens, label in zip(x, y, strict=True)]


def loaders() -> dict[str, Any]:
    return {split: DataLoader(rows(split), batch_size=16) for split in ("train", "test")}  # type: ignore[arg-type]


def test_embed_marks_own_recurrent_network_with_loaders_of_dicts() -> None:
    torch.manual_seed(0)
    model = Sentences()
    result = mtlsign.embed(model, loaders(), identity=Identity.generate(), **OPTIONS)
    assert result.verdict.accepted and result.verdict.matches >= 127
    spec = result.kit.opening.parse()
    assert spec.carrier.kind == "words" and spec.architecture["vocabulary"] == 80
    factory = "tests.unit.watermark.embedding.test_text_module:Sentences"
    detector = detector_for_kit(result.kit, factory)
    assert verify(model.state_dict(), detector).matches == result.verdict.matches


def test_from_loaders_reads_token_ids_and_pads_copied_batches() -> None:
    task = from_loaders(
        {"train": [(torch.tensor([[3, 4], [5, 6]] * 20), torch.tensor([0, 1] * 20)),
                   (torch.tensor([[7, 8, 9]] * 2), torch.tensor([0, 1]))],
         "test": [(torch.tensor([[1, 2]]), torch.tensor([1]))]}
    )  # fmt: skip
    assert task.input_spec.kind == "text" and task.input_spec.architecture_fields == {
        "vocabulary": 10,
        "classes": 2,
    }
    assert task.splits["train"].batch(torch.arange(2)).inputs.shape == (2, 3)


@pytest.mark.parametrize(("low", "vocabulary"), [(-1, None), (0, 5)])
def test_from_loaders_refuses_token_ids_outside_the_vocabulary(low: int, vocabulary: int | None) -> None:
    batch = (torch.arange(low, low + 40).reshape(20, 2), torch.arange(20) % 2)
    with pytest.raises(DataError, match="token ids"):
        from_loaders({"train": [batch], "test": [batch]}, vocabulary=vocabulary)
