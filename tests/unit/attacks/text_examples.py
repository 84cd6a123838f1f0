"""A tiny task of texts, and a marked network for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

import mtlsign
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.input_spec import TextSpec
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.splitting import SPLITS
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity

SPEC = TextSpec(vocabulary=80, embedding=8, length=10, classes=3)
OPTIONS: dict[str, Any] = {
    "key_size": 128, "phase1.epochs": 4, "phase1.optimizer": "adam", "phase1.lr": 0.01, "phase2.steps": 100,
    "phase2.lr": 0.005, "phase1.batch": 32, "phase2.batch": 32, "lambda2": 0.0, "insecure_test_key": True,
}  # fmt: skip


@dataclass(frozen=True)
class TextRows:
    """Token ids int64 [n, 10] and labels int64 [n]."""

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> TextRows:
        return self

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        rows = indices[part or slice(0, len(indices))]
        return Batch(self.tokens[rows], self.labels[rows])


def text_task(count: int = 120) -> Task:
    """Return texts with words of their class among words of all classes, of 3 to 10 tokens."""
    splits = {}
    for number, name in enumerate(SPLITS):
        generator = torch.Generator().manual_seed(number)
        labels = torch.randint(0, 3, (count,), generator=generator)
        tokens = torch.randint(32, 80, (count, 10), generator=generator)
        own = 2 + 10 * labels[:, None] + torch.randint(0, 10, (count, 10), generator=generator)
        tokens = torch.where(torch.rand(count, 10, generator=generator) < 0.6, own, tokens)
        lengths = torch.randint(3, 11, (count, 1), generator=generator)
        splits[name] = TextRows(tokens * (torch.arange(10) < lengths), labels)
    return Task("texts", SPEC, splits)


def text_architecture(name: str = "bilstm") -> dict[str, object]:
    """Return an architecture of 16 units in each direction."""
    return architecture_for(name, **SPEC.architecture_fields, width=16)


def text_network(name: str = "bilstm", seed: int = 0) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(seed)
    return build(text_architecture(name)).eval()


@cache
def marked_text_network(**options: Any) -> tuple[nn.Module, EmbeddingResult, Identity]:
    """Return a marked network of this task, its result and the owner; callers must not change it.

    The key is always the same, because parts of so small a network carry few bits more than are required.
    """
    model, owner = text_network(), Identity(bytes(range(32)), bytes(32))
    values = OPTIONS | options
    result = mtlsign.embed(model, text_task(), identity=owner, architecture=text_architecture(), **values)
    return model.eval(), result, owner
