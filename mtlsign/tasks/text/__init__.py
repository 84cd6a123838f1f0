"""Text tasks of the paper's table 2: IMDb, and SST with two and five classes, with GloVe's word vectors.

`"imdb@0.2"` is a fifth of each official part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mtlsign.models.input_spec import TextSpec
from mtlsign.tasks.base import Task
from mtlsign.tasks.splitting import share_of_rows, split_training_rows
from mtlsign.tasks.text import glove, imdb, sst
from mtlsign.tasks.text.labelled_texts import LabelledTexts
from mtlsign.tasks.text.text_files import require_present
from mtlsign.tasks.text.text_split import TextSplit
from mtlsign.tasks.text.tokenisation import (
    TOKENIZER_FILE,
    PretrainedTokenizer,
    TokenLayout,
    encode_texts,
    tokenizer_file,
)
from mtlsign.tasks.text.vocabulary import build_vocabulary

__all__ = ["NAMES", "load_text"]


@dataclass(frozen=True)
class _Source:
    """Data set of texts.

    Attributes:
        read: (data root) -> texts by part: train, test and possibly validation.
        classes: number of classes.
        layout: division into words, and the length of sequences.
        max_words: largest number of words in the vocabulary; None for all.
    """

    read: Callable[[Path], dict[str, LabelledTexts]]
    classes: int
    layout: TokenLayout
    max_words: int | None


#: No sentence of SST has more words.
_SST_LAYOUT = TokenLayout("spaces", 56, keep="first")
_SOURCES = {
    "imdb": _Source(imdb.read_imdb, 2, TokenLayout("english", 200, keep="last"), 20_000),
    "sst2": _Source(partial(sst.read_sst, classes=2), 2, _SST_LAYOUT, None),
    "sst5": _Source(partial(sst.read_sst, classes=5), 5, _SST_LAYOUT, None),
}
NAMES = tuple(_SOURCES)


def load_text(name: str, root: Path, *, seed: int, share: float = 1.0, tokenizer: Path | None = None) -> Task:
    """Load a task of `NAMES`; its test split is the official test part.

    The vocabulary follows from the official training part, so that it is the same for every seed.

    Args:
        name: name of the data set.
        root: data root with the unpacked official archives of the data set and of GloVe.
        seed: division of the training part.
        share: part of the data to keep, 0 to 1: the same texts for every seed, classes in proportion.
        tokenizer: tokenizer.json of a pretrained model, whose vocabulary replaces that of GloVe.

    Raises:
        DataError: files are missing or damaged.
    """
    source = _SOURCES[name]
    if tokenizer is None:
        require_present(name, root, [glove.FILE], glove.ARCHIVE, glove.FOLDER)
    parts = source.read(root)
    if share < 1:
        parts = {
            part: texts.selected(share_of_rows(name, texts.labels, share)) for part, texts in parts.items()
        }
        name = f"{name}@{share:g}"
    train = parts["train"]
    texts_by_part = {part: texts.texts for part, texts in parts.items()}
    if tokenizer is None:
        encoded = _encode_with_glove(texts_by_part, source, root / glove.FILE)
    else:
        encoded = _encode_with_tokenizer(texts_by_part, source, tokenizer)
    tokens = encoded.tokens
    official_splits = {
        part: TextSplit(tokens[part], texts.labels, torch.arange(len(texts)))
        for part, texts in parts.items()
        if part != "train"
    }
    rows = split_training_rows(train.labels, seed, frozenset(official_splits))
    train_splits = {part: TextSplit(tokens["train"], train.labels, chosen) for part, chosen in rows.items()}
    return Task(
        name=name,
        input_spec=TextSpec(encoded.vocabulary, encoded.dimensions, source.layout.length, source.classes),
        splits=train_splits | official_splits,
        initial_tensors=encoded.initial_tensors,
        model_files={TOKENIZER_FILE: encoded.tokenizer},
    )


@dataclass(frozen=True)
class _EncodedTexts:
    """Token ids int64 [n, L] by part, number of token ids, tokenizer.json, and word vectors of the task."""

    tokens: dict[str, Tensor]
    vocabulary: int
    tokenizer: bytes = field(repr=False)
    dimensions: int | None = None
    initial_tensors: Mapping[str, Tensor] = field(default_factory=dict)


def _encode_with_glove(texts: Mapping[str, tuple[str, ...]], source: _Source, file: Path) -> _EncodedTexts:
    vocabulary = build_vocabulary(texts["train"], source.layout, file, source.max_words)
    tokens = {part: encode_texts(own, vocabulary.words, source.layout) for part, own in texts.items()}
    vectors = {"embedding.weight": vocabulary.vectors}
    tokenizer = tokenizer_file(vocabulary.words, source.layout)
    return _EncodedTexts(tokens, len(vocabulary), tokenizer, glove.DIMENSIONS, vectors)


def _encode_with_tokenizer(
    texts: Mapping[str, tuple[str, ...]], source: _Source, file: Path
) -> _EncodedTexts:
    tokenizer = PretrainedTokenizer(file, source.layout)
    tokens = {part: tokenizer.encode(own) for part, own in texts.items()}
    return _EncodedTexts(tokens, tokenizer.vocabulary, tokenizer.content)
