"""Conversion of weights to one safetensors file, on the owner's side. No code in a file is executed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.models.adapters import is_adapter, merge_adapter
from mtlsign.models.checkpoints import Checkpoint, read_checkpoint
from mtlsign.models.onnx_weights import read_onnx
from mtlsign.storage.safetensors_io import serialize_safetensors


@dataclass(frozen=True)
class Conversion:
    """Written file: number of tensors, bytes, SHA-256, and a sentence on the chosen weights if any."""

    tensors: int
    byte_count: int
    digest: str
    statement: str | None


def convert_weights(
    source: Path,
    output: Path,
    *,
    key: str | None = None,
    base: Path | None = None,
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> Conversion:
    """Write the weights of a file or folder as one safetensors file.

    Args:
        source: a format of `read_checkpoint`, an .onnx, .gguf or .npz file, or the folder of an adapter.
        output: the new file; it must not exist.
        key: entry with the weights; see `read_checkpoint`.
        base: checkpoint of the model that an adapter changes.
        rename: returns the tensors under other names; None keeps those of the source.

    Raises:
        ModelError: the source is missing, damaged or of another format, or a library is not installed.
        ArtifactError: the output exists, has another ending or cannot be written.
    """
    if output.suffix.lower() != ".safetensors":
        raise ArtifactError(f"{output} must end with .safetensors. Choose another name.", field="output")
    if output.exists():
        raise ArtifactError(f"{output} exists already. Choose another name.", field="output")
    checkpoint = read_weights(source, key=key, base=base)
    tensors = checkpoint.tensors if rename is None else rename(checkpoint.tensors)
    data = serialize_safetensors(tensors)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise ArtifactError(
            f"{output} cannot be written ({error.strerror}). Choose another folder.", field="output"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    return Conversion(len(tensors), len(data), digest, checkpoint.statement())


def read_weights(source: Path, *, key: str | None = None, base: Path | None = None) -> Checkpoint:
    """Read the weights of a file or folder; see `convert_weights`."""
    readers = {".onnx": _read_onnx, ".gguf": _read_gguf, ".npz": _read_npz}
    source = source.expanduser()
    if source.is_dir() and is_adapter(source):
        return Checkpoint(merge_adapter(source, base))
    if base is not None:
        raise ModelError(f"{source} is no folder of an adapter. Omit --base.", field="base")
    reader = readers.get(source.suffix.lower())
    if reader is None or source.is_dir():
        return read_checkpoint(source, key=key)
    if not source.is_file():
        raise ModelError(f"The file {source} does not exist. Give the path of a model.", field="source")
    try:
        tensors = reader(source)
    except ModelError:
        raise
    except Exception as error:  # the libraries raise almost anything on damaged bytes
        raise ModelError(
            f"{source} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]}). "
            "Export it again.",
            field="source",
        ) from None
    if not tensors:
        raise ModelError(f"{source} holds no weights. Give another file.", field="source")
    return Checkpoint(tensors)


def _read_onnx(path: Path) -> dict[str, Tensor]:
    try:
        return read_onnx(path)
    except ImportError:
        raise _missing_library("onnx", path) from None


def _read_gguf(path: Path) -> dict[str, Tensor]:
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise _missing_library("gguf", path) from None
    return {
        entry.name: torch.from_numpy(np.array(dequantize(entry.data, entry.tensor_type), dtype=np.float32))
        for entry in GGUFReader(str(path)).tensors
    }


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def _missing_library(name: str, path: Path) -> ModelError:
    return ModelError(
        f"{path.name!r} needs the library {name}. Install it with `pip install {name}`, or convert the file "
        "where it is installed.",
        field="source",
    )
