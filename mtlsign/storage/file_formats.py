"""Formats of model files by their names, and folders of safetensors files without a manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mtlsign.errors import ArtifactError
from mtlsign.storage.base import Storage
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.locations import path_of
from mtlsign.storage.safetensors_io import parse_safetensors

SAFETENSORS, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
#: Names of a whole model in a folder of the transformers, timm and diffusers libraries.
MODEL_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
#: Endings of checkpoints of PyTorch, whose pickled content only the owner's side reads.
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
#: Endings that `mtlsign convert` turns into safetensors, with the names of their formats.
CONVERTIBLE: Mapping[str, str] = {
    ".pth.tar": "a PyTorch checkpoint",
    ".pt": "a PyTorch checkpoint",
    ".pth": "a PyTorch checkpoint",
    ".bin": "a PyTorch checkpoint",
    ".ckpt": "a Lightning or PyTorch checkpoint",
    ".onnx": "an ONNX model",
    ".gguf": "a GGUF model",
    ".npz": "a NumPy archive",
}
#: Endings without a conversion, with the names of their formats.
_UNSUPPORTED: Mapping[str, str] = {
    ".pt2": "an exported PyTorch program",
    ".pkl": "a pickled object",
    ".pickle": "a pickled object",
    ".h5": "a Keras model",
    ".keras": "a Keras model",
    ".msgpack": "a Flax model",
    ".ggml": "a GGML model",
    ".tflite": "a TensorFlow Lite model",
    ".pb": "a TensorFlow model",
    ".mlmodel": "a Core ML model",
    ".zip": "an archive",
    ".gz": "an archive",
}
MAX_INDEX_BYTES = 64 * 1024 * 1024
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")


def is_safetensors(location: str) -> bool:
    """Return whether a location names one safetensors file; the case of the ending has no meaning."""
    return path_of(location).lower().endswith(SAFETENSORS)


def other_format(location: str) -> str | None:
    """Return the name of the format that the ending states, such as "a GGUF model"; None for any other."""
    path = path_of(location).lower()
    formats = (*CONVERTIBLE.items(), *_UNSUPPORTED.items())
    return next((name for suffix, name in formats if path.endswith(suffix)), None)


def conversion_hint(location: str) -> str | None:
    """Return what a file of another format is and what to do; None for any other name."""
    path = path_of(location)
    lower = path.lower()
    for suffix, name in CONVERTIBLE.items():
        if lower.endswith(suffix):
            return (
                f"{path} is {name}, not safetensors. "
                f"Convert it: mtlsign convert --source {path} --output {path[: -len(suffix)]}{SAFETENSORS}"
            )
    for suffix, name in _UNSUPPORTED.items():
        if lower.endswith(suffix):
            return f"{path} is {name}, not safetensors. Load it and save its state_dict as safetensors."
    return None


def find_model_file(storage: Storage) -> str | None:
    """Return the name of the model or of the index of its shards in a folder; None if there is neither."""
    names = [
        name for model in MODEL_FILES for name in (model, model.removesuffix(SAFETENSORS) + INDEX_SUFFIX)
    ]
    return next((name for name in names if storage.exists(name)), None)


def read_shards(storage: Storage, index_name: str, max_bytes: int) -> dict[str, Tensor]:
    """Read the safetensors files that an index lists.

    Args:
        storage: the folder.
        index_name: name of the index, JSON with `weight_map` from a tensor to its file in the same folder.
        max_bytes: most bytes of all files.

    Raises:
        ArtifactError: the index is damaged, or the files do not hold its tensors or are too large.
        ModelError: a file is invalid.
    """
    index = read_json_object(storage.read(index_name, MAX_INDEX_BYTES), index_name, limit=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) and _SHARD_NAME.fullmatch(shard) for shard in weight_map.values())
    ):
        raise ArtifactError(
            f"{index_name} lists no safetensors files of the same folder. Fetch the folder again.",
            field="model",
        )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        data = storage.read(shard, max_bytes)
        max_bytes -= len(data)
        content = parse_safetensors(data, max_bytes=len(data))
        tensors |= {name: tensor for name, tensor in content.items() if weight_map.get(name) == shard}
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ArtifactError(
            f"{len(missing)} tensors of {index_name} are missing in its files. Fetch the folder again.",
            field="model",
        )
    return tensors
