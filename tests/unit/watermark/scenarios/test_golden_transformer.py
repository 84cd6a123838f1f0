"""Scenarios of attention layers in format v1: a second reader and the package reproduce the golden file."""

from __future__ import annotations

import ast
import base64
import json
import sys
from typing import Any

import numpy as np
import pytest

from tests.conformance import reference_transformer as reader
from tests.golden import make_transformer as maker
from tests.golden.make_recurrent import detector_of, evaluate_suspect
from tests.unit.watermark.scenarios.test_golden_recurrent import assert_equal_results

GOLDEN: dict[str, Any] = json.loads(maker.TRANSFORMER_FILE.read_text("utf-8"))
NETWORKS: dict[str, Any] = GOLDEN["networks"]
CASES = pytest.mark.parametrize(
    ("name", "suspect"), [(name, suspect) for name, part in NETWORKS.items() for suspect in part["suspects"]]
)


def test_second_reader_imports_only_standard_library_and_numpy() -> None:
    with open(reader.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    imported |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    own = {f"tests.conformance.reference_{name}" for name in ("spread", "recurrent")}
    assert imported - sys.stdlib_module_names <= {"numpy", "numpy.typing"} | own


@CASES
def test_second_reader_reproduces_golden_scores(name: str, suspect: str) -> None:
    part = NETWORKS[name]
    case = part["suspects"][suspect]
    reference, data = base64.b64decode(part["reference"]), base64.b64decode(case["file"])
    result = reader.evaluate_suspect(part["opening"], reference, data, part["structure"])
    assert_equal_results(result, case["expected"])


@CASES
def test_package_reproduces_golden_scores(name: str, suspect: str) -> None:
    part = NETWORKS[name]
    case = part["suspects"][suspect]
    detector = detector_of(part)
    assert maker.structure(detector) == part["structure"]
    assert_equal_results(evaluate_suspect(detector, base64.b64decode(case["file"])), case["expected"])


@pytest.mark.parametrize("name", list(NETWORKS))
def test_golden_cases_cover_every_rule_and_no_score_is_near_a_threshold(name: str) -> None:
    """Check that rounding cannot change a bit of the golden file."""
    expected = {suspect: case["expected"] for suspect, case in NETWORKS[name]["suspects"].items()}
    for result in expected.values():
        assert (np.abs(np.abs(result["scores"]) - 1e-4) > 1e-4).all()
    changes = expected.keys() - {"base"}
    assert {expected[suspect]["matching_bits"] for suspect in changes} == {"1" * 128}
    assert expected["base"]["evidence_bits"] < 20
    assert {result["readings"] for result in expected.values()} == {1, 2}
