"""Scenarios of aligned channels in format v1: a second reader and the package reproduce the golden file."""

from __future__ import annotations

import ast
import base64
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch

from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.alignment import Aligner
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from tests.conformance import reference_alignment as reader
from tests.golden import make_alignment as maker
from tests.golden.make_recurrent import evaluate_suspect

GOLDEN: dict[str, Any] = json.loads(maker.ALIGNMENT_FILE.read_text("utf-8"))
REFERENCE = base64.b64decode(GOLDEN["reference"])
CASES = pytest.mark.parametrize("suspect", list(GOLDEN["suspects"]))
CHANGED = ("permuted", "permuted and turned")


def file_of(suspect: str) -> bytes:
    return base64.b64decode(GOLDEN["suspects"][suspect]["file"])


def package_detector() -> WatermarkDetector:
    opening = KeyOpening.from_json(json.dumps(GOLDEN["opening"]))
    return maker.make_detector(opening, Reference.from_bytes(REFERENCE))


def assert_equal_results(result: dict[str, Any], expected: dict[str, Any]) -> None:
    approximate = {
        "scores": pytest.approx(expected["scores"], abs=1e-6),
        "evidence_bits": pytest.approx(expected["evidence_bits"], abs=1e-9),
        "similarity": pytest.approx(expected["similarity"], abs=1e-6),
    }
    assert result == expected | approximate


def test_second_reader_imports_only_standard_library_and_numpy() -> None:
    with open(reader.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    imported |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    readers = {"tests.conformance.reference_spread", "tests.conformance.reference_recurrent"}
    assert imported - sys.stdlib_module_names <= {"numpy", "numpy.typing"} | readers


@CASES
def test_second_reader_reproduces_golden_scores(suspect: str) -> None:
    result = reader.evaluate_suspect(GOLDEN["opening"], REFERENCE, file_of(suspect), GOLDEN["structure"])
    assert_equal_results(result, GOLDEN["suspects"][suspect]["expected"])


@CASES
def test_package_reproduces_golden_scores(suspect: str) -> None:
    result = evaluate_suspect(package_detector(), file_of(suspect))
    assert_equal_results(result, GOLDEN["suspects"][suspect]["expected"])


@pytest.mark.parametrize("suspect", CHANGED)
def test_second_reader_brings_changed_kernels_into_the_order_of_the_marked_file(suspect: str) -> None:
    layers = [
        reader.Layer(
            part, reader.parse_safetensors(REFERENCE), parse_safetensors(file_of(name))[weight].numpy()
        )
        for name in (suspect, "marked")
        for part in GOLDEN["structure"]["layers"]
        for weight in [f"{part['module']}.weight"]
    ]
    changed, marked = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    alignment = reader.aligned(changed, GOLDEN["structure"])
    for own, other in zip(changed, marked, strict=True):
        signs = np.sign((other.kernel * alignment.aligned(own)).sum((1, 2)))  # those of γ are undone, too
        assert np.array_equal(alignment.aligned(own) * signs[:, None, None], other.kernel)


def test_both_readers_undo_a_mix_of_input_channels() -> None:
    part, files, detector = maker.part_of(channels=3)
    tensors = parse_safetensors(files["permuted and turned"])
    mix = torch.tensor([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
    stem = torch.einsum("ocij,cd->odij", tensors["stem.weight"].double(), torch.linalg.inv(mix.double()))
    mixed = serialize_safetensors({**tensors, "stem.weight": stem.float()})
    expected = evaluate_suspect(detector, mixed)
    result = reader.evaluate_suspect(
        part["opening"], base64.b64decode(part["reference"]), mixed, part["structure"]
    )
    assert_equal_results(result, expected)
    assert expected["matching_bits"].count("1") >= 127 and expected["readings"] == 2


def test_own_order_of_changed_kernels_does_not_show_the_mark() -> None:
    detector = package_detector()
    tensors = parse_safetensors(file_of("permuted"))
    with torch.no_grad():
        scores = detector.score(detector.read(detector.select_weights(tensors)))
    matches = int(((scores > 0) == (detector.labels > 0)).sum())
    assert 44 <= matches <= 84 and isinstance(detector.aligner, Aligner)


def test_golden_cases_cover_every_rule_and_no_score_is_near_a_threshold() -> None:
    """Check that rounding cannot change a bit of the golden file."""
    expected = {suspect: case["expected"] for suspect, case in GOLDEN["suspects"].items()}
    for result in expected.values():
        assert (np.abs(np.abs(result["scores"]) - 1e-4) > 1e-4).all()
    marked = expected.keys() - {"base", "base, permuted"}
    assert {expected[suspect]["matching_bits"] for suspect in marked} == {"1" * 128}
    assert expected["base"]["evidence_bits"] < 20
    assert {result["readings"] for result in expected.values()} == {1, 2}
    layers = GOLDEN["structure"]["layers"]
    assert {layer["batch_norm"] is None for layer in layers} == {True, False}
    assert {layer["groups"] for layer in layers} == {1, 14}
    assert [2, 2] in [layer["window"] for layer in layers if layer["module"] == "hidden"]
