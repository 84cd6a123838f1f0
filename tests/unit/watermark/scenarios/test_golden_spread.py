"""Scenarios of the spread head of format v1: a second reader and the package reproduce the golden file."""

from __future__ import annotations

import ast
import base64
import json
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.readouts import SpreadReadout
from mtlsign.watermark.verification.reference import Reference
from tests.conformance import reference_spread as reader
from tests.golden import make_spread as maker

GOLDEN: dict[str, Any] = json.loads(maker.SPREAD_FILE.read_text("utf-8"))
REFERENCE = base64.b64decode(GOLDEN["reference"])
LAYERS: list[reader.Layer] = [(name, groups, norm) for name, groups, norm in GOLDEN["layers"]]
CASES = pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=[f"{case['key']}: {case['suspect']}" for case in GOLDEN["cases"]]
)


@cache
def detector_of(name: str) -> WatermarkDetector:
    opening = KeyOpening.from_json(json.dumps(GOLDEN["keys"][name]["opening"]))
    return maker.make_detector(opening, Reference.from_bytes(REFERENCE))


def assert_equal_results(result: dict[str, Any], expected: dict[str, Any]) -> None:
    approximate = {name: pytest.approx(expected[name], abs=1e-9) for name in ("scores", "evidence_bits")}
    assert result == expected | approximate


def test_second_reader_imports_only_standard_library_numpy_and_cryptography() -> None:
    with open(reader.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    imported |= {str(n.module).split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"numpy", "cryptography"}


@pytest.mark.parametrize("name", list(GOLDEN["keys"]))
def test_second_reader_reproduces_golden_keys(name: str) -> None:
    golden = GOLDEN["keys"][name]
    assert reader.expand_key(golden["opening"], GOLDEN["coordinates"]) == golden["readouts"]


def test_maker_reproduces_golden_keys_from_golden_reference() -> None:
    reference = Reference.from_bytes(REFERENCE)
    made = maker.key_part(reference.digest, GOLDEN["coordinates"])
    assert json.dumps(made) == json.dumps(GOLDEN["keys"])


@CASES
def test_second_reader_reproduces_golden_scores(case: dict[str, Any]) -> None:
    opening = GOLDEN["keys"][case["key"]]["opening"]
    suspect = base64.b64decode(GOLDEN["suspects"][case["suspect"]])
    assert_equal_results(reader.evaluate_suspect(opening, REFERENCE, suspect, LAYERS), case["expected"])


@CASES
def test_package_reproduces_golden_scores(case: dict[str, Any]) -> None:
    suspect = base64.b64decode(GOLDEN["suspects"][case["suspect"]])
    assert_equal_results(maker.evaluate_suspect(detector_of(case["key"]), suspect), case["expected"])


@pytest.mark.parametrize("name", list(GOLDEN["keys"]))
def test_package_marks_golden_layers_in_execution_order(name: str) -> None:
    for readout in detector_of(name).readouts:
        assert isinstance(readout, SpreadReadout)
        layers = [(layer.weight, layer.groups, layer.batch_norm) for layer in readout.model.layers]
        assert layers == [(f"{layer}.weight", groups, norm) for layer, groups, norm in LAYERS]
        assert readout.model.coordinates == GOLDEN["coordinates"]
    names = [name for name, _, _ in LAYERS]
    registered = [name for name, _ in maker.Network().named_children() if name in names]
    assert names not in (registered, sorted(names))


def test_golden_cases_cover_every_rule_and_no_score_is_near_a_threshold() -> None:
    """Check that rounding cannot change a bit of the golden file."""
    results = {(case["key"], case["suspect"]): case["expected"] for case in GOLDEN["cases"]}
    for expected in results.values():
        sizes = np.abs(expected["scores"])
        assert ((sizes == 0) | (np.abs(sizes - 1e-4) > 1e-3)).all()
        assert expected["near_zero"] == (sizes == 0).sum()
    assert {e["status"] for e in results.values()} == {"accepted", "not_verifiable", "rejected"}
    assert {e["readings"] for e in results.values()} == {1, 2}
    assert any(e["near_zero"] for e in results.values())
    gammas = reader.parse_safetensors(base64.b64decode(GOLDEN["suspects"]["marked"]))["depth_norm.weight"]
    assert min(gammas) < 0 < max(gammas) and 0 in gammas
    assert GOLDEN["coordinates"] % 128 and GOLDEN["coordinates"] % 200  # some places are not used
