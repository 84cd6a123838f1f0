"""What embedding ends in: the marked model, the owner's kit, the verdict on it, the numbers of the run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mtlsign
from mtlsign.config.embed import EmbedSettings
from mtlsign.models.factories import Factory
from mtlsign.storage.base import Storage
from mtlsign.storage.model_folder import KITS, MODELS, model_digest, write_model
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import OwnerKit, write_kit
from mtlsign.watermark.verification.detector import Verdict, WatermarkDetector, signed_scores, verify
from mtlsign.watermark.verification.reference import Reference

Tensors = dict[str, Tensor]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Phase2Result:
    """What phase 2 gives: W, a trained head if it is free, its rows, accuracies of W0 and W."""

    tensors: Tensors = field(repr=False)
    head: bytes | None = field(repr=False)
    rows: Rows
    measured: dict[str, float]


@dataclass
class EmbeddingResult:
    """A marked model and its proof: `tensors` are public, `kit` is the owner's secret."""

    tensors: Tensors = field(repr=False)
    kit: OwnerKit = field(repr=False)
    verdict: Verdict
    result: dict[str, Any]
    history: dict[str, Rows] = field(repr=False)
    scores: dict[str, list[float]] = field(repr=False)

    def save(self, storage: Storage, secret: EncryptionSecret) -> None:
        """Write `models/<digest>/` and `kits/<id>/` below `storage`; `result` gets their places."""
        graph = self.kit.opening.parse().graph
        config = {
            "format": "mtlsign/model/v0",
            "graph": graph,
            "task": self.result["task"],
            "name": self.result["name"],
        }
        write_model(storage, self.tensors, config, _model_card(self.result, graph))
        kit_id = write_kit(storage, self.kit, secret)
        self.result["kit"] = storage.child(KITS).child(kit_id).uri
        self.result["model_path"] = storage.child(MODELS).child(self.result["model_digest"]).uri

    def report(self) -> str:
        """The run's page: one self-contained HTML file."""
        # Loaded here: matplotlib takes a second, and on a new machine says that it builds its font cache.
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        from mtlsign.reports.embedding import render_embedding_report

        return render_embedding_report(self.result, self.history, self.scores)


def build_result(
    base_weights: Tensors, rows: Rows, opening: KeyOpening, reference: Reference, marked: Phase2Result, settings: EmbedSettings,
    *, factories: Mapping[str, Factory],
) -> EmbeddingResult:  # fmt: skip
    """Verify what came out, against W0 and wrong keys too, and gather the numbers."""
    detector = WatermarkDetector(opening, reference, head=marked.head, factories=factories)
    tapped = {
        name: base_weights[name]
        for name in (*detector.graph.kernels, *detector.graph.gammas.values())
        if name in base_weights
    }
    digest = model_digest(serialize_safetensors(marked.tensors))
    verdict = verify(marked.tensors, detector, controls=5, base_weights=tapped, model_digest=digest)
    deltas = parameter_deviation(base_weights, marked.tensors)
    result: dict[str, Any] = {
        "task": settings.task, "model": settings.model, "name": settings.name, "width": settings.width, "head": settings.head, "seed": settings.seed,
        "lambda1": settings.lambda1, "lambda2": settings.lambda2, "snapshots": settings.snapshots, "steps": settings.steps,
        "n": detector.spec.n,
        **marked.measured,
        "wm_accuracy": verdict.accuracy,
        "wm_accuracy_on_clean": verdict.controls["w0"][0] if verdict.controls.get("w0") else None,
        "wm_accuracy_wrong_keys": verdict.controls.get("wrong_keys", []),
        "matches": verdict.matches, "status": verdict.status, "accepted": verdict.accepted,
        "p_value": verdict.p_value, "evidence_bits": verdict.evidence_bits,
        "deviation_l2": math.sqrt(sum(d * d for d in deltas.values())), "deviation_by_layer": deltas,
        "seconds_phase1": sum(r["seconds"] for r in rows),
        "seconds_phase2": sum(r["seconds"] for r in marked.rows),
        "model_digest": digest, "kit": None,
    }  # fmt: skip
    info = {
        "model_digest": digest, "task": settings.task, "name": settings.name, "seed": settings.seed, "lr": settings.lr,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"mtlsign": mtlsign.__version__, "torch": torch.__version__},
    }  # fmt: skip
    kit = OwnerKit(opening, reference.data, serialize_safetensors(tapped), marked.head, info)
    scores = dict(zip(("marked", "w0"), signed_scores(detector, [marked.tensors, tapped]), strict=False))
    scores |= dict(
        zip(("wrong_key",), signed_scores(detector.with_control_key(0), [marked.tensors]), strict=False)
    )
    return EmbeddingResult(
        marked.tensors, kit, verdict, result, {"phase1": rows, "phase2": marked.rows}, scores
    )


def parameter_deviation(base_weights: Mapping[str, Tensor], marked: Mapping[str, Tensor]) -> dict[str, float]:
    """‖W − W0‖₂ of every parameter; batch norms' running statistics are none."""
    return {
        name: float((tensor.double() - base_weights[name].double()).norm())
        for name, tensor in marked.items()
        if tensor.is_floating_point() and name.rpartition(".")[2] not in ("running_mean", "running_var")
    }


def _model_card(result: Mapping[str, Any], graph: Mapping[str, object]) -> str:
    return (
        f"# {result['name']}\n\nArchitecture `{json.dumps(dict(graph), sort_keys=True)}` "
        f"for the task `{result['task']}`; accuracy on the test part {result['primary_marked']:.4f}.\n\n"
        "Load `model.safetensors` with the safetensors library into that architecture.\n"
    )
