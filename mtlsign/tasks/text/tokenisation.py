"""Division of texts into lower-case words, and sequences of token ids, by the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mtlsign.tasks.text.text_files import damaged_file, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Name of the tokenizer in a model folder.
TOKENIZER_FILE = "tokenizer.json"
#: Ids of the two tokens that are no words; the words follow.
PADDING, UNKNOWN = 0, 1
#: Their names. Words are in lower case, so that no word equals them.
_SPECIAL_TOKENS = ("[PAD]", "[UNK]")
#: Words of GloVe: "don't" is "do" and "n't", "it's" is "it" and "'s"; punctuation marks are words.
_WORD = (
    r"\.{3}|--|n't(?!\w)|'(?:s|m|d|re|ve|ll)(?!\w)"
    r"|(?:[a-z]\.){2,}|\d+(?:[.,]\d+)+|\w+?(?=n't(?!\w))|\w+|[^\w\s]"
)
#: More than any accepted data set has.
_MAX_DISTINCT_WORDS = 10_000_000
_MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
#: Texts that are encoded at once, which bounds the memory.
_CHUNK = 1000


@dataclass(frozen=True)
class TokenLayout:
    """Rules for the token ids of a text.

    Attributes:
        words: division of English text into words, or at spaces if it is divided already.
        length: tokens of each sequence; shorter ones are padded at the end.
        keep: the end of a longer text to keep.
    """

    words: Literal["english", "spaces"]
    length: int
    keep: Literal["first", "last"]


def words_by_frequency(texts: Sequence[str], layout: TokenLayout) -> list[str]:
    """Return the distinct words of texts, the most frequent first; words of equal frequency by code point."""
    from tokenizers import trainers

    tokenizer = _build_tokenizer({}, layout)
    trainer = trainers.WordLevelTrainer(
        vocab_size=_MAX_DISTINCT_WORDS, min_frequency=0, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(texts, trainer)
    ranks = tokenizer.get_vocab()
    return sorted(ranks, key=ranks.__getitem__)


def encode_texts(texts: Sequence[str], words: Sequence[str], layout: TokenLayout) -> Tensor:
    """Return the token ids of texts.

    Args:
        texts: the texts.
        words: the words of the ids from 2; other words are unknown.
        layout: division and length.

    Returns:
        int64 [n, layout.length]. A text without words is one unknown word.
    """
    tokenizer = _word_tokenizer(words, layout)
    ids = np.empty((len(texts), layout.length), dtype=np.int64)
    for start in range(0, len(texts), _CHUNK):
        encodings = tokenizer.encode_batch_fast(list(texts[start : start + _CHUNK]))
        ids[start : start + _CHUNK] = [encoding.ids for encoding in encodings]
    ids[ids[:, 0] == PADDING, 0] = UNKNOWN
    return torch.from_numpy(ids)


def tokenizer_file(words: Sequence[str], layout: TokenLayout) -> bytes:
    """Return a tokenizer.json that encodes as `encode_texts` does; a text without words is padding."""
    return _word_tokenizer(words, layout).to_str().encode()


class PretrainedTokenizer:
    """Tokenizer of a pretrained model, with its own division of texts, lower case and special tokens.

    Args:
        file: its tokenizer.json.
        layout: length of the sequences; the beginning of a longer text is kept.

    Attributes:
        content: the file.
        vocabulary: number of token ids.

    Raises:
        DataError: the file is missing or damaged, or id 0 is a token of texts.
    """

    def __init__(self, file: Path, layout: TokenLayout) -> None:
        from tokenizers import Tokenizer

        content = read_text(file, _MAX_TOKENIZER_BYTES)
        self.content = content.encode()
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain exceptions
            raise damaged_file(file, f"is no tokenizer ({str(error)[:100]})") from None
        self.vocabulary = self._tokenizer.get_vocab_size()
        padding = self._tokenizer.id_to_token(PADDING)
        if padding is None:
            raise damaged_file(file, "has no token with the id 0, which is padding")
        self._tokenizer.enable_truncation(layout.length)
        self._tokenizer.enable_padding(length=layout.length, pad_id=PADDING, pad_token=padding)

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text of any length, without special tokens."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return token ids int64 [n, length]; 0 is padding after the last token."""
        ids = np.array([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])
        return torch.from_numpy(ids.astype(np.int64))


def _word_tokenizer(words: Sequence[str], layout: TokenLayout) -> Tokenizer:
    """Return a tokenizer of words with the ids from 2, which truncates and pads."""
    tokenizer = _build_tokenizer({word: i for i, word in enumerate((*_SPECIAL_TOKENS, *words))}, layout)
    tokenizer.enable_truncation(layout.length, direction="right" if layout.keep == "first" else "left")
    tokenizer.enable_padding(length=layout.length, pad_id=PADDING, pad_token=_SPECIAL_TOKENS[PADDING])
    return tokenizer


def _build_tokenizer(vocabulary: dict[str, int], layout: TokenLayout) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL_TOKENS[UNKNOWN]))
    tokenizer.normalizer = normalizers.Lowercase()
    if layout.words == "english":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
