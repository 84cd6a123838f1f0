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
from mtlsign.errors import ArtifactError, KeyMaterialError
from mtlsign.storage.run_folder import RunFolder
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding.worker import State
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret, decrypt_envelope, encrypt_envelope

CLEAN_MODEL, CLEAN_ROWS, COMMITMENT = "phase1.safetensors", "phase1.json", "commitment.sealed"
RAY, CHECKPOINTS = "ray", "checkpoints"
_LIMIT = 4 * 1024**3
_CHECKPOINT_LIMIT = 8 * _LIMIT
_ROWS_LIMIT = 64 * 1024**2
_PURPOSE = "mtlsign/v0/commitment"


class EmbeddingRun(RunFolder[EmbedSettings]):
    """Run folder of one embedding."""

    settings_class = EmbedSettings
    kind = "an embedding"

    @classmethod
    def complete(cls, settings: EmbedSettings) -> EmbedSettings:
        """Fill in the settings that depend on the task or head."""
        return settings.with_defaults()

    def load_clean_model(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """Return W0 and the metrics rows of phase 1, or None before phase 1 is finished."""
        if not self.folder.exists(CLEAN_MODEL):
            return None
        rows = json.loads(self.folder.read(CLEAN_ROWS, _ROWS_LIMIT))
        return parse_safetensors(self.folder.read(CLEAN_MODEL, _LIMIT)), rows

    def save_clean_model(self, base_weights: Mapping[str, Tensor], rows: list[dict[str, Any]]) -> None:
        """Store W0 and the metrics rows of phase 1. The tensors come last: their file marks both complete."""
        self.folder.write(CLEAN_ROWS, json.dumps(rows).encode())
        self.folder.write(CLEAN_MODEL, serialize_safetensors(base_weights))

    def load_commitment(self, secret: EncryptionSecret) -> tuple[list[KeyOpening], bytes] | None:
        """Return the key openings and the bytes of the reference, or None before the owner has signed.

        Raises:
            KeyMaterialError: `secret` is that of another owner.
        """
        if not self.folder.exists(COMMITMENT):
            return None
        try:
            data = decrypt_envelope(self.folder.read(COMMITMENT, _LIMIT), secret, purpose=_PURPOSE)
        except KeyMaterialError:
            raise KeyMaterialError(
                "This run was started by a different identity. Pass the same --owner.", field="owner"
            ) from None
        size = int.from_bytes(data[:8], "big")
        lines = data[8 : 8 + size].split(b"\n")
        return [KeyOpening.from_json(line) for line in lines], data[8 + size :]

    def save_commitment(
        self, openings: Sequence[KeyOpening], reference: bytes, secret: EncryptionSecret
    ) -> None:
        """Store the key openings and the reference, encrypted for the owner.

        Args:
            openings: the opened keys.
            reference: the bytes of the reference.
            secret: the owner's encryption secret.
        """
        text = "\n".join(opening.to_json() for opening in openings).encode()
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
            "result.json": json.dumps(result, indent=1, allow_nan=False).encode(),
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
        raise ArtifactError("A checkpoint of this run is damaged. Start a new run.", field="resume")
    return state
