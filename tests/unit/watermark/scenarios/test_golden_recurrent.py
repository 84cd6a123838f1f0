"""Scenarios of recurrent layers in format v1: a second reader and the package reproduce the golden file."""

from __future__ import annotations

import ast
import base64
import json
import sys
from typing import Any

import numpy as np
import pytest

from mtlsign.watermark import carriers
from tests.conformance import reference_recurrent as reader
from tests.golden import make_recurrent as maker

GOLDEN: dict[str, Any] = json.loads(maker.RECURRENT_FILE.read_text("utf-8"))
NETWORKS: dict[str, Any] = GOLDEN["networks"]
CASES = pytest.mark.parametrize(
    ("name", "suspect"), [(name, suspect) for name, part in NETWORKS.items() for suspect in part["suspects"]]
)


def assert_equal_results(result: dict[str, Any], expected: dict[str, Any]) -> None:
    approximate = {
        "scores": pytest.approx(expected["scores"], abs=1e-5),
        "evidence_bits": pytest.approx(expected["evidence_bits"], abs=1e-9),
        "similarity": pytest.approx(expected["similarity"], abs=1e-6),
    }
    assert result == expected | approximate


def test_second_reader_imports_only_standard_library_and_numpy() -> None:
    with open(reader.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    imported |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    expected = {"numpy", "numpy.typing", "tests.conformance.reference_spread"}
    assert imported - sys.stdlib_module_names <= expected


def test_both_readers_reproduce_golden_words() -> None:
    words = GOLDEN["word carrier"]
    assert reader.key_words(words["integers"], words["carrier"]) == words["tokens"]
    inputs = carriers.parse(words["carrier"]).inputs(np.array(words["integers"]))
    assert inputs.tolist() == words["tokens"]


@CASES
def test_second_reader_reproduces_golden_scores(name: str, suspect: str) -> None:
    part = NETWORKS[name]
    case = part["suspects"][suspect]
    reference, data = base64.b64decode(part["reference"]), base64.b64decode(case["file"])
    result = reader.evaluate_suspect(part["opening"], reference, data, part["matrices"], part["gates"])
    assert_equal_results(result, case["expected"])


@CASES
def test_package_reproduces_golden_scores(name: str, suspect: str) -> None:
    part = NETWORKS[name]
    case = part["suspects"][suspect]
    detector = maker.detector_of(part)
    assert maker.kernel_names(detector) == part["matrices"]
    assert_equal_results(maker.evaluate_suspect(detector, base64.b64decode(case["file"])), case["expected"])


@pytest.mark.parametrize("name", list(NETWORKS))
def test_golden_cases_cover_every_rule_and_no_score_is_near_a_threshold(name: str) -> None:
    """Check that rounding cannot change a bit of the golden file."""
    expected = {suspect: case["expected"] for suspect, case in NETWORKS[name]["suspects"].items()}
    for result in expected.values():
        assert (np.abs(np.abs(result["scores"]) - 1e-4) > 1e-4).all()
    changes = expected.keys() - {"base"}
    assert {expected[suspect]["matching_bits"] for suspect in changes} == {"1" * 128}
    assert "0" * 20 not in expected["base"]["matching_bits"] and expected["base"]["evidence_bits"] < 20
    assert {result["readings"] for result in expected.values()} == {1, 2}
