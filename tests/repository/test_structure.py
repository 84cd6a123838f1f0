"""Size limits of files and functions, and the shape of the package's root."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "mtlsign").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))


def lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text("utf-8").splitlines())


def test_package_root_holds_at_most_four_modules() -> None:
    assert len(list((ROOT / "mtlsign").glob("*.py"))) <= 4


def test_files_are_short() -> None:
    sizes = {str(path.relative_to(ROOT)): lines(path) for path in PACKAGE}
    assert {name: size for name, size in sizes.items() if size > 350} == {}
    assert statistics.median(size for name, size in sizes.items() if not name.endswith("__init__.py")) <= 150
    assert {path.name: lines(path) for path in JOBS if lines(path) > 60} == {}


def test_functions_are_at_most_60_lines() -> None:
    long = {}
    for path in (*PACKAGE, *JOBS):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                size = node.end_lineno - node.lineno + 1
                if size > 60:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = size
    assert long == {}
