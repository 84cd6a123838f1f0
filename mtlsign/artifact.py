"""What is written: the public model and the owner's secret kit (design, "How data flows").

    models/<digest>/   model.safetensors  config.json  README.md  manifest.json   public
    kits/<id>/         kit.sealed  manifest.json                                   SECRET, encrypted at rest
    runs/<id>/         checkpoints, metrics, report                                SECRET, written by the jobs

Every folder follows the rule of `folder`: it exists if and only if its manifest does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mtlsign.errors import ArtifactError, KeyMaterialError
from mtlsign.folder import GIB, MANIFEST, read_folder, read_manifest, write_folder
from mtlsign.key import KeyOpening
from mtlsign.sealing import PLAINTEXT_LIMIT, Secret, seal, unseal
from mtlsign.storage import Storage, open_file, open_storage
from mtlsign.tensors import read_tensors, tensor_bytes

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "KITS",
    "KIT_FILE",
    "KIT_PURPOSE",
    "MODELS",
    "MODEL_FILE",
    "RUNS",
    "Kit",
    "LoadedModel",
    "model_bytes",
    "model_digest",
    "read_kit",
    "read_model",
    "read_tensors",
    "write_kit",
    "write_model",
]

MODELS, KITS, RUNS = "models", "kits", "runs"
MODEL_FILE, CONFIG_FILE, CARD_FILE, KIT_FILE = "model.safetensors", "config.json", "README.md", "kit.sealed"
JSON_LIMIT = 2**20
KIT_PURPOSE = "mtlsign/v0/kit"

_KIT_MAGIC = b"mtlsign/kit/v0\n"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LoadedModel:
    """A model from anywhere: its tensors by name, `config.json` ({} for a bare file), digest, place."""

    tensors: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any]
    digest: str
    location: str


@dataclass(frozen=True)
class Kit:
    """Everything the owner needs to verify or claim one mark. SECRET; never shown by `repr`.

    Attributes:
        opening: the key as (spec, public key, signature).
        reference: `reference`'s bytes, what is kept of W0's frame.
        w0: safetensors bytes of the tapped part of W0.
        head: safetensors bytes of a free head, None for the keyed head.
        info: JSON object with what the owner wants to find again: model_digest, task, created, versions, …
    """

    opening: KeyOpening = field(repr=False)
    reference: bytes = field(repr=False)
    w0: bytes = field(repr=False)
    head: bytes | None = field(repr=False)
    info: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        return "Kit(hidden)"


def model_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The one safetensors file of these tensors: sorted by name, no metadata, contiguous, on the CPU.

    Raises: ModelError for a dtype that safetensors lacks.
    """
    return tensor_bytes(tensors)


def model_digest(data: bytes) -> str:
    """SHA-256 of a `model.safetensors`, 64 hex."""
    return hashlib.sha256(data).hexdigest()


def write_model(storage: Storage, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str) -> str:
    """Write `models/<digest>/` below `storage` and return the digest.

    If that very model with the same config is already there, it stays as it is, its first card included.

    Raises: ArtifactError when it is there with another config; ModelError, StorageError.
    """
    data = model_bytes(tensors)
    digest = model_digest(data)
    files = {MODEL_FILE: data, CONFIG_FILE: _json_bytes(config, indent=2), CARD_FILE: card.encode()}
    folder = storage.child(f"{MODELS}/{digest}")
    if folder.exists(MANIFEST):
        entries = read_manifest(folder)
        same = (MODEL_FILE, CONFIG_FILE)
        if all(name in entries and entries[name].sha256 == model_digest(files[name]) for name in same):
            return digest
    write_folder(folder, files)
    return digest


def read_model(location: str, *, endpoint: str | None = None, max_bytes: int = 2 * GIB) -> LoadedModel:
    """Read a model from a stranger; nothing in it is ever executed.

    Args:
        location: a model folder (local or `s3://…`; every digest is checked), or one `.safetensors` file.
        endpoint: see `storage.open_storage`.
        max_bytes: most bytes of the tensors' file.

    Raises: ArtifactError for a missing, damaged or too large artifact, ModelError for a bad safetensors file,
        StorageError for a bad or unreachable location.
    """
    if _is_file(location, ".safetensors"):
        storage, name = open_file(location, endpoint=endpoint)
        data, config = storage.read(name, max_bytes), {}
    else:
        storage = open_storage(location, endpoint=endpoint)
        files = read_folder(
            storage, file_limit=max_bytes, total_limit=max_bytes + JSON_LIMIT, names=(MODEL_FILE, CONFIG_FILE)
        )
        data, config = files[MODEL_FILE], _json_object(files[CONFIG_FILE], CONFIG_FILE)
    digest = model_digest(data)
    own_name = _last_segment(storage.uri)
    if not _is_file(location, ".safetensors") and _DIGEST.fullmatch(own_name) and own_name != digest:
        raise ArtifactError(f"{location} holds another model than its name says; fetch the folder again")
    return LoadedModel(read_tensors(data, max_bytes=max_bytes), config, digest, location)


def write_kit(storage: Storage, kit: Kit, secret: Secret) -> str:
    """Seal the kit and write `kits/<id>/` below `storage`; returns the id.

    The id is the first 16 hex of SHA-256 over the sealed bytes. Their salt and nonce are random, so it says
    nothing about the key, and writing a kit again makes another folder.

    Raises: KeyMaterialError when it is over 2 GiB; ArtifactError when `info` is no JSON; StorageError.
    """
    parts = [kit.opening.to_json().encode(), _json_bytes(kit.info), kit.reference, kit.w0]
    parts += [] if kit.head is None else [kit.head]
    plaintext = _KIT_MAGIC + b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    sealed = seal(plaintext, secret, purpose=KIT_PURPOSE)
    kit_id = hashlib.sha256(sealed).hexdigest()[:16]
    write_folder(storage.child(f"{KITS}/{kit_id}"), {KIT_FILE: sealed})
    return kit_id


def read_kit(location: str, secret: Secret, *, endpoint: str | None = None) -> Kit:
    """Open a kit folder, or one `.sealed` file, from anywhere (at most 2 GiB).

    The opening's signature is checked when its `key()` is asked for, not here.

    Raises: KeyMaterialError for the wrong secret or a damaged kit; ArtifactError, StorageError otherwise.
    """
    limit = PLAINTEXT_LIMIT + 2048
    if _is_file(location, ".sealed"):
        storage, name = open_file(location, endpoint=endpoint)
        sealed = storage.read(name, limit)
    else:
        storage = open_storage(location, endpoint=endpoint)
        sealed = read_folder(storage, file_limit=limit, names=(KIT_FILE,))[KIT_FILE]
    return _parse_kit(unseal(sealed, secret, purpose=KIT_PURPOSE))


def _parse_kit(data: bytes) -> Kit:
    damaged = KeyMaterialError(
        "the kit's content is damaged or from another version; take another copy", field="kit"
    )
    if not data.startswith(_KIT_MAGIC):
        raise damaged
    parts: list[bytes] = []
    start = len(_KIT_MAGIC)
    while start < len(data) and len(parts) <= 5:
        size = int.from_bytes(data[start : start + 8], "big")
        part = data[start + 8 : start + 8 + size]
        if len(data) < start + 8 or len(part) != size:
            raise damaged
        parts.append(part)
        start += 8 + size
    if len(parts) not in (4, 5) or len(parts[0]) > JSON_LIMIT:
        raise damaged
    try:
        opening = KeyOpening.from_json(parts[0])
        info = _json_object(parts[1], "kit info")
    except ArtifactError:
        raise damaged from None
    return Kit(opening, parts[2], parts[3], parts[4] if len(parts) == 5 else None, info)


def _is_file(location: str, ending: str) -> bool:
    return (location.partition("?")[0] if location.startswith("s3:") else location).endswith(ending)


def _last_segment(uri: str) -> str:
    return (uri.partition("?")[0] if uri.startswith("s3:") else uri).rpartition("/")[2]


def _json_bytes(value: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    try:
        text = json.dumps(dict(value), sort_keys=True, indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"cannot be written as JSON ({error}); use plain finite values", field="config"
        ) from None
    data = text.encode() + b"\n"
    if len(data) > JSON_LIMIT:
        raise ArtifactError(f"is over {JSON_LIMIT} bytes as JSON; keep less in it", field="config")
    return data


def _json_object(data: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(data) if len(data) <= JSON_LIMIT else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{name} is no JSON object of at most {JSON_LIMIT} bytes; fetch the folder again")
    return found
