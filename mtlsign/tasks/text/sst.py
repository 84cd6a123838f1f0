"""Stanford Sentiment Treebank (Socher et al. 2013): one parse tree with labels 0 to 4 on each line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mtlsign.tasks.text.labelled_texts import LabelledTexts, require_complete
from mtlsign.tasks.text.text_files import damaged_file, read_lines, require_present

FOLDER = "SST/trees"
ARCHIVE = "trainDevTestTrees_PTB.zip"
#: Official file of each part.
FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
#: Sentences of each part with five classes, and with two without the neutral sentences.
OFFICIAL_COUNTS = {
    5: {"train": 8_544, "validation": 1_101, "test": 2_210},
    2: {"train": 6_920, "validation": 872, "test": 1_821},
}
#: Class of each label among two classes. Label 2 is neutral and has none.
BINARY_CLASSES = {0: 0, 1: 0, 3: 1, 4: 1}
#: Characters of the treebank's own syntax, as its words write them.
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_MAX_LINES = 20_000
#: The longest official line has 700 bytes.
_MAX_LINE_BYTES = 16 * 1024
_PIECE = re.compile(r"\([0-4] |[()]|[^() ]+")


@dataclass(frozen=True)
class Sentence:
    """Sentence of a parse tree.

    Attributes:
        label: label of the root, 0 (very negative) to 4 (very positive).
        words: the words, as the treebank divides them.
    """

    label: int
    words: tuple[str, ...]


def parse_tree(line: str) -> Sentence | None:
    """Return the sentence of a tree such as `(3 (2 A) (4 gem))`, or None if the line is no such tree."""
    words: list[str] = []
    labels: list[int] = []
    open_nodes: list[str] = []  # content so far of each open node
    for piece in _PIECE.findall(line):
        if len(piece) == 3 and piece[0] == "(":
            if (labels and not open_nodes) or (open_nodes and open_nodes[-1] == "word"):
                return None
            open_nodes[-1:] = ["nodes", "nothing"] if open_nodes else ["nothing"]
            labels.append(int(piece[1]))
        elif piece == ")":
            if not open_nodes or open_nodes.pop() == "nothing":
                return None
        elif piece != "(" and open_nodes and open_nodes[-1] == "nothing":
            open_nodes[-1] = "word"
            words.append(_plain_word(piece))
        else:
            return None
    return Sentence(labels[0], tuple(words)) if labels and not open_nodes else None


def read_sst(root: Path, classes: int) -> dict[str, LabelledTexts]:
    """Return the parts train, validation (dev) and test with their words separated by spaces.

    Args:
        root: data root.
        classes: 5, or 2 for negative and positive sentences without the neutral ones.

    Raises:
        DataError: a file is missing, empty or damaged.
    """
    files = [f"{FOLDER}/{file}" for file in FILES.values()]
    require_present(f"sst{classes}", root, files, ARCHIVE, "SST")
    return {part: _read_part(root / FOLDER / file, part, classes) for part, file in FILES.items()}


def _read_part(path: Path, part: str, classes: int) -> LabelledTexts:
    texts: list[str] = []
    labels: list[int] = []
    for number, line in read_lines(path, max_lines=_MAX_LINES, max_line_bytes=_MAX_LINE_BYTES):
        sentence = parse_tree(line)
        if sentence is None:
            raise damaged_file(path, f"has no tree with labels 0 to 4 in line {number}")
        label = sentence.label if classes == 5 else BINARY_CLASSES.get(sentence.label)
        if label is not None:
            texts.append(" ".join(sentence.words))
            labels.append(label)
    rows = LabelledTexts(tuple(texts), torch.tensor(labels, dtype=torch.int64))
    require_complete(rows, str(path), classes, OFFICIAL_COUNTS[classes][part])
    return rows


def _plain_word(word: str) -> str:
    r"""Return a word without the treebank's escapes, such as "and/or" for `and\/or`."""
    return _BRACKETS.get(word, word.replace("\\/", "/").replace("\\*", "*"))
