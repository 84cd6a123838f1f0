"""Result of embedding: marked model, owner kit, verdict and metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtlsign._version import __version__
from mtlsign.config.embed import EmbedSettings, public_model_name
from mtlsign.models import architectures
from mtlsign.models.factories import Factory
from mtlsign.storage.base import Storage
from mtlsign.storage.manifest import write_manifest_folder
from mtlsign.storage.model_folder import KITS, MODELS, model_digest, write_model
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding.advice import (
    chance_warning,
    key_size_warning,
    rejection,
    unmarked_warning,
)
from mtlsign.watermark.embedding.conclusion import fresh_detector, require_equal_readings, require_stored
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import OwnerKit, write_kit
from mtlsign.watermark.verification.algorithm import signed_scores, verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.verdict import Verdict

Tensors = dict[str, Tensor]
Rows = list[dict[str, Any]]
_CONTROL_KEYS = 5
#: Folder of marked adapters in a storage.
ADAPTERS = "adapters"


@dataclass(frozen=True)
class Phase2Result:
    """Result of phase 2.

    Attributes:
        tensors: state dict of the marked W.
        head: bytes of a free head, None for a keyed head.
        rows: rows of metrics.
        measured: accuracies of W0 and W.
        model_files: files of the task for the public model folder.
        data_digest: SHA-256 (hex) of the task's list of samples, if it has one.
        adapter_files: files of the marked adapter's folder; none if all weights were trained.
    """

    tensors: Tensors = field(repr=False)
    head: bytes | None = field(repr=False)
    rows: Rows
    measured: dict[str, float]
    model_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    data_digest: str | None = None
    adapter_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass
class EmbeddingResult:
    """Marked model and its proof.

    Attributes:
        tensors: state dict of the marked model; public.
        kit: the owner's secret.
        further_kits: kits of the other keys.
        verdict: verification of the marked model.
        result: content of `result.json`.
        history: rows of metrics of both phases.
        scores: signed scores of the marked model, W0 and an unrelated key.
        model_files: further files of the public model folder, such as a tokenizer.
        adapter_files: files of the marked adapter's folder, if only an adapter was trained.
    """

    tensors: Tensors = field(repr=False)
    kit: OwnerKit = field(repr=False)
    verdict: Verdict
    result: dict[str, Any]
    history: dict[str, Rows] = field(repr=False)
    scores: dict[str, list[float]] = field(repr=False)
    further_kits: tuple[OwnerKit, ...] = field(default=(), repr=False)
    model_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    adapter_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def save(self, storage: Storage, secret: EncryptionSecret) -> None:
        """Write `models/<digest>/`, `kits/<id>/` and, if an adapter was trained, `adapters/<digest>/`.

        Their locations below `storage` are added to `result`.

        Args:
            storage: where to write.
            secret: the owner's encryption secret.

        Raises:
            ArtifactError: the files that are read back differ from those that were verified.
            StorageError: the storage cannot be written.
        """
        architecture = self.kit.opening.parse().architecture
        config = {
            "format": "mtlsign/model/v1",
            "architecture": architecture,
            "task": self.result["task"],
            "name": self.result["name"],
        }
        card = _model_card(self.result, architecture)
        digest = write_model(storage, self.tensors, config, card, further_files=self.model_files)
        ids = {write_kit(storage, kit, secret): kit for kit in (self.kit, *self.further_kits)}
        require_stored(storage, digest, ids, secret)
        first, *further = (storage.child(KITS).child(kit_id).uri for kit_id in ids)
        self.result["kit"] = first
        if further:
            self.result["further_kits"] = further
        if self.adapter_files:
            folder = storage.child(ADAPTERS).child(digest)
            write_manifest_folder(folder, dict(self.adapter_files), replace_uncommitted=False)
            self.result["adapter_path"] = folder.uri
        self.result["model_path"] = storage.child(MODELS).child(digest).uri

    def report(self) -> str:
        """Render the report of the run as one self-contained HTML file."""
        # Imported here, because importing Matplotlib takes a second.
        from mtlsign.reports.embedding import render_embedding_report

        return render_embedding_report(self.result, self.history, self.scores)


def build_result(
    base_weights: Tensors,
    rows: Rows,
    openings: Sequence[KeyOpening],
    reference: Reference,
    phase2: Phase2Result,
    settings: EmbedSettings,
    *,
    factories: Mapping[str, Factory],
    warning: str | None = None,
) -> EmbeddingResult:
    """Verify the bytes of the marked model as a verifier does, with controls, and collect the metrics.

    Args:
        base_weights: state dict of W0.
        rows: rows of metrics of phase 1.
        openings: the opened keys.
        reference: W0's reference.
        phase2: result of phase 2.
        settings: complete settings.
        factories: trusted factories of custom architectures.
        warning: about W0, for the report.

    Raises:
        ModelError: a verifier reads other bits than the trained network has.
    """
    detector = fresh_detector(openings[0], reference.raw_bytes, phase2.head, factories)
    kept_weights = _kept_base_weights(base_weights, detector)
    model_file = serialize_safetensors(phase2.tensors)
    digest, written = model_digest(model_file), parse_safetensors(model_file)
    verdict = verify(
        written, detector, model_digest=digest, controls=_CONTROL_KEYS, base_weights=kept_weights
    )
    own_detector = WatermarkDetector(openings[0], reference, head=phase2.head, factories=factories)
    require_equal_readings(verdict, phase2.tensors, own_detector)
    further = [verify(written, detector.with_raw_key(opening.key())) for opening in openings[1:]]
    network = architectures.build(detector.spec.architecture, factories=factories)
    ordered = in_network_order(phase2.tensors, network.state_dict())
    result = {
        **_settings_fields(settings),
        "n": detector.spec.total_bits,
        **phase2.measured,
        **_verdict_fields(verdict),
        **_deviation_fields(parameter_deviation(base_weights, ordered)),
        **_durations(rows, phase2.rows),
        **{"model_digest": digest, "data_digest": phase2.data_digest, "kit": None},
        "warnings": _warnings(phase2, verdict, warning),
        "problem": rejection([verdict, *further], settings, _trained_share(phase2)),
        **_origin_fields(verdict, openings[0]),
        **({"further_keys": [_verdict_fields(verdict) for verdict in further]} if further else {}),
    }
    infos = [_kit_info(settings, phase2, digest, own) for own in (verdict, *further)]
    secrets = reference.raw_bytes, serialize_safetensors(kept_weights), phase2.head
    kits = [OwnerKit(key, *secrets, info) for key, info in zip(openings, infos, strict=True)]
    return EmbeddingResult(
        tensors=phase2.tensors, kit=kits[0], verdict=verdict, result=result,
        history={"phase1": rows, "phase2": phase2.rows},
        scores=_scores(detector, phase2.tensors, kept_weights), further_kits=tuple(kits[1:]),
        model_files=phase2.model_files, adapter_files=phase2.adapter_files,
    )  # fmt: skip


def _durations(phase1: Rows, phase2: Rows) -> dict[str, float]:
    return {
        "seconds_phase1": sum(row["seconds"] for row in phase1),
        "seconds_phase2": sum(row["seconds"] for row in phase2),
    }


def _deviation_fields(deviations: Mapping[str, float]) -> dict[str, Any]:
    norm = math.sqrt(sum(deviation * deviation for deviation in deviations.values()))
    return {"deviation_l2": norm, "deviation_by_layer": dict(deviations)}


def _origin_fields(verdict: Verdict, opening: KeyOpening) -> dict[str, Any]:
    return {
        "bits_required": verdict.bits_required,
        "public_key": opening.public_key.hex(),
        "mtlsign": __version__,
        "created": _now(),
    }


def _trained_share(phase2: Phase2Result) -> float | None:
    """Return the share of matching bits in the last steps of training."""
    return phase2.rows[-1].get("wm_accuracy") if phase2.rows else None


def _warnings(phase2: Phase2Result, verdict: Verdict, warning: str | None) -> list[str]:
    classes, samples = phase2.measured.get("classes"), int(phase2.measured["primary_samples"])
    warnings = (
        key_size_warning(verdict.n),
        chance_warning(phase2.measured["primary_clean"], None if classes is None else int(classes), samples),
        unmarked_warning(_share_in_base(verdict), verdict.n),
        warning,
    )
    return [warning for warning in warnings if warning]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _kept_base_weights(base_weights: Tensors, detector: WatermarkDetector) -> Tensors:
    """Return the part of W0 that the kit stores.

    With a spread head this is all of it, so that `--base-kit` can mark further copies; otherwise it is the
    tapped part, with which the kit's holder tests W0.
    """
    if any(readout.spec.head.kind == "spread" for readout in detector.readouts):
        return dict(base_weights)
    names = (*detector.weight_shapes, *detector.optional_shapes)
    return {name: base_weights[name] for name in names if name in base_weights}


def _settings_fields(settings: EmbedSettings) -> dict[str, Any]:
    return {
        "task": settings.task,
        "model": public_model_name(settings.model or ""),
        "name": settings.name,
        "width": settings.width,
        "head": settings.head,
        **({} if settings.recipient is None else {"recipient": settings.recipient}),
        "seed": settings.seed,
        "lambda1": settings.lambda1,
        "lambda2": settings.lambda2,
        "snapshots": ",".join(settings.perturbation.kinds or ()),
        "steps": settings.phase2.steps,
    }


def _share_in_base(verdict: Verdict) -> float | None:
    """Return the share of the key's bits that W0 shows."""
    return verdict.controls["w0"][0] if verdict.controls.get("w0") else None


def _verdict_fields(verdict: Verdict) -> dict[str, Any]:
    return {
        "wm_accuracy": verdict.accuracy,
        "wm_accuracy_on_clean": _share_in_base(verdict),
        "wm_accuracy_wrong_keys": verdict.controls.get("wrong_keys", []),
        "matches": verdict.matches,
        "status": verdict.status,
        "accepted": verdict.accepted,
        "p_value": verdict.p_value,
        "evidence_bits": verdict.evidence_bits,
    }


def _kit_info(
    settings: EmbedSettings, phase2: Phase2Result, model_digest: str, verdict: Verdict
) -> dict[str, Any]:
    return {
        "model_digest": model_digest,
        "task": settings.task,
        "name": settings.name,
        **({} if phase2.data_digest is None else {"data_digest": phase2.data_digest}),
        "seed": settings.seed,
        "lr": settings.phase1.lr,
        "optimizer": settings.phase1.optimizer,
        **({} if settings.recipient is None else {"recipient": settings.recipient}),
        "created": _now(),
        "status": verdict.status,
        "evidence_bits": verdict.evidence_bits,
        "versions": {"mtlsign": __version__, "torch": torch.__version__},
    }


def _scores(detector: WatermarkDetector, marked: Tensors, tapped: Tensors) -> dict[str, list[float]]:
    """Return the signed scores of the networks that can be read."""
    control = detector.with_control_key(0)
    scores = dict(zip(("marked", "w0"), signed_scores(detector, [marked, tapped]), strict=False))
    return scores | dict(zip(("wrong_key",), signed_scores(control, [marked]), strict=False))


def in_network_order(tensors: Tensors, state: Mapping[str, Tensor]) -> Tensors:
    """Return `tensors` in the order of a network's state dict; files sort them by name."""
    return {name: tensors[name] for name in (*state, *tensors) if name in tensors}


def parameter_deviation(base_weights: Mapping[str, Tensor], marked: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ‖W − W0‖₂ of every parameter; running statistics of batch norms are not parameters."""
    return {
        name: float((tensor.double() - base_weights[name].double()).norm())
        for name, tensor in marked.items()
        if tensor.is_floating_point() and name.rpartition(".")[2] not in ("running_mean", "running_var")
    }


def _model_card(result: Mapping[str, Any], architecture: Mapping[str, object]) -> str:
    return (
        f"# {result['name']}\n\nArchitecture `{json.dumps(dict(architecture), sort_keys=True)}` "
        f"for the task `{result['task']}`; accuracy on the test part {result['primary_marked']:.4f}.\n\n"
        "Load `model.safetensors` with the safetensors library into that architecture.\n"
    )
