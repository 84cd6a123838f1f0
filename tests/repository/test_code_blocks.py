"""Fenced blocks of the documents: Python names are defined and blocks run, data parses, named files exist.

`test_docs.py` parses the command lines. A block that is not run has the comment `<!-- not run: REASON -->`
before it. The names that its reader has are at the end of the reason: `the reader has A, B`.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.repository.test_docs import ROOT, pages

BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- not run: (?P<reason>[^\n]*) -->\n *)?```(?P<language>\w*)[^\n]*\n"
    r"(?P<content>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
PATH = re.compile(r"(?<![\w./:=-])(?:\./)?((?:jobs|docs|tests|benchmarks|mtlsign|tune_spaces)/[\w./-]+\.\w+)")
PARSERS = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    language: str
    content: str
    reason: str

    @property
    def names_of_reader(self) -> set[str]:
        """Names that the block uses and the reader defines."""
        return set(re.findall(r"\w+", self.reason.partition("the reader has ")[2]))


def blocks() -> list[Block]:
    """Return all blocks of the documents."""
    return [
        Block(str(page.relative_to(ROOT)), m["language"], textwrap.dedent(m["content"]), m["reason"] or "")
        for page in pages()
        for m in BLOCK.finditer(page.read_text("utf-8"))
    ]


BLOCKS = blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]


def bound_names(tree: ast.AST) -> set[str]:
    """Return all names that a block imports, defines, assigns or takes as parameters."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def undefined_names(source: str, known: set[str]) -> set[str]:
    """Return the names that a block reads, but neither it nor an earlier block defines."""
    tree = ast.parse(source)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return used - bound_names(tree) - known - set(dir(builtins))


def earlier_names(block: Block) -> set[str]:
    """Return the names of the earlier blocks of the same page."""
    names: set[str] = set()
    for other in PYTHON[: PYTHON.index(block)]:
        if other.page == block.page:
            names |= bound_names(ast.parse(other.content))
    return names


def test_undefined_names_finds_a_missing_definition() -> None:
    assert undefined_names("with Client(url, token) as s:\n    s.go()", {"url"}) == {"Client", "token"}
    assert undefined_names("import a.b\n[x for x in a.b(len)]", set()) == set()


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python_block_defines_its_names(block: Block) -> None:
    assert undefined_names(block.content, earlier_names(block) | block.names_of_reader) == set()


def test_python_blocks_without_a_reason_run(tmp_path: Path) -> None:
    """All in one process, each page in a namespace, so that torch is imported once."""
    runnable: dict[str, list[str]] = {}
    for block in PYTHON:
        if not block.reason:
            runnable.setdefault(block.page, []).append(block.content)
    assert len(runnable) >= 4
    program = [
        f"exec(compile({source!r}, {page!r}, 'exec'), spaces.setdefault({page!r}, {{'__name__': 'block'}}))"
        for page, sources in runnable.items()
        for source in sources
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(["spaces = {}", *program])], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in PARSERS], ids=lambda block: block.page
)
def test_data_block_parses(block: Block) -> None:
    assert PARSERS[block.language](block.content)


def test_files_named_in_blocks_exist() -> None:
    named = [(block.page, name) for block in BLOCKS for name in PATH.findall(block.content)]
    assert len(named) > 20
    assert [pair for pair in named if not (ROOT / pair[1]).exists()] == []


def test_every_reason_belongs_to_a_block() -> None:
    markers = sum(page.read_text("utf-8").count("<!-- not run: ") for page in pages())
    assert markers == sum(bool(block.reason) for block in BLOCKS)
