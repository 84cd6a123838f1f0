"""Run folder of an embedding: the state from which an interrupted one is resumed, and its results.

Until the end `runs/<name>/` holds `settings.json`, `ray/` or `checkpoints/`, `phase1.safetensors` (W0), and
`commitment.sealed` (the key openings and the reference, encrypted for the owner). Then `result.json`,
`metrics.json` and `report.html` are written, and the state is deleted.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ArtifactError, KeyMaterialError, OldVersionError
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.manifest import MANIFEST
from mtlsign.storage.model_folder import model_digest
from mtlsign.storage.run_folder import RunFolder
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding.worker import State
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret, decrypt_envelope, encrypt_envelope

CLEAN_MODEL, CLEAN_ROWS, COMMITMENT = "phase1.safetensors", "phase1.json", "commitment.sealed"
RESULT = "result.json"
RAY, CHECKPOINTS = "ray", "checkpoints"
_LIMIT = 4 * 1024**3
_CHECKPOINT_LIMIT = 8 * _LIMIT
_ROWS_LIMIT = 64 * 1024**2
_PURPOSE = "mtlsign/v1/commitment"


class EmbeddingRun(RunFolder[EmbedSettings]):
    """Run folder of one embedding."""

    settings_class = EmbedSettings
    kind = "an embedding"

    @classmethod
    def complete(cls, settings: EmbedSettings) -> EmbedSettings:
        """Fill in the settings that depend on the task or head."""
        return settings.with_defaults()

    def check_resumable(self) -> None:
        """Raise `ArtifactError` if the key of a checkpoint or of a finished run is lost."""
        if self.folder.exists(COMMITMENT):
            return
        marked = [f"{CHECKPOINTS}/mark.pt"] if self.folder.exists(f"{CHECKPOINTS}/mark.pt") else []
        marked += self.folder.list(f"{RAY}/mark")[:1]
        if marked:
            raise self._damage_error(f"{COMMITMENT} is missing, which holds the key of {marked[0]}")
        if self.folder.exists(RESULT):
            raise self._damage_error(f"{RESULT} exists, but {MANIFEST} and {COMMITMENT} are missing")

    def _damage_error(self, problem: str) -> ArtifactError:
        return ArtifactError(
            f"Run {self.name!r} is damaged: {problem}. Restore its files, or start a new run.", field="resume"
        )

    def load_clean_model(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """Return W0 and the metrics rows of phase 1, or None before phase 1 is finished.

        Raises:
            ArtifactError: one of the two files is missing, damaged or not of the same phase 1.
        """
        if not self.folder.exists(CLEAN_MODEL):
            return None
        data, summary = self.folder.read(CLEAN_MODEL, _LIMIT), self._phase1_summary()
        if summary is None or model_digest(data) != summary["sha256"]:
            raise self._damage_error(f"{CLEAN_MODEL} or {CLEAN_ROWS} is missing, damaged or from another run")
        return parse_safetensors(data), summary["rows"]

    def save_clean_model(self, base_weights: Mapping[str, Tensor], rows: list[dict[str, Any]]) -> None:
        """Store W0 and the metrics rows of phase 1. The tensors come last: their file marks both complete."""
        data = serialize_safetensors(base_weights)
        self.folder.write(CLEAN_ROWS, json.dumps({"rows": rows, "sha256": model_digest(data)}).encode())
        self.folder.write(CLEAN_MODEL, data)

    def _phase1_summary(self) -> dict[str, Any] | None:
        """Return the rows of phase 1 and the digest of W0; None if their file is missing or damaged."""
        try:
            summary = read_json_object(
                self.folder.read(CLEAN_ROWS, _ROWS_LIMIT), CLEAN_ROWS, limit=_ROWS_LIMIT
            )
        except ArtifactError:
            return None
        return summary if isinstance(summary.get("rows"), list) and "sha256" in summary else None

    def load_commitment(self, secret: EncryptionSecret) -> tuple[list[KeyOpening], bytes] | None:
        """Return the key openings and the bytes of the reference, or None before the owner has signed.

        Raises:
            KeyMaterialError: `secret` is that of another owner, or the file is damaged.
            ArtifactError: the keys are committed to another W0.
        """
        if not self.folder.exists(COMMITMENT):
            return None
        try:
            data = decrypt_envelope(self.folder.read(COMMITMENT, _LIMIT), secret, purpose=_PURPOSE)
        except OldVersionError:
            raise
        except KeyMaterialError:
            raise KeyMaterialError(
                f"This run was started by a different identity, or its {COMMITMENT} is damaged. "
                "Pass the same --owner, or restore the file.",
                field="owner",
            ) from None
        size = int.from_bytes(data[:8], "big")
        *lines, digest = data[8 : 8 + size].split(b"\n")
        if digest.decode() != self._base_digest():
            raise self._damage_error(f"{COMMITMENT} belongs to another W0 than {CLEAN_MODEL}")
        return [KeyOpening.from_json(line) for line in lines], data[8 + size :]

    def _base_digest(self) -> str:
        """Return the digest of W0 that the commitment names."""
        summary = self._phase1_summary()
        return "" if summary is None else str(summary["sha256"])

    def save_commitment(
        self, openings: Sequence[KeyOpening], reference: bytes, secret: EncryptionSecret
    ) -> None:
        """Store the key openings, the digest of W0 and the reference, encrypted for the owner.

        Args:
            openings: the opened keys.
            reference: the bytes of the reference.
            secret: the owner's encryption secret.
        """
        text = "\n".join([*(opening.to_json() for opening in openings), self._base_digest()]).encode()
        data = len(text).to_bytes(8, "big") + text + reference
        self.folder.write(COMMITMENT, encrypt_envelope(data, secret, purpose=_PURPOSE))

    def load_checkpoint(self, phase: str) -> State | None:
        """Return the last checkpoint of a phase that runs without Ray (Ray Train stores its own)."""
        name = f"{CHECKPOINTS}/{phase}.pt"
        if not self.folder.exists(name):
            return None
        return load_state(self.folder.read(name, _CHECKPOINT_LIMIT))

    def save_checkpoint(self, phase: str, state: State) -> None:
        """Replace the last checkpoint of a phase that runs without Ray, atomically."""
        self.folder.write(f"{CHECKPOINTS}/{phase}.pt", state_bytes(state))

    def finish(
        self, result: Mapping[str, Any], metrics: Mapping[str, Any], report: str, settings: EmbedSettings
    ) -> None:
        """Write the results and the manifest, then delete the leftovers unless the settings keep them.

        Args:
            result: content of `result.json`.
            metrics: content of `metrics.json`.
            report: content of `report.html`.
            settings: the settings of the run.
        """
        files = {
            RESULT: json.dumps(result, indent=1, allow_nan=False).encode(),
            "metrics.json": json.dumps(metrics, allow_nan=False).encode(),
            "report.html": report.encode(),
        }
        self.commit(files, settings)

    def keeps_leftovers(self, settings: EmbedSettings) -> bool:
        """Return the setting `keep_checkpoints`."""
        return settings.keep_checkpoints

    def delete_leftovers(self) -> None:
        """Delete checkpoints, W0 and the commitment."""
        for name in (RAY, CHECKPOINTS, CLEAN_MODEL, CLEAN_ROWS, COMMITMENT):
            self.folder.delete(name)


def state_bytes(state: State) -> bytes:
    """Serialize a checkpoint: tensors, numbers and text in dicts and lists."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_state(data: bytes) -> State:
    """Read a checkpoint. `weights_only` admits only tensors and plain containers.

    Raises:
        ArtifactError: the checkpoint is damaged or holds anything else.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # torch raises several kinds for a damaged archive
        state = None
    if not isinstance(state, dict):
        raise ArtifactError(
            "A checkpoint of this run is damaged. Restore it, or start a new run.", field="resume"
        )
    return state
