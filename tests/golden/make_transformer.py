"""Writer of the golden vectors of attention layers in format v1. Run it only to change the format.

The owner is the PUBLISHED TEST KEY of `make_vectors.py`: never mark a model with it.
"""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtlsign.attacks.attention_symmetries import attention_symmetries, rotate_stream
from mtlsign.attacks.base import AttackerResources
from mtlsign.attacks.recurrent_symmetries import permute_vocabulary
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.input_spec import TextSpec
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark import carriers
from mtlsign.watermark.keys import identity, spec
from mtlsign.watermark.keys import opening as key
from mtlsign.watermark.verification.alignment import TransformerAligner
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from tests.golden.make_recurrent import expected_results
from tests.golden.make_vectors import TEST_KIT_KEY, TEST_SEED, WARNING, sha256
from tests.unit.attacks.text_examples import text_task
from tests.unit.watermark.verification.spread_examples import mark

TRANSFORMER_FILE = Path(__file__).parent / "v1" / "transformer.json"
SPEC = TextSpec(vocabulary=80, embedding=10, length=10, classes=3)
TAPS = ["blocks.1"]
SIZES = {"heads": 2, "kv_heads": 2, "head_size": 6, "inner": 14, "layers": 2, "length": 10}
NETWORKS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "post": {"order": "post"},
    "decoder": {
        "norm": "rms", "positions": "rotary", "kv_heads": 1, "gated": 1, "activation": "silu", "bias": 0,
        "causal": 1, "pooling": "last",
    },
}  # fmt: skip


def architecture(name: str) -> dict[str, object]:
    """Return the architecture of one network."""
    return architecture_for("transformer", **SPEC.architecture_fields, width=12) | SIZES | NETWORKS[name]


def base_network(name: str) -> nn.Module:
    """Return W0, with gains as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(architecture(name)).eval()
        with torch.no_grad():
            for parameter, tensor in model.named_parameters():
                if "norm" in parameter:
                    tensor.add_(0.3 * torch.rand(tensor.shape))
    return model


def make_opening(name: str, reference_digest: str) -> key.KeyOpening:
    """Return the signed opening of one network."""
    return key.sign_spec(
        identity.Identity(TEST_SEED, TEST_KIT_KEY),
        spec.make_spec(
            name=f"test {name}", nonce=sha256(f"transformer {name}".encode()), n=128, taps=TAPS,
            head={"kind": "spread"}, carrier=carriers.make("words", 128, SPEC), statistic="count",
            reference=reference_digest, architecture=architecture(name),
        ),
    )  # fmt: skip


def structure(detector: WatermarkDetector) -> dict[str, Any]:
    """Return the parts of the residual stream, and the marked layers in the order of the network."""
    assert isinstance(detector.aligner, TransformerAligner)
    stream = detector.aligner.products.stream
    return {
        "attention": [
            {
                "module": layer.module, "heads": layer.heads, "kv_heads": layer.kv_heads,
                "query": layer.query.weight, "key": layer.key.weight, "value": layer.value.weight,
                "output": layer.output,
            }
            for layer in stream.attentions
        ],
        "sources": list(stream.sources),
        "readers": sorted(stream.readers),
        "writers": sorted(stream.writers),
        "gains": dict(stream.gains),
        "subtracts_mean": stream.subtracts_mean,
        "layers": list(detector.kernel_shapes),
    }  # fmt: skip


def suspects(model: nn.Module, detector: WatermarkDetector) -> dict[str, bytes]:
    """Return the suspects' files."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marked = copy.deepcopy(model)
    marked.load_state_dict(state | mark(state, detector, steps=14, size=0.06))
    arguments = (text_task(), AttackerResources())
    mixed = attention_symmetries(marked, *arguments, 2).model
    turned = rotate_stream(mixed, *arguments, 3).model
    renumbered = permute_vocabulary(turned, *arguments, 4).model
    networks = {
        "base": model, "marked": marked, "mixed": mixed, "turned": turned, "renumbered": renumbered,
    }  # fmt: skip
    return {
        name: serialize_safetensors({n: t.clone() for n, t in network.state_dict().items()})
        for name, network in networks.items()
    }


def build_network(name: str) -> dict[str, Any]:
    """Return the part of one network."""
    model, inputs = base_network(name), text_task().splits["train"].tokens  # type: ignore[attr-defined]
    reference = make_reference(model, TAPS, inputs[:2], bases=response_bases(model, TAPS, inputs))
    opening = make_opening(name, reference.digest)
    detector = WatermarkDetector(opening, reference)
    return {
        "structure": structure(detector),
        "opening": json.loads(opening.to_json()),
        "reference": base64.b64encode(reference.raw_bytes).decode("ascii"),
        "suspects": expected_results(detector, suspects(model, detector)),
    }


def build_golden() -> dict[str, Any]:
    """Return the content of `transformer.json`."""
    return {"warning": WARNING, "networks": {name: build_network(name) for name in NETWORKS}}


if __name__ == "__main__":
    text = json.dumps(build_golden(), indent=1, ensure_ascii=False) + "\n"
    TRANSFORMER_FILE.write_text(text, encoding="utf-8")
    print(f"wrote {TRANSFORMER_FILE}")
