"""Language models: the next token of the user's texts, in blocks of equal length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mtlsign.errors import DataError
from mtlsign.models.input_spec import TextSpec
from mtlsign.tasks.base import Task
from mtlsign.tasks.batch import Batch
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.tasks.text.text_files import read_text
from mtlsign.tasks.text.tokenisation import PADDING, TOKENIZER_FILE, PretrainedTokenizer, TokenLayout

NAME = "lm"
#: Tokens of a block, and blocks that are evaluated at once.
LENGTH, _EVALUATION_BATCH = 64, 8
#: Blocks that each split needs.
_FEWEST = 4
_MAX_BYTES = 256 * 1024 * 1024
#: Lines that are encoded at once.
_LINES = 1000


@dataclass(frozen=True)
class BlockSplit:
    """Blocks of tokens; the targets are the tokens that follow.

    Attributes:
        tokens: int64 [N, LENGTH + 1].
        rows: int64, the blocks of this split.
    """

    tokens: Tensor
    rows: Tensor

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> BlockSplit:
        """Return the same split on `device`."""
        return replace(self, tokens=self.tokens.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return blocks by index; see `Split.batch`. There is no augmentation."""
        rows = self.rows[indices[part] if part is not None else indices].to(self.tokens.device)
        tokens = self.tokens[rows]
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def load_language_model(root: Path, *, seed: int, share: float, tokenizer: Path | None) -> Task:
    """Load `lm/train.txt`, `lm/test.txt` and, if it exists, `lm/validation.txt` below the data root.

    Texts are divided into blocks of `LENGTH` tokens and the token after each. The metric is the share of
    right next tokens. Tokens with the id 0, which is padding, are left out.

    Args:
        root: data root.
        seed: division of the training part.
        share: part of the blocks to keep, 0 to 1, from the beginning of each file.
        tokenizer: tokenizer.json of the pretrained model.

    Raises:
        DataError: a file is missing, damaged or too short, or no tokenizer is given.
    """
    missing = [f"lm/{part}.txt" for part in ("train", "test") if not (root / "lm" / f"{part}.txt").exists()]
    if missing:
        raise DataError(
            f"{', '.join(missing)} missing in {root}. Put your texts there, or give another folder with "
            "--data.",
            field="data",
        )
    if tokenizer is None:
        raise DataError("The task lm has no words. Give the tokenizer of the model.", field="tokenizer")
    encoder = PretrainedTokenizer(tokenizer, TokenLayout("spaces", LENGTH, keep="first"))
    blocks = {
        part: _blocks(root / "lm" / f"{part}.txt", encoder, share)
        for part in ("train", "test", "validation")
        if part != "validation" or (root / "lm" / "validation.txt").exists()
    }
    order = torch.randperm(len(blocks["train"]), generator=seeded_generator("mtlsign/lm/split", seed))
    tenth = max(_FEWEST, len(order) // 10)
    parts = {"attacker": order[:tenth], "inner": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    if "validation" not in blocks:
        parts["validation"], parts["train"] = parts["train"][:tenth], parts["train"][tenth:]
    splits: dict[str, Any] = {name: BlockSplit(blocks["train"], rows) for name, rows in parts.items()}
    for part in blocks.keys() - {"train"}:
        splits[part] = BlockSplit(blocks[part], torch.arange(len(blocks[part])))
    spec = TextSpec(encoder.vocabulary, None, LENGTH, encoder.vocabulary, outputs="tokens")
    name = NAME if share == 1 else f"{NAME}@{share:g}"
    return Task(
        name, spec, splits, logits_of=token_logits, loss=token_loss, metric=TokenAccuracy,
        evaluation_batch=_EVALUATION_BATCH, model_files={TOKENIZER_FILE: encoder.content},
    )  # fmt: skip


def token_logits(outputs: Tensor) -> Tensor:
    """Return logits [n, classes, L] of outputs [n, L, classes]."""
    return outputs.transpose(1, 2)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens."""
    return torch.nn.functional.cross_entropy(token_logits(outputs).float(), targets)


class TokenAccuracy:
    """Share of next tokens with the largest logit, and the perplexity.

    Args:
        device: device of the state.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.state = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        right = (outputs.argmax(2) == targets).double()
        logits = token_logits(outputs).float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double()
        self.state += torch.stack([right.sum(), right.new_tensor(right.numel()), loss])

    def value(self) -> float:
        """Return the share; 0 without tokens."""
        return float(self.state[0] / self.state[1].clamp(min=1))

    def scores(self) -> dict[str, float]:
        """Return the perplexity: the exponential of the mean cross-entropy of the next tokens."""
        return {"perplexity": float((self.state[2] / self.state[1].clamp(min=1)).exp())}


def _blocks(path: Path, encoder: PretrainedTokenizer, share: float) -> Tensor:
    """Return the blocks of a file, int64 [n, LENGTH + 1]."""
    lines = read_text(path, _MAX_BYTES).splitlines(keepends=True)
    parts = [encoder.token_ids("".join(lines[i : i + _LINES])) for i in range(0, len(lines), _LINES)]
    ids = torch.cat([torch.tensor(part, dtype=torch.int64) for part in parts] or [torch.zeros(0).long()])
    ids = ids[ids != PADDING]
    count = int(len(ids) // (LENGTH + 1) * share)
    if count < 4 * _FEWEST:
        raise DataError(
            f"{path} has {count} blocks of {LENGTH + 1} tokens, and {4 * _FEWEST} are needed. Add texts.",
            field="data",
        )
    return ids[: count * (LENGTH + 1)].reshape(count, LENGTH + 1)
