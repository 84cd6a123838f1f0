"""Tests of the experiment folders in `docs/results` and of the generator of their pages."""

import csv
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "docs" / "generate_results.py"
EXPERIMENT = """\
title: A title
date: 2026-01-02
question: A question?
outcome: negative
summary: A summary.
task: null
commands: []
commits: []
hardware: one core
seeds: [1]
n: 1
supersedes: []
superseded_by: []
"""


def _load_generator() -> ModuleType:
    specification = importlib.util.spec_from_file_location("generate_results", GENERATOR)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["generate_results"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


generator = _load_generator()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository root with one valid experiment, `first`."""
    folder = tmp_path / "docs" / "results" / "2026-01-02-first"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    (folder / "results.csv").write_text("condition,mean,sd\nplain,1.5,\n")
    (folder / "notes.md").write_text("# A title\n")
    (tmp_path / "README.md").write_text("# Title\n\n<!-- results:first -->\n<!-- /results -->\n")
    return tmp_path


def test_generate_results_check_on_this_repository_passes() -> None:
    result = subprocess.run([sys.executable, str(GENERATOR), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_attack_table_display_rows_equal_its_results() -> None:
    folder = generator.read_experiments(ROOT)["attack-table"].folder
    header, *rows = generator.read_table(folder / "table.csv")
    with (folder / "results.csv").open(encoding="utf-8") as file:
        results = list(csv.DictReader(file))
    cells = {(row[0], arm): cell for row in rows for arm, cell in zip(header[1:], row[1:], strict=True)}
    for result in results:
        accuracy = f"{result['wm_accuracy_mean']} ± {result['wm_accuracy_sd']}"
        bits = f"{result['evidence_bits_mean']} ({result['evidence_bits_min']})"
        points = result["points_lost_mean"]
        display = f"{accuracy} · {bits} · {points if points == '0' else f'+{points}'}"
        name = f"{result['attack']} {result['parameters']}".strip()
        assert cells.pop((name, result["arm"])) == display
    assert set(cells.values()) == {"–"}


def test_generated_files_for_a_valid_experiment_hold_its_table_and_summary(repository: Path) -> None:
    files = generator.generated_files(repository)
    table = "| condition | mean |\n| --- | --- |\n| plain | 1.5 |\n"
    readme = f"# Title\n\n<!-- results:first -->\n{table}<!-- /results -->\n"
    assert files[repository / "README.md"] == readme
    assert table in files[repository / "docs" / "results.md"]
    assert "A question?* A summary." in files[repository / "docs" / "negative_results.md"]


def test_main_with_check_reports_stale_files_until_they_are_written(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "ROOT", repository)
    assert generator.main(["--check"]) == 1
    assert not (repository / "docs" / "results.md").exists()
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("experiment.yaml", EXPERIMENT.replace("n: 1\n", ""), "'n' is absent"),
        ("experiment.yaml", EXPERIMENT.replace("negative", "bad"), "outcome is none of"),
        ("experiment.yaml", EXPERIMENT.replace("01-02", "01-03"), "date differs"),
        ("experiment.yaml", EXPERIMENT.replace("commands: []", "commands: text"), "'commands' is absent"),
        ("experiment.yaml", EXPERIMENT.replace("supersedes: []", "supersedes: [other]"), "'other'"),
        ("experiment.yaml", "[]", "'title' is absent"),
        ("results.csv", "condition,mean\nplain,1.5,2\n", "rows of equal length"),
        ("results.csv", "condition,condition\nplain,1.5\n", "distinct column names"),
        ("results.csv", "condition,mean\n", "rows of equal length"),
        ("results.csv", "condition,mean\nplain,1 024\n", "not a number"),
        ("more.csv", "", "rows of equal length"),
        ("notes.md", "# A title\n" * 41, "too long"),
        ("notes.md", "word " * 21, "too wide"),
    ],
)
def test_read_experiments_with_an_invalid_file_raises(
    repository: Path, name: str, text: str, message: str
) -> None:
    (repository / "docs" / "results" / "2026-01-02-first" / name).write_text(text)
    with pytest.raises(generator.ResultsError, match=message):
        generator.read_experiments(repository)


@pytest.mark.parametrize("name", ["experiment.yaml", "results.csv", "notes.md"])
def test_read_experiments_without_a_required_file_raises(repository: Path, name: str) -> None:
    (repository / "docs" / "results" / "2026-01-02-first" / name).unlink()
    with pytest.raises(generator.ResultsError, match=f"{name} is missing"):
        generator.read_experiments(repository)


def test_read_experiments_with_two_equal_slugs_raises(repository: Path) -> None:
    folder = repository / "docs" / "results"
    shutil.copytree(folder / "2026-01-02-first", folder / "2026-01-03-first")
    text = EXPERIMENT.replace("01-02", "01-03")
    (folder / "2026-01-03-first" / "experiment.yaml").write_text(text)
    with pytest.raises(generator.ResultsError, match="share a slug"):
        generator.read_experiments(repository)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n<!-- results:unknown -->\n<!-- /results -->\n", "named 'unknown'"),
        ("\n<!-- results:first/unknown.csv -->\n<!-- /results -->\n", "no file 'unknown.csv'"),
        ("\n<!-- results:first -->\n", "lacks its start or end"),
        ("\n<!-- /results -->\n", "lacks its start or end"),
    ],
)
def test_fill_regions_with_an_invalid_marker_raises(repository: Path, text: str, message: str) -> None:
    experiments = generator.read_experiments(repository)
    with pytest.raises(generator.ResultsError, match=message):
        generator.fill_regions(repository / "README.md", text, experiments)
