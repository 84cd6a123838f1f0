"""Public model folders, and the names of the top-level folders of a storage.

    models/<digest>/   model.safetensors  config.json  README.md  manifest.json   public
                       and files of the task, such as tokenizer.json
    kits/<id>/         kit.sealed  owner.json  manifest.json                       SECRET, encrypted at rest
    runs/<id>/         checkpoints, metrics, report                                SECRET, written by the jobs

Each is a manifest folder: committed if and only if its manifest exists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mtlsign.errors import ArtifactError
from mtlsign.storage.base import Storage
from mtlsign.storage.file_formats import (
    INDEX_SUFFIX,
    conversion_hint,
    find_model_file,
    is_safetensors,
    read_shards,
)
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


def write_model(
    storage: Storage,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    card: str,
    *,
    further_files: Mapping[str, bytes] | None = None,
) -> str:
    """Write `models/<digest>/` below `storage`.

    If the same model and config already exist, nothing is written and the existing README is kept.

    Args:
        storage: the storage, not the model folder.
        tensors: the weights by name.
        config: the content of `config.json`.
        card: the text of `README.md`.
        further_files: content by name of files that users of the model need, such as a tokenizer.

    Returns:
        The digest of the model.

    Raises:
        ArtifactError: the model exists with another config.
        ModelError: a tensor has a dtype that safetensors lacks.
        StorageError: the storage cannot be written.
    """
    data = model_bytes(tensors)
    digest = model_digest(data)
    files = dict(further_files or {})
    files |= {
        MODEL_FILE: data,
        CONFIG_FILE: serialize_json_object(config, indent=2),
        CARD_FILE: card.encode(),
    }
    folder = storage.child(f"{MODELS}/{digest}")
    if folder.exists(MANIFEST):
        entries = read_manifest(folder)
        identical = (MODEL_FILE, CONFIG_FILE)
        if all(name in entries and entries[name].sha256 == model_digest(files[name]) for name in identical):
            return digest
    write_manifest_folder(folder, files, replace_uncommitted=False)
    return digest


def read_model(location: str, *, endpoint: str | None = None, max_bytes: int = 2 * GIB) -> LoadedModel:
    """Read an untrusted model; nothing in it is executed.

    Args:
        location: local or `s3://…`: a model folder (every digest is checked), one `.safetensors` file, or a
            folder or index of a Hugging Face model in safetensors files. The digest of several files is that
            of the one file that `mtlsign convert` makes of them.
        endpoint: S3 server, as in `open_storage`.
        max_bytes: most bytes of the tensor files.

    Raises:
        ArtifactError: the artifact is missing, damaged, too large or of another format.
        ModelError: the safetensors file is invalid.
        StorageError: the location is malformed or unreachable.
    """
    data, folder = _read_file(location, endpoint, max_bytes, (MODEL_FILE, CONFIG_FILE))
    config = read_json_object(folder[CONFIG_FILE], CONFIG_FILE) if folder else {}
    return LoadedModel(parse_safetensors(data, max_bytes=max_bytes), config, model_digest(data), location)


def read_model_bytes(location: str, *, endpoint: str | None = None, max_bytes: int = 2 * GIB) -> bytes:
    """Read the safetensors file of an untrusted model; the arguments and locations are those of `read_model`.

    Raises:
        ArtifactError: the artifact is missing, damaged, too large or of another format.
        ModelError: a file of several is invalid. One file is not parsed.
        StorageError: the location is malformed or unreachable.
    """
    return _read_file(location, endpoint, max_bytes, (MODEL_FILE,))[0]


def _read_file(
    location: str, endpoint: str | None, max_bytes: int, names: tuple[str, ...]
) -> tuple[bytes, dict[str, bytes]]:
    """Return the one file of a model, and the files `names` of its model folder or {}."""
    if is_safetensors(location):
        storage, name = open_file(location, endpoint=endpoint)
        return storage.read(name, max_bytes), {}
    if has_suffix(location, INDEX_SUFFIX):
        storage, name = open_file(location, endpoint=endpoint)
        return model_bytes(read_shards(storage, name, max_bytes)), {}
    hint = conversion_hint(location)
    if hint is not None:
        storage, name = open_file(location, endpoint=endpoint)
        if storage.exists(name):  # otherwise a folder, or nothing
            raise ArtifactError(hint, field="model")
    storage = open_storage(location, endpoint=endpoint)
    folder_name = path_of(storage.uri).rpartition("/")[2]
    is_digest = _DIGEST.fullmatch(folder_name) is not None
    if not is_digest and not storage.exists(MANIFEST):
        return _read_other_folder(storage, location, max_bytes), {}
    files = read_manifest_folder(
        storage, file_limit=max_bytes, total_limit=max_bytes + JSON_LIMIT, names=names
    )
    if is_digest and folder_name != model_digest(files[MODEL_FILE]):
        raise ArtifactError(f"{location} holds another model than its name states. Fetch the folder again.")
    return files[MODEL_FILE], files


def _read_other_folder(storage: Storage, location: str, max_bytes: int) -> bytes:
    """Read a folder without a manifest that holds safetensors files; otherwise state what it is."""
    name = find_model_file(storage)
    if name is not None and name.endswith(INDEX_SUFFIX):
        return model_bytes(read_shards(storage, name, max_bytes))
    if name is not None:
        return storage.read(name, max_bytes)
    if storage.exists("pytorch_model.bin") or storage.exists("pytorch_model.bin.index.json"):
        raise ArtifactError(
            f"{location} holds PyTorch checkpoints, not safetensors. "
            f"Convert it: mtlsign convert --source {location} --output {MODEL_FILE}",
            field="model",
        )
    if "://" not in location and not Path(location).expanduser().exists():
        raise ArtifactError(f"{location} does not exist. Pass a model folder or a file.", field="model")
    if "://" not in location and Path(location).expanduser().is_file():
        raise ArtifactError(
            f"{location} is a file of an unknown format. Save its state_dict as safetensors.", field="model"
        )
    raise ArtifactError(
        f"{location} holds neither {MANIFEST} nor {MODEL_FILE}. "
        "Pass a model folder, a folder of a Hugging Face model, or a .safetensors file.",
        field="model",
    )
