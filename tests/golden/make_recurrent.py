"""Writer of the golden vectors of recurrent layers in format v1. Run it only to change the format.

The owner is the PUBLISHED TEST KEY of `make_vectors.py`: never mark a model with it.
"""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.attacks.base import AttackerResources
from mtlsign.attacks.recurrent_symmetries import permute_vocabulary, recurrent_symmetries
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.input_spec import TextSpec
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark import carriers
from mtlsign.watermark.keys import identity, spec
from mtlsign.watermark.keys import opening as key
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from mtlsign.watermark.verification.scores import best_result, matching_bits
from tests.golden.make_vectors import TEST_KIT_KEY, TEST_SEED, WARNING, sha256
from tests.unit.watermark.verification.spread_examples import mark

RECURRENT_FILE = Path(__file__).parent / "v1" / "recurrent.json"
SPEC = TextSpec(vocabulary=64, embedding=7, length=9, classes=3)
TAPS = ["encoder"]
NETWORKS = {"bilstm": 2, "gru": 1}


def base_network(name: str) -> nn.Module:
    """Return W0."""
    architecture = architecture_for(name, **SPEC.architecture_fields, width=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(architecture | {"layers": NETWORKS[name]}).eval()


def tokens() -> Tensor:
    """Return texts of 2 to 9 tokens, int64 [200, 9]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (200, 9), generator=generator)
    return ids * (torch.arange(9) < torch.randint(2, 10, (200, 1), generator=generator))


def make_opening(name: str, reference_digest: str) -> key.KeyOpening:
    """Return the signed opening of one network."""
    architecture = architecture_for(name, **SPEC.architecture_fields, width=12)
    return key.sign_spec(
        identity.Identity(TEST_SEED, TEST_KIT_KEY),
        spec.make_spec(
            name=f"test {name}", nonce=sha256(name.encode()), n=128, taps=TAPS, head={"kind": "spread"},
            carrier=carriers.make("words", 128, SPEC), statistic="count", reference=reference_digest,
            architecture=architecture | {"layers": NETWORKS[name]},
        ),
    )  # fmt: skip


def kernel_names(detector: WatermarkDetector) -> list[str]:
    """Return the matrices in the order in which the network reads them."""
    return list(detector.weight_shapes)


def suspects(model: nn.Module, detector: WatermarkDetector) -> dict[str, bytes]:
    """Return the suspects' files: with the matrices and the embedding of a marked network."""
    names = [*kernel_names(detector), "embedding.weight"]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marked = copy.deepcopy(model)
    marked.load_state_dict(state | mark(state, detector, steps=14, size=0.06))
    changed = recurrent_symmetries(marked, None, AttackerResources(), 2).model  # type: ignore[arg-type]
    renumbered = permute_vocabulary(changed, None, AttackerResources(), 3).model  # type: ignore[arg-type]
    files = {
        "marked": marked.state_dict(), "changed": changed.state_dict(), "base": state,
        "renumbered": renumbered.state_dict(),
    }  # fmt: skip
    if any(name.endswith("_reverse") for name in names):
        files["exchanged"] = _exchanged(changed.state_dict(), names)
    return {
        name: serialize_safetensors({n: t.clone() for n, t in tensors.items() if n in names})
        for name, tensors in files.items()
    }


def _exchanged(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    result = {"embedding.weight": state["embedding.weight"]}
    for name in names[:-1]:
        other = name.removesuffix("_reverse") if name.endswith("_reverse") else f"{name}_reverse"
        result[other] = state[name].roll(12, 1) if "weight_ih_l1" in name else state[name]
    return result


def evaluate_suspect(detector: WatermarkDetector, suspect: bytes) -> dict[str, Any]:
    """Return scores, matching bits and evidence of the better reading, by the package."""
    tensors = parse_safetensors(suspect)
    result, verdict = best_result(detector.score_all(tensors), detector.labels), verify(tensors, detector)
    assert result.scores is not None
    return {
        "scores": result.scores.tolist(),
        "matching_bits": "".join(map(str, matching_bits(result.scores, detector.labels).int().tolist())),
        "evidence_bits": verdict.evidence_bits,
        "readings": verdict.readings,
        "similarity": verdict.similarity,
    }


def expected_results(detector: WatermarkDetector, files: dict[str, bytes]) -> dict[str, Any]:
    """Return the files of suspects, each with its expected result."""
    return {
        suspect: {
            "file": base64.b64encode(data).decode("ascii"),
            "expected": evaluate_suspect(detector, data),
        }
        for suspect, data in files.items()
    }


def build_network(name: str) -> dict[str, Any]:
    """Return the part of one network."""
    model, inputs = base_network(name), tokens()
    bases = response_bases(model, TAPS, inputs)
    reference = make_reference(model, TAPS, inputs[:2], bases=bases)
    opening = make_opening(name, reference.digest)
    detector = WatermarkDetector(opening, reference)
    files = suspects(model, detector)
    return {
        "gates": 4 if "lstm" in name else 3,
        "matrices": kernel_names(detector),
        "opening": json.loads(opening.to_json()),
        "reference": base64.b64encode(reference.raw_bytes).decode("ascii"),
        "suspects": expected_results(detector, files),
    }


def key_sequences() -> dict[str, Any]:
    """Return integers with their sequences of token ids."""
    fields = carriers.make("words", 128, TextSpec(5000, 50, 20, 2))
    integers = key.watermark_integers(bytes(range(32)), 6)
    return {
        "carrier": fields,
        "integers": integers.tolist(),
        "tokens": carriers.parse(fields).inputs(integers).tolist(),
    }


def build_golden() -> dict[str, Any]:
    """Return the content of `recurrent.json`."""
    networks = {name: build_network(name) for name in NETWORKS}
    return {"warning": WARNING, "word carrier": key_sequences(), "networks": networks}


def detector_of(part: dict[str, Any]) -> WatermarkDetector:
    """Return the package's detector of one network of the golden file."""
    opening = key.KeyOpening.from_json(json.dumps(part["opening"]))
    return WatermarkDetector(opening, Reference.from_bytes(base64.b64decode(part["reference"])))


if __name__ == "__main__":
    text = json.dumps(build_golden(), indent=1, ensure_ascii=False) + "\n"
    RECURRENT_FILE.write_text(text, encoding="utf-8")
    print(f"wrote {RECURRENT_FILE}")
