"""Large Movie Review Dataset of IMDb (Maas et al. 2011): one file per review in `aclImdb`."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mtlsign.tasks.text.labelled_texts import LabelledTexts, require_complete
from mtlsign.tasks.text.text_files import damaged_file, read_text, require_present

FOLDER = "aclImdb"
ARCHIVE = "aclImdb_v1.tar.gz"
#: Folders of the classes, in the order of their numbers.
CLASS_FOLDERS = ("neg", "pos")
#: Reviews in each of the parts train and test.
OFFICIAL_COUNT = 25_000
#: The longest official review has 14 KiB.
_MAX_REVIEW_BYTES = 64 * 1024
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def read_imdb(root: Path) -> dict[str, LabelledTexts]:
    """Return the parts train and test; class 0 is negative, class 1 positive.

    Raises:
        DataError: a folder is missing or empty, or a file is damaged.
    """
    folders = [f"{FOLDER}/{part}/{kind}" for part in ("train", "test") for kind in CLASS_FOLDERS]
    require_present("imdb", root, folders, ARCHIVE)
    return {part: _read_part(root / FOLDER / part) for part in ("train", "test")}


def _read_part(folder: Path) -> LabelledTexts:
    texts: list[str] = []
    labels: list[int] = []
    for label, kind in enumerate(CLASS_FOLDERS):
        paths = sorted((folder / kind).glob("*.txt"))
        if len(paths) > OFFICIAL_COUNT:
            raise damaged_file(folder / kind, f"has more than {OFFICIAL_COUNT:,} reviews")
        texts += [_read_review(path) for path in paths]
        labels += [label] * len(paths)
    part = LabelledTexts(tuple(texts), torch.tensor(labels, dtype=torch.int64))
    require_complete(part, str(folder), len(CLASS_FOLDERS), OFFICIAL_COUNT)
    return part


def _read_review(path: Path) -> str:
    text = _LINE_BREAK.sub(" ", read_text(path, _MAX_REVIEW_BYTES))
    if not text.strip():
        raise damaged_file(path, "is empty")
    return text
