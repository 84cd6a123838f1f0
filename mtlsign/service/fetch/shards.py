"""Hugging Face folders whose weights are split into several safetensors files, joined into one.

Nothing in the files is trusted. Their headers alone are parsed, within limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import IO, Any

from mtlsign.config.service import MIB
from mtlsign.errors import ArtifactError, ModelError
from mtlsign.service.fetch.content_store import PendingFile
from mtlsign.service.problems import Problem
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.safetensors_io import HeaderLimits, TensorEntry, parse_safetensors_header

INDEX = "model.safetensors.index.json"
#: Largest index, the most files that it may list, and the largest header of one of them.
MAX_INDEX, MAX_SHARDS, MAX_HEADER = 8 * MIB, 200, 8 * MIB
_PIECE = MIB
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")


def shard_names(data: bytes) -> list[str]:
    """Return the names of the files that an index lists, in their order by name.

    Raises:
        Problem: `not-a-model`: the index is damaged, or lists other files or too many.
    """
    try:
        weight_map = read_json_object(data, INDEX, limit=MAX_INDEX).get("weight_map")
    except ArtifactError as error:
        raise _not_a_model(f"{INDEX} cannot be read ({error.detail[:120]}).") from None
    values = list(weight_map.values()) if isinstance(weight_map, dict) else []
    files = {name for name in values if isinstance(name, str)}
    if not values or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in values):
        raise _not_a_model(f"{INDEX} lists no safetensors files of the same folder.")
    if len(files) > MAX_SHARDS:
        raise _not_a_model(f"{INDEX} lists {len(files)} files; {MAX_SHARDS} are allowed.")
    return sorted(files)


def join_shards(shards: Sequence[tuple[int, IO[bytes]]], target: PendingFile, *, max_tensors: int) -> None:
    """Write one safetensors file with the tensors of all files, in the order of the files.

    Args:
        shards: size in bytes of each file, and the file.
        target: the new file.
        max_tensors: most tensors of all files.

    Raises:
        Problem: `not-a-model`: a header is invalid, or a tensor is in two files.
    """
    header: dict[str, Any] = {}
    offset = 0
    for size, file in shards:
        entries = _entries(file, size, max_tensors - len(header))
        for name, entry in entries.items():
            if name in header:
                raise _not_a_model(f"The tensor {name[:80]!r} is in two files.")
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [entry.start + offset, entry.stop + offset],
            }
        offset += sum(entry.byte_count for entry in entries.values())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write(len(text).to_bytes(8, "little") + text)
    for _, file in shards:  # each file stands at the first byte of its data
        while piece := file.read(_PIECE):
            target.write(piece)


def _entries(file: IO[bytes], size: int, max_tensors: int) -> dict[str, TensorEntry]:
    """Return the checked entries of a file's tensors; the file then stands at their data."""
    limits = HeaderLimits(
        max_header_bytes=MAX_HEADER, min_tensors=1, max_tensors=max(1, max_tensors), max_dims=8,
        max_values=24 * max(1, max_tensors) + 1000,
    )  # fmt: skip
    file.seek(0)
    try:
        return parse_safetensors_header(file, size, limits=limits)  # type: ignore[arg-type]
    except ModelError as error:
        raise Problem("not-a-model", error.detail) from None


def _not_a_model(finding: str) -> Problem:
    fix = "Save the model again with save_pretrained(…), or give one .safetensors file."
    return Problem("not-a-model", f"{finding} {fix}")
