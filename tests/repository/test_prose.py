"""Language rules: words, first lines of docstrings, names of local variables, references and line lengths."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "whoever|somebody|nobody|anybody|stranger|strangers|thief|thieves|told|tell|tells|say|says|said|mend|mends"
    "|mended|anew|door|doors|room|rooms|shelf|desk|crew|strike|strikes|struck|dies|lies|beside"
)
PHRASES = (
    r"go(es|ing)? on with|goes on\b(?! to)|at home|tak(e|es|ing) along|of (its|their|his|our|your) own"
    r"|in one line\b"
)
BANNED = re.compile(rf"(?<![A-Za-z])(?:(?:{WORDS})(?![A-Za-z])|(?:{PHRASES}))", re.IGNORECASE)
REFERENCES = re.compile(r"\bfacts/|\bscience\.md|\bissue #?[0-9A-Z]\b|\bdesign decision|\bdecision [0-9]")
FIRST_WORDS = {"what", "where", "how", "who", "when", "whether", "which", "why"}
#: Participles and adverbs that name nothing: a local variable is a noun of its content.
LOCALS = frozenset(
    {
        *("found", "kept", "done", "wanted", "whole", "given", "told", "there", "said", "again", "what"),
        *("here", "got", "have", "was", "begun", "tried", "asked"),
    }
)
#: A file of commands as they were typed at old commits, with the words of their time.
OLD_COMMANDS = re.compile(r"^commands:\n(?:[ -].*\n)*", re.MULTILINE)


@lru_cache(maxsize=1)
def tree() -> tuple[Path, ...]:
    """Return every text file that is or would be committed and is written by hand."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.decode().split("\0") if name]
    else:  # an unpacked archive
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]
    kinds = (".py", ".md", ".j2", ".yaml", ".yml", ".toml", ".css", ".svg", ".cff")
    skipped = ("tests/repository/test_prose.py", "tests/golden/v1/")
    chosen = [ROOT / name for name in names if name.endswith(kinds) and not name.startswith(skipped)]
    return tuple(path for path in chosen if path.is_file())


def python_files(*tops: str) -> list[Path]:
    """Return the Python files below the top-level folders `tops`."""
    return [p for p in tree() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in tops]


@cache
def passages(path: Path) -> tuple[tuple[int, str], ...]:
    """Return (line number, text): comments, strings and split names of Python files, lines of others.

    A name that a file uses several times is listed once.
    """
    content = path.read_text("utf-8")
    if path.suffix != ".py":
        content = OLD_COMMANDS.sub(lambda match: "\n" * match.group().count("\n"), content)
        return tuple(enumerate(content.splitlines(), 1))
    names: dict[str, int] = {}
    texts = []
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.NAME:
            names.setdefault(token.string, token.start[0])
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            texts.append((token.start[0], token.string.replace("_", " ")))
    split = ((line, re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", name)) for name, line in names.items())
    return (*texts, *split)


def violations(pattern: re.Pattern[str], paths: tuple[Path, ...] | list[Path]) -> list[str]:
    """Return `file:line: match` for each match of `pattern`."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {match.group()}"
        for path in paths
        for line, text in passages(path)
        for match in pattern.finditer(text)
    ]


def test_prose_contains_no_banned_words() -> None:
    assert violations(BANNED, tree()) == []


def test_prose_references_resolve() -> None:
    assert violations(REFERENCES, tree()) == []
    missing = []
    for path in tree():
        for line, text in passages(path):
            for name in re.findall(
                r"\b(?:docs|jobs|mtlsign|tests|tune_spaces)/[\w/-]+\.(?:md|py|yaml|csv)\b", text
            ):
                if not (ROOT / name).exists() and "docs/results" not in str(path):
                    missing.append(f"{path.relative_to(ROOT)}:{line}: {name}")
            for number in re.findall(r"docs/decisions/(\d{4})", text):
                if not list((ROOT / "docs" / "decisions").glob(f"{number}-*.md")):
                    missing.append(f"{path.relative_to(ROOT)}:{line}: decision {number}")
    assert missing == []


def test_markdown_links_resolve() -> None:
    missing = []
    for path in (p for p in tree() if p.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8")):
            if (
                "://" not in target
                and not target.startswith("mailto:")
                and not (path.parent / target).exists()
            ):
                missing.append(f"{path.relative_to(ROOT)}: {target}")
    assert missing == []


def test_markdown_lines_are_at_most_100_columns() -> None:
    long = []
    for path in (p for p in tree() if p.suffix == ".md"):
        fenced = False
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            fenced ^= line.lstrip().startswith("```")
            if len(line) > 100 and not fenced and not line.startswith("|"):
                long.append(f"{path.relative_to(ROOT)}:{number}: {len(line)}")
    assert long == []


def documented(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, name, docstring) of the module and of every class and function in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), getattr(node, "name", path.stem), text


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {text.split()[0]}"
        for path in python_files("mtlsign", "jobs", "tune_spaces", "benchmarks")
        for line, name, text in documented(path)
        if text.split()[0].strip("`'\"").lower() in FIRST_WORDS
    ]
    assert wrong == []


def test_local_variables_are_nouns() -> None:
    wrong = []
    for path in python_files("mtlsign", "jobs", "tune_spaces"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
            name = node.arg if isinstance(node, ast.arg) else name
            if name in LOCALS:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")  # type: ignore[attr-defined]
    assert wrong == []


@pytest.mark.parametrize("text", ["it was told", "`said`", "in one line", "goes on with", "a Stranger's"])
def test_banned_pattern_matches_examples(text: str) -> None:
    assert BANNED.search(text)


@pytest.mark.parametrize(
    "text", ["toldest", "outdoors", "headroom", "goes on to the next", "relies", "applies"]
)
def test_banned_pattern_ignores_other_words(text: str) -> None:
    assert not BANNED.search(text)
