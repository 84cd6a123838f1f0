"""Writer of the golden vectors of format v1. Run it only to change the format.

The owner below is a PUBLISHED TEST KEY. Any reader can sign as this owner: never mark a model with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from mtlsign.models.untrusted import MappedTensors
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys import identity, spec
from mtlsign.watermark.keys import opening as key
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.alignment import Alignment, Descent
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference, make_reference

TEST_SEED = b"MTLSIGN TEST OWNER, NEVER USE IT"
TEST_KIT_KEY = b"MTLSIGN TEST KIT KEY, PUBLISHED!"
TEST_PASSPHRASE = b"a published test passphrase"
VECTORS_FILE = Path(__file__).parent / "v1" / "vectors.json"
CANONICAL_FILE = Path(__file__).parent / "v1" / "frame.json"
#: The published warning. Its wording is part of the golden files and does not change.
WARNING = json.loads(VECTORS_FILE.read_text("utf-8"))["warning"]
D = 1000
#: The network of `frame.json`: (name, out, in/groups, side, stride, groups); batch norm and ReLU after each.
CONVS = (("0", 4, 1, 5, 4, 1), ("3", 4, 2, 3, 1, 2), ("6", 4, 1, 1, 1, 4))
TAP = "8"


def sha256(data: bytes) -> str:
    """Return SHA-256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def specs() -> dict[str, bytes]:
    """Return four specs with every digit-group length, both heads, odd remainders, and both paddings."""
    common: dict[str, Any] = {
        "reference": sha256(b"mtlsign test reference"),
        "architecture": {
            "arch": "torchvision/resnet18",
            "channels": 3,
            "classes": 10,
            "width": 16,
            "stem": "cifar",
        },
        "taps": ["layer1"],
        "head": {"kind": "keyed"},
        "statistic": "count",
    }
    free = {"kind": "free", "hidden": 64, "features": "pooled"}
    odd = qr.make_carrier(600, 1, 47, 52, module=2) | {"pad": 1, "mean_milli": 286, "std_milli": 353}
    choices: dict[str, dict[str, Any]] = {
        "keyed-1024": {"n": 1024, "carrier": qr.make_carrier(1024, 3, 32, 32)},
        "free-600": {"n": 600, "carrier": odd, "head": free, "taps": ["layer1", "layer2", "layer3"]},
        "weighted-128": {"n": 128, "carrier": qr.make_carrier(128, 1, 21, 21), "statistic": "weighted"},
        "keyed-4096": {"n": 4096, "carrier": qr.make_carrier(4096, 3, 224, 224), "name": "test · 試験"},
    }
    return {
        name: spec.make_spec(**({"name": f"test {name}", "nonce": sha256(name.encode())} | common | choice))
        for name, choice in choices.items()
    }


def expand_key(opening: key.KeyOpening) -> dict[str, Any]:
    """Return everything that a key determines, by the package."""
    secret, parsed = opening.key(), opening.parse()
    pi, bits, signs = (
        key.watermark_integers(secret, parsed.n),
        key.watermark_labels(secret, parsed.n),
        key.head_signs(secret, D),
    )
    codes, images = qr.encode_modules(pi[:2], parsed.carrier.digits), qr.images(pi[:2], parsed.carrier)
    return {
        "key": secret.hex(),
        "m": spec.m_bits(parsed.n),
        "integers_first": pi[:8].tolist(),
        "integers_sha256": sha256(pi.astype(">u8").tobytes()),
        "labels_first": "".join(map(str, bits[:64])),
        "labels_sha256": sha256(bits.tobytes()),
        "d": D,
        "signs_first": "".join("+" if s > 0 else "-" for s in signs[:64]),
        "signs_sha256": sha256((signs > 0).astype(np.uint8).tobytes()),
        "images": [
            {
                "integer": int(pi[i]),
                "rows": ["".join(map(str, row)) for row in codes[i].tolist()],
                "modules_sha256": sha256(codes[i].tobytes()),
                "image_sha256": sha256(images[i].numpy().astype("<f4").tobytes()),
            }
            for i in range(2)
        ],
    }


def tails() -> list[dict[str, Any]]:
    """Return exact tails in bits: doubles, to be matched to 1e-9."""
    counts = (
        (600, 300),
        (600, 420),
        (600, 451),
        (600, 452),
        (1024, 711),
        (1024, 712),
        (128, 128),
        (4096, 2500),
    )
    rows: list[dict[str, Any]] = [
        {"n": n, "k": k, "bits": evidence.binomial_evidence_bits(k, n)} for n, k in counts
    ]
    weights = [byte % 16 for byte in hashlib.sha512(b"weights").digest()]
    correct = [int(byte % 4 > 0) for byte in hashlib.sha512(b"correct").digest()]
    bits = evidence.weighted_tail_bits(weights, np.array(correct, bool))
    weighted = {"weights": bytes(weights).hex(), "correct": "".join(map(str, correct)), "bits": bits}
    return [*rows, weighted]


def identity_file(owner: identity.Identity) -> str:
    """Return a protected identity file with fixed salt and nonce, which are random in real files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "identity.json"
        with mock.patch(
            "mtlsign.watermark.keys.identity.secrets.token_bytes", lambda size: bytes(range(size))
        ):
            owner.save(path, TEST_PASSPHRASE)
        return path.read_text("ascii")


def refused() -> dict[str, str]:
    """Return spec bytes (base64) that every reader must refuse, by reason."""
    good = specs()["keyed-1024"].decode()
    bad: dict[str, bytes] = {
        "duplicate field": good.replace('"n":1024', '"n":1024,"n":1024').encode(),
        "duplicate field, escaped": good.replace('"n":1024', '"n":1024,"\\u006e":1024').encode(),
        "float": good.replace('"n":1024', '"n":1024.0').encode(),
        "exponent": good.replace('"mean_milli":500', '"mean_milli":5e2').encode(),
        "NaN": good.replace('"width":16', '"width":NaN').encode(),
        "minus zero": good.replace('"pad":0', '"pad":-0').encode(),
        "boolean for an integer": good.replace('"pad":0', '"pad":false').encode(),
        "integer over 64 bit": good.replace('"width":16', '"width":9223372036854775808').encode(),
        "unknown field": good.replace('"n":1024', '"n":1024,"m":30').encode(),
        "missing field": good.replace('"readouts":1,', "").encode(),
        "wrong digit count": good.replace('"digits":10', '"digits":11').encode(),
        "module too large": good.replace('"module":1', '"module":2').encode(),
        "lone surrogate": good.replace("test keyed", "test \\ud800").encode(),
        "direction override": good.replace("test keyed", "test \u202e").encode(),
        "byte order mark": b"\xef\xbb\xbf" + good.encode(),
        "not UTF-8": good.replace("test keyed", "test \xe9").encode("latin-1"),
        "nesting": b"[" * 1200 + b"]" * 1200,
        "version 0": good.replace('"mtlsign/v1"', '"mtlsign/v0"').encode(),
        "name of version 0": good.replace('"architecture":', '"graph":').encode(),
        "trailing bytes": good.encode() + b"{}",
    }
    return {reason: base64.b64encode(data).decode("ascii") for reason, data in bad.items()}


def build() -> dict[str, Any]:
    """Return the content of `vectors.json`."""
    owner = identity.Identity(TEST_SEED, TEST_KIT_KEY)
    openings = {name: key.sign_spec(owner, data) for name, data in specs().items()}
    return {
        "warning": WARNING,
        "seed": TEST_SEED.hex(),
        "kit_key": TEST_KIT_KEY.hex(),
        "public_key": owner.public_key.hex(),
        "vectors": {
            name: {"opening": json.loads(opening.to_json()), "expected": expand_key(opening)}
            for name, opening in openings.items()
        },
        "tails": tails(),
        "identity": {"passphrase": TEST_PASSPHRASE.decode(), "file": identity_file(owner)},
        "refused": refused(),
    }


def tiny() -> nn.Module:
    """Build three convolutions, plain, grouped and depthwise; the first has a bias, which is not read."""
    layers: list[nn.Module] = []
    for name, out, per_group, side, stride, groups in CONVS:
        layers.append(nn.Conv2d(per_group * groups, out, side, stride, groups=groups, bias=name == "0"))
        layers += [nn.BatchNorm2d(out, eps=2.0**-10), nn.ReLU()]
    return nn.Sequential(*layers)


def stretch(label: str, count: int) -> list[int]:
    """Return fixed integers from -128 to 127."""
    out = b"".join(hashlib.sha256(f"{label}/{i}".encode()).digest() for i in range(count // 32 + 1))
    return [byte - 128 for byte in out[:count]]


def network(label: str) -> dict[str, list[int]]:
    """Return integers of every kernel and batch norm, in units of 1/64.

    They include a zero block, and γ of both signs and 0.
    """
    values: dict[str, list[int]] = {}
    for name, out, per_group, side, _, _ in CONVS:
        area = side * side
        kernel = stretch(f"{label}/{name}/kernel", out * per_group * area)
        if name == "3":
            kernel[:area] = [0] * area  # a zero block: row 0, column 0 of group 0
        values[f"{name}.weight"] = kernel
        norm = str(int(name) + 1)
        values[f"{norm}.weight"] = stretch(f"{label}/{name}/gamma", out)
        values[f"{norm}.bias"] = stretch(f"{label}/{name}/beta", out)
    values["1.weight"][1], values["1.weight"][2] = 0, -64
    return values


def tensors_of(integers: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the state dict of `network`'s integers over 64."""
    shapes = {n: t.shape for n, t in tiny().state_dict().items()}
    return {n: (torch.tensor(v, dtype=torch.float32) / 64).reshape(shapes[n]) for n, v in integers.items()}


def canonical_vector() -> dict[str, Any]:
    """Return the content of `frame.json`: reference, canonical form and scores of a small network."""
    owner = identity.Identity(TEST_SEED, TEST_KIT_KEY)
    base_weights, suspect = network("w0"), network("suspect")
    model = tiny()
    model.load_state_dict(tensors_of(base_weights), strict=False)
    carrier = qr.make_carrier(128, 1, 21, 21)
    reference = make_reference(model, [TAP], torch.zeros(2, 1, 21, 21))
    opening = key.sign_spec(
        owner,
        spec.make_spec(
            name="test frame", nonce=sha256(b"frame"), n=128, carrier=carrier, taps=[TAP],
            head={"kind": "keyed"},
            statistic="count", architecture={"arch": "custom/golden:tiny"}, reference=reference.digest,
        ),
    )  # fmt: skip
    return {
        "warning": WARNING,
        "convolutions": [list(conv) for conv in CONVS],
        "eps": 2.0**-10,
        "w0": base_weights,
        "suspect": suspect,
        "opening": json.loads(opening.to_json()),
        "reference": base64.b64encode(reference.raw_bytes).decode("ascii"),
        "expected": evaluate_suspect(opening, reference, tensors_of(suspect)),
    }


class OwnOrderDetector(WatermarkDetector):
    """Detector that reads a suspect in its own order only, as the second readers do."""

    def align(self, selected: MappedTensors) -> Alignment:
        """Return the kernels as they are."""
        return Alignment(self.select_weights(selected.tensors), 1.0)

    def descent(self, selected: MappedTensors, alignment: Alignment) -> Descent:
        """Return that each kernel is that of its name."""
        return Descent(recognized=True, every_layer=True)


def evaluate_suspect(
    opening: key.KeyOpening, reference: Reference, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the canonical kernels, scores, k and control keys of a suspect, by the package."""
    detector = OwnOrderDetector(opening, reference, factories={"golden:tiny": tiny})
    model = detector.feature_readout.model
    canonical = model.canonicalize(model.select_weights(tensors))
    scores = detector.score_state_dict(tensors).scores
    assert scores is not None
    verdict = verify(tensors, detector)
    controls = [key.keystream(detector.key, f"mtlsign/v1/control/{i}".encode(), 32).hex() for i in range(2)]
    return {
        "framed": {name: kernel.flatten().tolist() for name, kernel in canonical.items()},
        "scores": scores.tolist(),
        "matches": verdict.matches,
        "near_zero": verdict.near_zero,
        "control_keys": controls,
    }


if __name__ == "__main__":
    VECTORS_FILE.parent.mkdir(exist_ok=True)
    VECTORS_FILE.write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    CANONICAL_FILE.write_text(json.dumps(canonical_vector(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {VECTORS_FILE} and {CANONICAL_FILE}")
