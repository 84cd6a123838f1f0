"""Writer of the golden vectors of the spread head of format v1. Run it only to change the format.

The owner is the PUBLISHED TEST KEY of `make_vectors.py`: never mark a model with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys import identity, spec
from mtlsign.watermark.keys import opening as key
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.readouts import SpreadReadout, readout_key
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from mtlsign.watermark.verification.scores import best_result, matching_bits
from tests.golden.make_vectors import TEST_KIT_KEY, TEST_SEED, WARNING, OwnOrderDetector, sha256
from tests.unit.watermark.verification.spread_examples import images, mark

SPREAD_FILE = Path(__file__).parent / "v1" / "spread.json"
ARCHITECTURE, TAPS = "golden:spread", ["hidden", "head"]
#: Marked layers in execution order: module, groups, batch norm. `stem` is not marked.
LAYERS = (
    ("grouped", 2, "grouped_norm"), ("depth", 12, "depth_norm"), ("point", 1, "point_norm"),
    ("hidden", 1, None), ("head", 1, None),
)  # fmt: skip


class Network(nn.Module):
    """Grouped, depthwise, pointwise and linear layers, registered in another order than they are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.hidden = nn.Linear(24, 8), nn.Linear(64, 24)
        self.point_norm, self.point = nn.BatchNorm2d(16), nn.Conv2d(12, 16, 1, bias=False)
        self.depth_norm, self.depth = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, groups=12)
        self.grouped_norm, self.grouped = nn.BatchNorm2d(12), nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.stem_norm, self.stem = nn.BatchNorm2d(8), nn.Conv2d(1, 8, 3, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        for name in ("stem", "grouped", "depth", "point"):
            x = torch.relu(self.get_submodule(f"{name}_norm")(self.get_submodule(name)(x)))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: Tensor = self.head(torch.relu(self.hidden(x)))
        return logits


def base_network() -> Network:
    """Return W0, with γ of both signs and 0, and running statistics of natural inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            gamma = [(byte - 128) / 64 for byte in hashlib.sha256(name.encode()).digest()]
            module.weight.data = torch.tensor(gamma[: module.num_features])
            module.weight.data[1] = 0.0
    model.train()(images())
    return model.eval()


def openings(reference_digest: str) -> dict[str, key.KeyOpening]:
    """Return the signed openings: one read-out, and two with weighted statistic.

    The nonces are chosen so that one score is 0 and no other is near a threshold.
    """
    owner = identity.Identity(TEST_SEED, TEST_KIT_KEY)
    common: dict[str, Any] = {
        "n": 128, "carrier": qr.make_carrier(128, 1, 21, 21), "taps": TAPS, "head": {"kind": "spread"},
        "architecture": {"arch": f"custom/{ARCHITECTURE}"}, "reference": reference_digest,
    }  # fmt: skip
    second = {"head": {"kind": "spread"}, "taps": ["head"], "n": 200}
    choices: dict[str, dict[str, Any]] = {
        "one read-out": {"statistic": "count"},
        "two read-outs": {"statistic": "weighted", "readouts": [second]},
    }
    return {
        name: key.sign_spec(
            owner, spec.make_spec(name=f"test {name}", nonce=sha256(f"{name}/2".encode()), **common, **choice)
        )
        for name, choice in choices.items()
    }


def make_detector(opening: key.KeyOpening, reference: Reference) -> WatermarkDetector:
    """Return the package's detector of an opening, without alignment."""
    return OwnOrderDetector(opening, reference, factories={ARCHITECTURE: Network})


def unordered_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """Return safetensors bytes with the data in the given order and the header in the reverse order."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        single = serialize_safetensors({name: tensor})
        (size,) = struct.unpack("<Q", single[:8])
        entry = json.loads(single[8 : 8 + size])[name]
        header[name] = entry | {"data_offsets": [len(body), len(body) + entry["data_offsets"][1]]}
        body += single[8 + size :]
    text = json.dumps(dict(reversed(header.items()))).encode()
    return struct.pack("<Q", len(text)) + text + body


def suspects(detectors: dict[str, WatermarkDetector], state: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the suspects' files.

    Args:
        detectors: by the name of the opening.
        state: state dict of W0.
    """
    read = {name: state[name] for layer, _, norm in LAYERS for name in (f"{layer}.weight", f"{norm}.weight")
            if name in state}  # fmt: skip
    marked, two = (
        {name: tensor for name, tensor in mark(state, detector).items() if name in read}
        for detector in detectors.values()
    )
    missing = {name: tensor.clone() for name, tensor in marked.items() if name != "grouped.weight"}
    missing["depth.weight"][4, 0, 1, 1] = torch.nan
    missing["hidden.weight"][3], missing["hidden.weight"][:, 5] = 0.0, 0.0
    missing["head.weight"] = missing["head.weight"].double() / 3
    missing["head.weight"][:4, 12:] /= 100  # the column scaling of two blocks converges slowly
    missing["head.weight"][4:, :12] /= 100
    del missing["point_norm.weight"]
    absent = ("grouped.weight", "point.weight")
    prefixed = {f"copy.{name}": t.bfloat16() for name, t in read.items() if name not in absent}
    prefixed |= {f"part.{name}": read[name] for name in absent}  # fewer than half: not a reading
    prefixed |= {f"module.net.{name}": tensor for name, tensor in (state | marked).items()}
    halves = {name: tensor.half() for name, tensor in marked.items()}
    halves["depth_norm.weight"][0] = torch.inf
    return {
        "marked": serialize_safetensors(marked),
        "two layers missing": serialize_safetensors(missing),
        "order, prefix and decoys": unordered_safetensors(prefixed),
        "float16": serialize_safetensors(halves),
        "two read-outs": serialize_safetensors(two),
    }


def expand_key(opening: key.KeyOpening, d: int) -> list[dict[str, Any]]:
    """Return what a key determines for each read-out over d coordinates, by the package."""
    expanded = []
    for index, readout in enumerate(opening.parse().readouts):
        own_key = readout_key(opening.key(), index)
        expanded.append({
            "key": own_key.hex(),
            "labels": "".join(map(str, key.watermark_labels(own_key, readout.n))),
            "signs": "".join("+" if sign > 0 else "-" for sign in key.head_signs(own_key, d)),
            "order": " ".join(map(str, key.spread_order(own_key, d))),
        })  # fmt: skip
    return expanded


def evaluate_suspect(detector: WatermarkDetector, suspect: bytes) -> dict[str, Any]:
    """Return scores, matching bits, evidence and status, by the package."""
    tensors = parse_safetensors(suspect)
    result, verdict = best_result(detector.score_all(tensors), detector.labels), verify(tensors, detector)
    assert result.scores is not None and tuple(result.missing) == verdict.missing_layers
    return {
        "scores": result.scores.tolist(),
        "matching_bits": "".join(map(str, matching_bits(result.scores, detector.labels).int().tolist())),
        "near_zero": verdict.near_zero,
        "evidence_bits": verdict.evidence_bits,
        "missing": list(verdict.missing_layers),
        "readings": verdict.readings,
        "status": verdict.status,
    }


def key_part(reference_digest: str, d: int) -> dict[str, Any]:
    """Return the openings, and what their keys determine over d coordinates."""
    return {
        name: {"opening": json.loads(opening.to_json()), "readouts": expand_key(opening, d)}
        for name, opening in openings(reference_digest).items()
    }


def build() -> dict[str, Any]:
    """Return the content of `spread.json`."""
    model, inputs = base_network(), images()
    bases = response_bases(model, TAPS, inputs, layers=[layer for layer, _, _ in LAYERS])
    reference = make_reference(model, TAPS, inputs[:2], bases=bases)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    detectors = {
        name: make_detector(opening, reference) for name, opening in openings(reference.digest).items()
    }
    readout = detectors["one read-out"].readouts[0]
    assert isinstance(readout, SpreadReadout)
    coordinates = readout.model.coordinates
    files = suspects(detectors, state)
    cases = [("two read-outs" if name == "two read-outs" else "one read-out", name) for name in files]
    cases.append(("two read-outs", "marked"))  # an unrelated key
    return {
        "warning": WARNING,
        "layers": [list(layer) for layer in LAYERS],
        "coordinates": coordinates,
        "reference": base64.b64encode(reference.raw_bytes).decode("ascii"),
        "keys": key_part(reference.digest, coordinates),
        "suspects": {name: base64.b64encode(data).decode("ascii") for name, data in files.items()},
        "cases": [
            {"key": name, "suspect": suspect, "expected": evaluate_suspect(detectors[name], files[suspect])}
            for name, suspect in cases
        ],
    }


if __name__ == "__main__":
    SPREAD_FILE.write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {SPREAD_FILE}")
