"""Public model folders, and the names of the top-level folders of a storage.

    models/<digest>/   model.safetensors  config.json  README.md  manifest.json   public
    kits/<id>/         kit.sealed  manifest.json                                   SECRET, encrypted at rest
    runs/<id>/         checkpoints, metrics, report                                SECRET, written by the jobs

Each is a manifest folder: committed if and only if its manifest exists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mtlsign.errors import ArtifactError
from mtlsign.storage.base import Storage
from mtlsign.storage.json_io import JSON_LIMIT, read_json_object, serialize_json_object
from mtlsign.storage.locations import has_suffix, open_file, open_storage, path_of
from mtlsign.storage.manifest import GIB, MANIFEST, read_manifest, read_manifest_folder, write_manifest_folder
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors

MODELS, KITS, RUNS = "models", "kits", "runs"
MODEL_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LoadedModel:
    """Model read from a storage: tensors by name, `config.json` ({} for a single file), digest, location."""

    tensors: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any]
    digest: str
    location: str


def model_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the safetensors file of `tensors`: sorted by name, no metadata, contiguous, on the CPU.

    Raises:
        ModelError: a tensor has a dtype that safetensors lacks.
    """
    return serialize_safetensors(tensors)


def model_digest(data: bytes) -> str:
    """Return the SHA-256 of a `model.safetensors` (64 hex)."""
    return hashlib.sha256(data).hexdigest()


def write_model(storage: Storage, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str) -> str:
    """Write `models/<digest>/` below `storage`.

    If the same model and config already exist, nothing is written and the existing README is kept.

    Args:
        storage: the storage, not the model folder.
        tensors: the weights by name.
        config: the content of `config.json`.
        card: the text of `README.md`.

    Returns:
        The digest of the model.

    Raises:
        ArtifactError: the model exists with another config.
        ModelError: a tensor has a dtype that safetensors lacks.
        StorageError: the storage cannot be written.
    """
    data = model_bytes(tensors)
    digest = model_digest(data)
    files = {MODEL_FILE: data, CONFIG_FILE: serialize_json_object(config, indent=2), CARD_FILE: card.encode()}
    folder = storage.child(f"{MODELS}/{digest}")
    if folder.exists(MANIFEST):
        entries = read_manifest(folder)
        identical = (MODEL_FILE, CONFIG_FILE)
        if all(name in entries and entries[name].sha256 == model_digest(files[name]) for name in identical):
            return digest
    write_manifest_folder(folder, files)
    return digest


def read_model(location: str, *, endpoint: str | None = None, max_bytes: int = 2 * GIB) -> LoadedModel:
    """Read an untrusted model; nothing in it is executed.

    Args:
        location: a model folder (local or `s3://…`; every digest is checked), or one `.safetensors` file.
        endpoint: S3 server, as in `open_storage`.
        max_bytes: most bytes of the tensor file.

    Raises:
        ArtifactError: the artifact is missing, damaged or too large.
        ModelError: the safetensors file is invalid.
        StorageError: the location is malformed or unreachable.
    """
    single_file = has_suffix(location, ".safetensors")
    if single_file:
        storage, name = open_file(location, endpoint=endpoint)
        data, config = storage.read(name, max_bytes), {}
    else:
        storage = open_storage(location, endpoint=endpoint)
        files = read_manifest_folder(
            storage, file_limit=max_bytes, total_limit=max_bytes + JSON_LIMIT, names=(MODEL_FILE, CONFIG_FILE)
        )
        data, config = files[MODEL_FILE], read_json_object(files[CONFIG_FILE], CONFIG_FILE)
    digest = model_digest(data)
    folder_name = path_of(storage.uri).rpartition("/")[2]
    if not single_file and _DIGEST.fullmatch(folder_name) and folder_name != digest:
        raise ArtifactError(f"{location} holds another model than its name states. Fetch the folder again.")
    return LoadedModel(parse_safetensors(data, max_bytes=max_bytes), config, digest, location)
