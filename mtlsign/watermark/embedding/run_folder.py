"""The folder of one run: what an interrupted embedding needs to go on, and what a finished one leaves.

`runs/<name>/` is SECRET. While a run goes on it holds `settings.json`, `ray/` or `plain/` (checkpoints),
`clean.safetensors` (W0) and `commitment.sealed` (the opened key and the reference, encrypted for the owner).
At the end `result.json`, `metrics.json` and `report.html` remain, and the manifest that makes the folder
complete.
"""

from __future__ import annotations

import io
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtlsign.config.base import dump
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ArtifactError, KeyMaterialError, SettingsError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, write_manifest_folder
from mtlsign.storage.model_folder import RUNS
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding.worker import State
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret, decrypt_envelope, encrypt_envelope

SETTINGS, CLEAN, CLEAN_ROWS, COMMITMENT = (
    "settings.json",
    "clean.safetensors",
    "clean.json",
    "commitment.sealed",
)
_LIMIT = 4 * 1024**3
_PURPOSE = "mtlsign/v0/commitment"
#: What `--resume` may change: where and how the rest runs, not what is computed.
RESUMABLE_SETTINGS = frozenset(
    (
        *("owner", "passphrase_file", "endpoint", "storage", "data", "download"),
        *("workers", "cpus_per_worker", "gpus_per_worker", "cluster_wait", "max_failures"),
        *("resume", "keep_checkpoints", "json_output", "quiet"),
    )
)


class EmbeddingRun:
    """One run's folder, new or resumed.

    Raises (from `open` and `begin`): SettingsError when the name is taken, unknown, or `--resume` changes
    the science; StorageError when the place cannot be written.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.folder = storage.child(RUNS).child(name)

    @classmethod
    def open(cls, settings: EmbedSettings) -> tuple[EmbeddingRun, EmbedSettings]:
        """Find the run that the settings ask for, and whether its place can be written; the settings come
        back complete.

        Nothing is kept there before `begin`.
        """
        storage = open_storage(settings.storage, endpoint=settings.endpoint)
        if settings.resume is not None:
            run = cls(storage, settings.resume)
            return run, run._resumed(settings)
        storage.check_writable()  # leaves nothing behind
        name = settings.run or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        run = cls(storage, name)
        if run.folder.exists(SETTINGS):
            raise run._taken()
        return run, settings.resolved()

    def begin(self, settings: EmbedSettings) -> None:
        """Take the name by keeping the settings there, unless resumed. Raises `SettingsError` if taken."""
        if settings.resume is None and not self.folder.write(SETTINGS, dump(settings), if_absent=True):
            raise self._taken()

    def _taken(self) -> SettingsError:
        return SettingsError(
            f"{self.name!r} exists; choose another name, or go on with --resume {self.name}", field="run"
        )

    def _resumed(self, settings: EmbedSettings) -> EmbedSettings:
        if not self.folder.exists(SETTINGS):
            raise SettingsError(
                f"no run {self.name!r} in {self.storage.uri}; check --storage and the name", field="resume"
            )
        try:
            kept = EmbedSettings.of(json.loads(self.folder.read(SETTINGS, 1024**2)))
        except (ValueError, TypeError):
            raise ArtifactError(
                f"{SETTINGS} of run {self.name!r} is damaged; start a new run", field="resume"
            ) from None
        if self.folder.exists(MANIFEST):
            if not kept.keep_checkpoints:
                self._clear()  # what a crash between the manifest and the deletion left behind
            raise SettingsError(
                f"run {self.name!r} is finished; its result lies in {self.folder.uri}", field="resume"
            )
        given = settings.model_fields_set - RESUMABLE_SETTINGS
        for field in sorted(given):
            if getattr(settings, field) != getattr(kept, field):
                raise SettingsError(
                    f"is {getattr(kept, field)} in run {self.name!r}; leave it out, or start a new run",
                    field=field.replace("_", "-"),
                )
        return kept.model_copy(
            update={f: getattr(settings, f) for f in settings.model_fields_set & RESUMABLE_SETTINGS}
        )

    # -- what phase 1 leaves --------------------------------

    def clean(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """W0 and phase 1's rows, once phase 1 is done."""
        if not self.folder.exists(CLEAN):
            return None
        return parse_safetensors(self.folder.read(CLEAN, _LIMIT)), json.loads(
            self.folder.read(CLEAN_ROWS, 64 * 1024**2)
        )

    def keep_clean(self, base_weights: Mapping[str, Tensor], rows: list[dict[str, Any]]) -> None:
        """Keep W0; the tensors last, as the sign that both are there."""
        self.folder.write(CLEAN_ROWS, json.dumps(rows).encode())
        self.folder.write(CLEAN, serialize_safetensors(base_weights))

    # -- the key, between the phases --------------------------------

    def commitment(self, secret: EncryptionSecret) -> tuple[KeyOpening, bytes] | None:
        """The opening and the reference's bytes, once signed. Raises `KeyMaterialError` for another owner."""
        if not self.folder.exists(COMMITMENT):
            return None
        try:
            data = decrypt_envelope(self.folder.read(COMMITMENT, _LIMIT), secret, purpose=_PURPOSE)
        except KeyMaterialError:
            raise KeyMaterialError(
                "is not the one that began this run; give the same --owner", field="owner"
            ) from None
        size = int.from_bytes(data[:8], "big")
        return KeyOpening.from_json(data[8 : 8 + size]), data[8 + size :]

    def keep_commitment(self, opening: KeyOpening, reference: bytes, secret: EncryptionSecret) -> None:
        """Seal the opening and the reference for the owner."""
        text = opening.to_json().encode()
        data = len(text).to_bytes(8, "big") + text + reference
        self.folder.write(COMMITMENT, encrypt_envelope(data, secret, purpose=_PURPOSE))

    # -- checkpoints of a plain process (Ray Train keeps its own) --------------------------------

    def checkpoint(self, phase: str) -> State | None:
        """The last state of a phase that runs without Ray."""
        name = f"plain/{phase}.pt"
        if not self.folder.exists(name):
            return None
        return load_state(self.folder.read(name, 8 * _LIMIT))

    def keep_checkpoint(self, phase: str, state: State) -> None:
        """Replace the last state, atomically."""
        self.folder.write(f"plain/{phase}.pt", state_bytes(state))

    # -- the end --------------------------------

    def finish(
        self, result: Mapping[str, Any], metrics: Mapping[str, Any], report: str, *, keep: bool
    ) -> None:
        """Write what remains, then the manifest; the secret rest is deleted unless `keep`."""
        files = {
            "result.json": json.dumps(result, indent=1, allow_nan=False).encode(),
            "metrics.json": json.dumps(metrics, allow_nan=False).encode(),
            "report.html": report.encode(),
        }
        write_manifest_folder(self.folder, files)
        if not keep:
            self._clear()

    def _clear(self) -> None:
        """Delete what only an unfinished run needs."""
        for name in ("ray", "plain", CLEAN, CLEAN_ROWS, COMMITMENT):
            self.folder.delete(name)


def state_bytes(state: State) -> bytes:
    """A checkpoint state (tensors, numbers, text in dicts and lists) as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_state(data: bytes) -> State:
    """Read a state back; `weights_only` admits tensors and plain containers alone. Raises `ArtifactError`."""
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # torch raises several kinds for a damaged archive
        raise ArtifactError("a checkpoint of this run is damaged; start a new run", field="resume") from None
    if not isinstance(state, dict):
        raise ArtifactError("a checkpoint of this run is damaged; start a new run", field="resume")
    return state
