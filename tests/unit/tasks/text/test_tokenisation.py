from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mtlsign.tasks.text.tokenisation import (
    PADDING,
    UNKNOWN,
    PretrainedTokenizer,
    TokenLayout,
    encode_texts,
    tokenizer_file,
    words_by_frequency,
)

ENGLISH = TokenLayout("english", 8, keep="last")
SPACES = TokenLayout("spaces", 4, keep="first")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I don't think it's 3.5 -- U.S. stars...", "i do n't think it 's 3.5 -- u.s. stars ..."),
        ("We'll go, they've gone; I'm in.", "we 'll go , they 've gone ; i 'm in ."),
        ("O'Neil (well-known) 10/10!", "o ' neil ( well - known ) 10 / 10 !"),
        ('"Café"\n10,000 isn\'table e.g. end.', '" café " 10,000 isn \' table e.g. end .'),
        ("couldn't've", "could n't 've"),
    ],
)
def test_words_by_frequency_divides_english_as_glove_does(text: str, words: str) -> None:
    assert sorted(words_by_frequency([text], ENGLISH)) == sorted(set(words.split()))
    layout = TokenLayout("english", len(words.split()), keep="first")
    vocabulary = sorted(set(words.split()))
    ids = encode_texts([text], vocabulary, layout)[0].tolist()
    assert [vocabulary[i - 2] for i in ids] == words.split()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("abcdé '.\n", max_size=30), min_size=1, max_size=8))
def test_words_by_frequency_sorts_by_count_then_word(texts: list[str]) -> None:
    counts = Counter(word for text in texts for word in text.lower().split())
    assert words_by_frequency(texts, SPACES) == sorted(counts, key=lambda word: (-counts[word], word))


def test_words_by_frequency_does_not_depend_on_order_of_texts() -> None:
    texts = [f"a{i % 7} b{i % 5} c" for i in range(100)]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert words_by_frequency(texts, SPACES) == words_by_frequency(shuffled, SPACES)


def test_encode_texts_pads_and_truncates_at_the_chosen_end() -> None:
    first = encode_texts(["a b", "a b c a b", "x Z b a"], ["a", "b"], SPACES)
    assert first.tolist() == [[2, 3, 0, 0], [2, 3, 1, 2], [1, 1, 3, 2]] and first.dtype == torch.int64
    last = encode_texts(["a b c a b"], ["a", "b"], TokenLayout("spaces", 4, keep="last"))
    assert last.tolist() == [[3, 1, 2, 3]]


def test_tokenizer_file_encodes_texts_as_the_task_does(tmp_path: Path) -> None:
    words, texts = ["a", "b", "."], ["a b . c", "B", "a a a b b b . . a", "it's a."]
    file = tmp_path / "tokenizer.json"
    for layout in (SPACES, ENGLISH):
        file.write_bytes(tokenizer_file(words, layout))
        tokenizer = Tokenizer.from_file(str(file))
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        assert ids == encode_texts(texts, words, layout).tolist()
    assert PretrainedTokenizer(file, SPACES).content == file.read_bytes()


def test_encode_texts_of_text_without_words_is_one_unknown_word() -> None:
    assert encode_texts(["", " \n\t"], ["a"], SPACES).tolist() == [[UNKNOWN, PADDING, PADDING, PADDING]] * 2


def test_encode_texts_of_names_of_special_tokens_are_ordinary_words() -> None:
    assert encode_texts(["[PAD] [UNK] [pad] a"], ["a"], SPACES).tolist() == [[1, 1, 1, 2]]
    assert encode_texts(["[PAD] a"], ["a", "[", "]"], ENGLISH).tolist() == [[3, 1, 4, 2, 0, 0, 0, 0]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=50), max_size=5))
def test_encode_texts_of_any_text_keeps_padding_at_the_end(texts: list[str]) -> None:
    ids = encode_texts(texts, ["a", "."], ENGLISH)
    assert ids.shape == (len(texts), 8) and ((ids >= 0) & (ids <= 3)).all()
    assert (ids[:, 0] != PADDING).all()
    assert ((ids[:, 1:] == PADDING) | (ids[:, :-1] != PADDING)).all()


def test_encode_texts_in_chunks_equals_single_texts() -> None:
    texts = [f"a {'b ' * (i % 9)}c{i}" for i in range(1005)]
    ids = encode_texts(texts, ["a", "b", "c1003"], SPACES)
    for row in (0, 999, 1000, 1003):
        assert torch.equal(ids[row], encode_texts([texts[row]], ["a", "b", "c1003"], SPACES)[0])


@pytest.mark.parametrize(
    "text", ["a" * 65_000, "1" * 65_000, "a." * 32_000, "n't" * 20_000, "1," * 32_000, "'" * 65_000]
)
def test_encode_texts_of_long_repetition_takes_linear_time(text: str) -> None:
    assert encode_texts([text], ["a"], ENGLISH).shape == (1, 8)
