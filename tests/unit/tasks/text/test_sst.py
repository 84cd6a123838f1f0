from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.errors import DataError
from mtlsign.tasks.text.sst import parse_tree, read_sst
from tests.unit.tasks.text.layouts import write_sst

pytestmark = pytest.mark.filterwarnings("ignore:.*of the official")
LABELS = st.integers(0, 4)
NODES = st.recursive(
    st.tuples(
        LABELS, st.text(st.characters(exclude_characters="() \\", exclude_categories=["Cs"]), min_size=1)
    ),
    lambda nodes: st.tuples(LABELS, st.lists(nodes, min_size=1, max_size=3)),
    max_leaves=12,
)


def write_tree(node: tuple[int, object]) -> str:
    label, content = node
    text = content if isinstance(content, str) else " ".join(write_tree(child) for child in content)  # type: ignore[attr-defined]
    return f"({label} {text})"


def leaves(node: tuple[int, object]) -> list[str]:
    content = node[1]
    return [content] if isinstance(content, str) else [w for child in content for w in leaves(child)]  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(NODES)
def test_parse_tree_returns_root_label_and_words(node: tuple[int, object]) -> None:
    sentence = parse_tree(write_tree(node))
    brackets = {"-LRB-": "(", "-RRB-": ")"}
    assert sentence is not None and sentence.label == node[0]
    assert sentence.words == tuple(brackets.get(word, word) for word in leaves(node))


@settings(max_examples=40, deadline=None)
@given(st.text("()0123459 aB\\-", max_size=40) | st.text(max_size=40))
def test_parse_tree_of_any_text_returns_balanced_tree_or_none(text: str) -> None:
    sentence = parse_tree(text)
    if sentence is not None:
        assert sentence.words and 0 <= sentence.label <= 4
        assert text.count("(") == text.count(")") and text.strip(" ").startswith("(")


@pytest.mark.parametrize(
    "line",
    [
        "", "word", "()", "(3)", "(3 )", "( good)", "(5 good)", "(good)", "(33 good)", "(-1 good)", "(3 good",
        "3 good)", "(3 good))", "(3 good bad)", "(3 good (2 bad))", "(3 (2 bad) good)", "(3 a) (2 b)",
        "(3 (2 a)) b", "(3good)", "x(3 good)", "(3 ((2 a) (2 b)))", "(" * 5000 + ")" * 5000,
    ],
)  # fmt: skip
def test_parse_tree_of_wrong_line_returns_none(line: str) -> None:
    assert parse_tree(line) is None


def test_parse_tree_of_deep_tree_needs_no_recursion() -> None:
    sentence = parse_tree("(1 " * 5000 + "deep" + ")" * 5000)
    assert sentence is not None and sentence.words == ("deep",)


def test_parse_tree_replaces_escapes() -> None:
    sentence = parse_tree(r"(2 (2 -LRB-) (2 (2 and\/or) (2 (2 \*) (2 -RRB-))))")
    assert sentence is not None and sentence.words == ("(", "and/or", "*", ")")


def test_read_sst_with_five_classes_returns_root_labels(tmp_path: Path) -> None:
    write_sst(tmp_path)
    parts = read_sst(tmp_path, 5)
    assert {part: len(texts) for part, texts in parts.items()} == {"train": 40, "validation": 10, "test": 10}
    assert parts["test"].labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert parts["test"].texts[1] == "The film1 bad"


def test_read_sst_with_two_classes_omits_neutral_sentences(tmp_path: Path) -> None:
    write_sst(tmp_path)
    parts = read_sst(tmp_path, 2)
    assert parts["test"].labels.tolist() == [0, 0, 1, 1] * 2
    assert [text.split()[1] for text in parts["test"].texts[:4]] == ["film0", "film1", "film3", "film4"]


def test_read_sst_without_files_names_them(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"sst2 is incomplete: SST/trees/train.txt.*trainDevTestTrees_PTB.zip"
    ):
        read_sst(tmp_path, 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"(0 a)\n(7 b)\n", "no tree with labels 0 to 4 in line 2"),
        (b"(0 a)\n\n", "no tree .* in line 2"),
        (b"(0 \xff)\n", "no UTF-8 text in line 1"),
        (b"(0 " + b"a" * 20_000 + b")\n", "bytes in line 1"),
        (b"(0 a)\n" * 20_001, "more than 20,000 lines"),
        (b"(0 a)\n" * 2_000, "no text of class 1"),
        (b"(0 a)\n(1 a)\n(2 a)\n(3 a)\n(4 a)\n" * 300, "1,500 texts, more than the official 1,101"),
        (b"", "no text of class 0"),
    ],
)
def test_read_sst_of_wrong_file_raises_data_error(tmp_path: Path, content: bytes, problem: str) -> None:
    folder = write_sst(tmp_path)
    (folder / "dev.txt").write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_sst(tmp_path, 5)
    assert caught.value.field == "data" and str(folder / "dev.txt") in str(caught.value)
