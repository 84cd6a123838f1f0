"""Documents: commands parse, imported names exist, every page is listed, generated pages are current."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mtlsign.attacks import parse_attacks
from mtlsign.claims.commands.ledger import ACTIONS as LEDGER_ACTIONS
from mtlsign.commands import COMMANDS, command
from mtlsign.config import cli
from mtlsign.config.base import setting_names
from mtlsign.config.embed import EmbedSettings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\bjobs/(\w+)\.py|^ *(?:uv run )?mtlsign ([a-z][a-z_-]*))((?: .*)?)$")
LAYOUT_LINE = re.compile(r"^ *(?:[-*] |\d+\. |\||```)")


def script(name: str) -> ModuleType:
    """Import a script of `docs/` by its name."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages() -> list[Path]:
    """Return the documents that are written by hand."""
    found = [ROOT / name for name in ("README.md", "jobs/README.md", "CONTRIBUTING.md", "SECURITY.md")]
    found += [path for path in DOCS.rglob("*.md") if not re.match("20", path.parent.name)]
    return [path for path in found if path.name not in ("results.md", "negative_results.md", "settings.md")]


def fences(path: Path, *languages: str) -> Iterator[str]:
    """Yield the content of the fenced blocks of a page in one of the languages."""
    for _, language, content in FENCE.findall(path.read_text("utf-8")):
        if language in languages:
            yield textwrap.dedent(content)


def command_lines(path: Path) -> Iterator[str]:
    """Yield each line of a console block and each inline command."""
    for block in fences(path, "", "sh", "bash", "console"):
        yield from block.splitlines()
    yield from re.findall(r"`((?:uv run jobs/|(?:uv run )?mtlsign )[^`…]+)`", path.read_text("utf-8"))


def commands() -> list[tuple[str, str, list[str]]]:
    """Return (page, command, arguments) of every command of this project in the documents."""
    found = []
    for path in pages():
        for line in command_lines(path):
            match = COMMAND.search(line)
            if match:
                arguments = re.split(r" (?:&&|\||#|>) ", match[3] + " ")[0].strip().rstrip('"')
                name = (match[1] or match[2]).replace("_", "-")
                found.append((str(path.relative_to(ROOT)), name, shlex.split(arguments)))
    return found


def test_commands_are_found_in_the_documents() -> None:
    names = {name for _, name, _ in commands()}
    assert set(COMMANDS) == names


@pytest.mark.parametrize(("page", "name", "arguments"), commands(), ids=lambda value: str(value)[:60])
def test_command_in_document_parses(page: str, name: str, arguments: list[str]) -> None:
    job = command(name)
    for flag, variant in job.variants.items():
        job = variant if f"--{flag}" in arguments else job
    arguments = ["1" if word == "N" else word for word in arguments]
    if job.positional is not None and arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--{job.positional}={arguments[0]}"
    if not arguments or "--resume" in arguments:  # a name alone, or settings of the interrupted run
        known = {f"--{setting.replace('_', '-')}" for setting in setting_names(job.kind)}
        assert {word for word in arguments if word.startswith("--")} <= known
        return
    settings = cli.parse(job.kind, arguments)
    assert getattr(settings, "action", None) in (None, *LEDGER_ACTIONS)
    assert set(pair.partition("=")[0] for pair in getattr(settings, "overrides", ())) <= set(
        setting_names(EmbedSettings)
    )
    attacks = getattr(settings, "attacks", None)
    if attacks is not None and attacks != "list":
        assert parse_attacks(attacks)


@lru_cache
def names_in(module: str) -> frozenset[str]:
    """Return the names at the top level of a module of the package, without importing it."""
    path = ROOT / Path(*module.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    assert source.is_file(), f"{module} is no module"
    names: set[str] = set()
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.If):  # names for type checkers, which the root imports on first use
            names |= {
                alias.name for item in node.body if isinstance(item, ast.ImportFrom) for alias in item.names
            }
    return frozenset(names | {item.stem for item in source.parent.glob("*") if source.name == "__init__.py"})


def python_blocks() -> list[tuple[str, str]]:
    """Return (page, source) of every Python block."""
    return [(str(p.relative_to(ROOT)), block) for p in pages() for block in fences(p, "python")]


@pytest.mark.parametrize(("page", "source"), python_blocks(), ids=lambda value: value[:40])
def test_python_block_compiles_and_its_names_exist(page: str, source: str) -> None:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "mtlsign":
            assert {alias.name for alias in node.names} <= names_in(str(node.module)), node.module
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "mtlsign"
        ):
            assert node.attr in names_in("mtlsign")


def test_python_blocks_call_with_existing_keywords() -> None:
    checked = 0
    for page, source in python_blocks():
        tree = ast.parse(source)
        origin = {
            alias.name: str(node.module)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mtlsign")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in origin:
                function = getattr(importlib.import_module(origin[node.func.id]), node.func.id)
            elif ast.unparse(node.func) in ("mtlsign.embed", "mtlsign.verify"):
                function = getattr(importlib.import_module("mtlsign"), ast.unparse(node.func).split(".")[1])
            else:
                continue
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            assert inspect.signature(function).bind_partial(*node.args, **keywords), page
            checked += 1
    assert checked > 5


def test_python_reference_names_existing_objects() -> None:
    page = (DOCS / "reference" / "python-api.md").read_text("utf-8")
    identifiers = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    assert len(identifiers) > 10
    for identifier in identifiers:
        module, _, name = identifier.rpartition(".")
        assert name in names_in(module), identifier


def test_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def navigation(items: list[object]) -> Iterator[str]:
    """Yield the pages of the navigation of the site."""
    for item in items:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            for value in item.values():
                yield from navigation(value if isinstance(value, list) else [value])


def test_navigation_lists_every_page() -> None:
    listed = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    mounted = set(script_mounts().values())
    documents = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    notes = {name for name in documents if re.match(r"results/20[^/]+/", name)}
    assert len(listed) == len(set(listed))
    assert set(listed) == (documents - notes) | mounted


def script_mounts() -> dict[str, str]:
    """Return the documents outside of `docs/` with their pages, from the source of the hooks."""
    for node in ast.parse((DOCS / "site_hooks.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MOUNTED":
            mounts: dict[str, str] = ast.literal_eval(node.value)
            return mounts
    raise AssertionError("docs/site_hooks.py has no MOUNTED")


def test_generated_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("generate_reference").main(["--check"]) == 0, capsys.readouterr().out


def test_blank_line_precedes_every_list_and_table() -> None:
    """Python-Markdown, unlike a forge, reads them as part of the paragraph otherwise."""
    wrong = []
    for path in pages():
        text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), path.read_text("utf-8"))
        lines = text.splitlines()
        for number, (before, line) in enumerate(pairwise(lines), 2):
            starts = LAYOUT_LINE.match(line) and not line.startswith("    ")
            inside = LAYOUT_LINE.match(before) or before.startswith((" ", "#", "<!--"))
            if starts and before.strip() and not inside:
                wrong.append(f"{path.relative_to(ROOT)}:{number}")
    assert wrong == []


def test_decisions_have_every_section_and_are_listed() -> None:
    index = (DOCS / "decisions" / "README.md").read_text("utf-8")
    navigation_text = (ROOT / "mkdocs.yml").read_text("utf-8")
    for path in sorted((DOCS / "decisions").glob("0*.md")):
        text = path.read_text("utf-8")
        assert re.match(rf"# {path.name[:4]} \S", text), path.name
        assert re.search(r"^- Status: (accepted|superseded by \d{4})$", text, re.MULTILINE), path.name
        sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert sections == ["Context", "Options", "Decision", "Consequences"], path.name
        assert f"({path.name})" in index and f"decisions/{path.name}" in navigation_text


def test_architecture_lists_each_file_once_and_all_exist() -> None:
    text = (DOCS / "concepts" / "architecture.md").read_text("utf-8")
    sections = text.split("## Follow one value")[1].split("\n### ")[1:]
    assert len(sections) == 5
    for section in sections:
        files = re.findall(r"^\d+\. `([\w/.]+)`: ", section, re.MULTILINE)
        assert len(files) == len(set(files)) >= 3
        assert [name for name in files if not (ROOT / name).is_file()] == []


def test_citation_names_the_version_of_the_package() -> None:
    import mtlsign

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(citation["version"]) == mtlsign.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("source", "page", "text", "expected"),
    [
        ("README.md", "index.md", "[a](docs/attacks.md#x)", "[a](attacks.md#x)"),
        ("docs/how-to/add-a-task.md", "how-to/add-a-task.md", "[a](../../cluster.yaml)", "a"),
        (
            "docs/how-to/add-a-task.md",
            "how-to/add-a-task.md",
            "[a](../../jobs/README.md)",
            "[a](../project/jobs.md)",
        ),
        ("SECURITY.md", "project/security.md", "[a](docs/format.md)", "[a](../format.md)"),
        ("README.md", "index.md", "[a](https://example.org/b)", "[a](https://example.org/b)"),
        ("README.md", "index.md", "![a](docs/images/flow.svg)", "![a](images/flow.svg)"),
    ],
)
def test_site_rewrites_links(source: str, page: str, text: str, expected: str) -> None:
    assert script("site_hooks").rewrite_links(text, source=source, page=page) == expected


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="MkDocs is missing: uv run --dev --group docs pytest -m slow")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "index.html").is_file()
