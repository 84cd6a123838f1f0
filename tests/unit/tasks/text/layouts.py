"""Small folders in the official layouts of IMDb, SST and GloVe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

WORDS = ("good", "bad", "film", "the", "a", "n't", "(", ")", "movie", ".", "fine")


def write_glove(root: Path, words: Iterable[str] = WORDS) -> Path:
    path = root / "glove.6B" / "glove.6B.50d.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{vector_line(word, i)}\n" for i, word in enumerate(words)), "utf-8")
    return path


def vector_line(word: str, seed: int = 0) -> str:
    numbers = np.random.default_rng(seed).normal(size=50)
    return " ".join([word, *(f"{number:.5f}" for number in numbers)])


def write_sst(root: Path, counts: tuple[int, int, int] = (40, 10, 10)) -> Path:
    folder = root / "SST" / "trees"
    folder.mkdir(parents=True, exist_ok=True)
    for file, count in zip(("train.txt", "dev.txt", "test.txt"), counts, strict=True):
        trees = (f"({i % 5} (2 The) (2 (2 film{i}) ({i % 5} {WORDS[i % 2]})))\n" for i in range(count))
        (folder / file).write_text("".join(trees), "utf-8")
    return folder


def write_imdb(root: Path, counts: tuple[int, int] = (20, 6)) -> Path:
    folder = root / "aclImdb"
    for part, count in zip(("train", "test"), counts, strict=True):
        for kind, word in (("neg", "bad"), ("pos", "good")):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                text = f"It isn't<br /><br />a {word} Movie{i}."
                (folder / part / kind / f"{i}_{9 if kind == 'pos' else 2}.txt").write_text(text, "utf-8")
    return folder
