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

from mtlsign.errors import ArtifactError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_file, open_storage
from mtlsign.storage.manifest import GIB, MANIFEST, read_manifest, read_manifest_folder, write_manifest_folder
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors

MODELS, KITS, RUNS = "models", "kits", "runs"
MODEL_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
JSON_LIMIT = 2**20

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LoadedModel:
    """A model from anywhere: its tensors by name, `config.json` ({} for a bare file), digest, place."""

    tensors: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any]
    digest: str
    location: str


def model_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The one safetensors file of these tensors: sorted by name, no metadata, contiguous, on the CPU.

    Raises: ModelError for a dtype that safetensors lacks.
    """
    return serialize_safetensors(tensors)


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
    files = {MODEL_FILE: data, CONFIG_FILE: json_bytes(config, indent=2), CARD_FILE: card.encode()}
    folder = storage.child(f"{MODELS}/{digest}")
    if folder.exists(MANIFEST):
        entries = read_manifest(folder)
        same = (MODEL_FILE, CONFIG_FILE)
        if all(name in entries and entries[name].sha256 == model_digest(files[name]) for name in same):
            return digest
    write_manifest_folder(folder, files)
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
    if is_single_file(location, ".safetensors"):
        storage, name = open_file(location, endpoint=endpoint)
        data, config = storage.read(name, max_bytes), {}
    else:
        storage = open_storage(location, endpoint=endpoint)
        files = read_manifest_folder(
            storage, file_limit=max_bytes, total_limit=max_bytes + JSON_LIMIT, names=(MODEL_FILE, CONFIG_FILE)
        )
        data, config = files[MODEL_FILE], json_object(files[CONFIG_FILE], CONFIG_FILE)
    digest = model_digest(data)
    own_name = _last_segment(storage.uri)
    if not is_single_file(location, ".safetensors") and _DIGEST.fullmatch(own_name) and own_name != digest:
        raise ArtifactError(f"{location} holds another model than its name says; fetch the folder again")
    return LoadedModel(parse_safetensors(data, max_bytes=max_bytes), config, digest, location)


def is_single_file(location: str, ending: str) -> bool:
    return (location.partition("?")[0] if location.startswith("s3:") else location).endswith(ending)


def _last_segment(uri: str) -> str:
    return (uri.partition("?")[0] if uri.startswith("s3:") else uri).rpartition("/")[2]


def json_bytes(value: Mapping[str, Any], *, indent: int | None = None) -> bytes:
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


def json_object(data: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(data) if len(data) <= JSON_LIMIT else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{name} is no JSON object of at most {JSON_LIMIT} bytes; fetch the folder again")
    return found
