"""Text classifiers with recurrent layers over word vectors (paper, figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mtlsign.config.embed import MAX_WIDTH
from mtlsign.models.factories import Factory
from mtlsign.models.families.base import (
    CLASSES,
    EMBEDDING,
    VOCABULARY,
    ArchitectureFamily,
    Field,
    IntegerField,
)
from mtlsign.models.recurrent_layers import PaddedBatch, PaddedGRU, PaddedLSTM

CELLS: Mapping[str, type[PaddedLSTM | PaddedGRU]] = {"lstm": PaddedLSTM, "gru": PaddedGRU}
#: Architecture name -> cell and number of directions.
NETWORKS = {"lstm": ("lstm", 1), "bilstm": ("lstm", 2), "gru": ("gru", 1), "bigru": ("gru", 2)}
ENCODER = "encoder"
MAX_LAYERS = 4


class RecurrentEncoder(nn.Module):
    """Recurrent layers that return one tensor and leave out padding."""

    def __init__(self, cell: str, embedding: int, hidden: int, layers: int, directions: int) -> None:
        super().__init__()
        self.rnn = CELLS[cell](embedding, hidden, layers, batch_first=True, bidirectional=directions == 2)

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Return the outputs of the last layer.

        Args:
            vectors: float [n, L, d].
            lengths: int64 [n], at least 1.

        Returns:
            [n, L, directions * hidden]; zeros after the last token.
        """
        if vectors.is_meta:  # only shapes matter
            return self.rnn(vectors)[0]  # type: ignore[no-any-return]
        return self.rnn(PaddedBatch(vectors, lengths))  # type: ignore[no-any-return]


class RecurrentClassifier(nn.Module):
    """Word vectors, recurrent layers, mean and maximum over the tokens, and a linear layer.

    The word vectors are frozen.
    """

    def __init__(
        self,
        cell: str,
        directions: int,
        *,
        vocabulary: int,
        embedding: int,
        hidden: int,
        layers: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=0)
        self.embedding.weight.requires_grad_(False)
        self.encoder = RecurrentEncoder(cell, embedding, hidden, layers, directions)
        self.fc = nn.Linear(2 * directions * hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [n, classes] of token ids int64 [n, L]; 0 is padding after the last token."""
        mask = tokens != 0
        mask[:, 0] = True  # an empty text is one padding token
        outputs = self.encoder(self.embedding(tokens), mask.sum(1))
        mean = outputs.sum(1) / mask.sum(1, keepdim=True)
        largest = outputs.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
        logits: Tensor = self.fc(torch.cat([mean, largest], 1))
        return logits


class RecurrentFamily(ArchitectureFamily):
    """LSTM and GRU classifiers of texts with one or two directions."""

    usage = ", ".join(NETWORKS)
    inputs: Literal["image", "text", "any"] = "text"
    fields: Mapping[str, Field] | None = {
        "vocabulary": VOCABULARY,
        "embedding": EMBEDDING,
        "hidden": IntegerField(4, MAX_WIDTH),
        "layers": IntegerField(1, MAX_LAYERS),
        "classes": CLASSES,
    }

    def includes(self, arch: str) -> bool:
        """Return whether `arch` is the name of one of the four networks."""
        return arch in NETWORKS

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return one layer with as many units in each direction as the width."""
        return {"hidden": width, "layers": 1}

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build a `RecurrentClassifier`."""
        cell, directions = NETWORKS[arch]
        return RecurrentClassifier(cell, directions, **options)  # type: ignore[arg-type]

    def stages(self, model: nn.Module) -> Sequence[str]:
        """Return the recurrent layers of a network of this family as its only stage."""
        return (ENCODER,) if isinstance(model, RecurrentClassifier) else ()
