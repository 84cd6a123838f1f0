"""Scenarios of format v1: reference verifier and package reproduce the golden vectors."""

from __future__ import annotations

import ast
import base64
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtlsign.errors import KeyMaterialError
from mtlsign.watermark.keys import opening as key
from mtlsign.watermark.keys import spec
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification import evidence

TESTS = Path(__file__).parents[3]


GOLDEN: dict[str, Any] = json.loads((TESTS / "golden" / "v1" / "vectors.json").read_text("utf-8"))


READER_FILE = TESTS / "conformance" / "reference_verifier.py"


READER = runpy.run_path(str(READER_FILE))


MAKER = runpy.run_path(str(TESTS / "golden" / "make_vectors.py"))


NAMES = list(GOLDEN["vectors"])


def test_reference_verifier_imports_only_standard_library_and_cryptography() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(READER_FILE.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    standard = {"__future__", "base64", "hashlib", "hmac", "json", "math", "struct", "typing"}
    assert imported - standard == {"cryptography"}


@pytest.mark.parametrize("name", NAMES)
def test_reference_verifier_reproduces_golden_vector(name: str) -> None:
    vector = GOLDEN["vectors"][name]
    assert READER["expand_key"](vector["opening"], d=vector["expected"]["d"]) == vector["expected"]


@pytest.mark.parametrize("name", NAMES)
def test_package_reproduces_golden_vector(name: str) -> None:
    vector = GOLDEN["vectors"][name]
    opening = key.KeyOpening.from_json(json.dumps(vector["opening"]))
    assert MAKER["expand_key"](opening) == vector["expected"]
    assert json.loads(opening.to_json()) == vector["opening"]
    assert opening.public_key.hex() == GOLDEN["public_key"]


def test_package_signature_equals_golden_opening() -> None:
    owner = Identity(bytes.fromhex(GOLDEN["seed"]), bytes.fromhex(GOLDEN["kit_key"]))
    for vector in GOLDEN["vectors"].values():
        spec = base64.b64decode(vector["opening"]["spec"])
        assert json.loads(key.sign_spec(owner, spec).to_json()) == vector["opening"]


def test_tails_of_both_implementations_equal_golden_tails() -> None:
    for row in GOLDEN["tails"]:
        if "weights" in row:
            weights, correct = list(bytes.fromhex(row["weights"])), list(map(int, row["correct"]))
            second = READER["weighted_tail_bits"](weights, correct)
            package = evidence.weighted_tail_bits(weights, np.array(correct, bool))
        else:
            second, package = (
                READER["tail_bits"](row["k"], row["n"]),
                evidence.binomial_evidence_bits(row["k"], row["n"]),
            )
        assert second == pytest.approx(row["bits"], abs=1e-9)
        assert package == pytest.approx(row["bits"], abs=1e-9)


def test_golden_identity_file_opens_in_both_implementations(tmp_path: Path) -> None:
    text, passphrase = GOLDEN["identity"]["file"], GOLDEN["identity"]["passphrase"].encode()
    secret = bytes.fromhex(GOLDEN["seed"] + GOLDEN["kit_key"])
    assert READER["decrypt_identity"](text, passphrase) == secret
    path = tmp_path / "identity.json"
    path.write_text(text)
    owner = Identity.load(path, passphrase)
    assert owner.public_key.hex() == GOLDEN["public_key"] and owner.kit_key == secret[32:]


@pytest.mark.parametrize("reason", list(GOLDEN["refused"]))
def test_parse_spec_refuses_golden_invalid_specs(reason: str) -> None:
    data = base64.b64decode(GOLDEN["refused"][reason])
    assert data != base64.b64decode(GOLDEN["vectors"]["keyed-1024"]["opening"]["spec"])
    with pytest.raises(KeyMaterialError):
        spec.parse_spec(data)


CANONICAL: dict[str, Any] = json.loads((TESTS / "golden" / "v1" / "frame.json").read_text("utf-8"))


def test_references_of_both_implementations_equal_golden_reference() -> None:
    """W0's kernels give the golden reference: its layout, column norms, sketch, |γ|, β, ε."""
    golden = READER["parse_safetensors"](base64.b64decode(CANONICAL["reference"]))
    second = READER["make_reference"](CANONICAL)
    package = MAKER["canonical_vector"]()
    assert package["w0"] == CANONICAL["w0"] and package["suspect"] == CANONICAL["suspect"]
    package_values = READER["parse_safetensors"](base64.b64decode(package["reference"]))
    for found in (second, package_values):
        assert list(found) == list(golden) == sorted(golden)
        for name, numbers in golden.items():
            exact = not name.endswith("/columns")  # sums in another order may differ in the last bit
            assert found[name] == (numbers if exact else pytest.approx(numbers, rel=1e-12)), name
    assert any(x < 0 for x in golden["0/sketch"]) and min(CANONICAL["w0"]["1.weight"]) < 0


def test_canonical_kernels_and_scores_of_both_implementations_equal_golden_values() -> None:
    """Compare from a suspect's kernels to k: canonical form, batch statistics, read-out, control keys."""
    opening = key.KeyOpening.from_json(json.dumps(CANONICAL["opening"]))
    reference = MAKER["Reference"].from_bytes(base64.b64decode(CANONICAL["reference"]))
    golden = CANONICAL["expected"]
    package = MAKER["evaluate_suspect"](opening, reference, MAKER["tensors_of"](CANONICAL["suspect"]))
    for found in (READER["evaluate_suspect"](CANONICAL), package):
        for name, numbers in golden["framed"].items():
            assert found["framed"][name] == pytest.approx(numbers, abs=1e-6), name
        assert found["scores"] == pytest.approx(golden["scores"], abs=1e-3)
        assert {n: found[n] for n in ("matches", "near_zero", "control_keys")} == {
            n: golden[n] for n in ("matches", "near_zero", "control_keys")
        }
    assert min(abs(s) for s in golden["scores"]) > 2e-3  # no score is near a threshold, so k cannot differ
    assert np.std(golden["scores"]) > 0.1


def test_format_document_quotes_first_vector() -> None:
    text = (TESTS.parent / "docs" / "format.md").read_text("utf-8")
    vector = GOLDEN["vectors"]["keyed-1024"]
    opening, expected = vector["opening"], vector["expected"]
    quoted = [base64.b64decode(opening["spec"]).decode(), opening["public_key"], opening["signature"]]
    quoted += [
        expected[name] for name in expected if name.endswith("sha256") or name in ("key", "labels_first")
    ]
    quoted += [expected["signs_first"], ", ".join(map(str, expected["integers_first"])), GOLDEN["seed"]]
    for drawn in expected["images"]:
        quoted += [drawn["modules_sha256"], drawn["image_sha256"]]
    rows = [row.replace("1", "#").replace("0", ".") for drawn in expected["images"] for row in drawn["rows"]]
    assert [value for value in quoted + rows if value not in text] == []
