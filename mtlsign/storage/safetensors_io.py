"""Tensors as bytes: safetensors, written deterministically and read with limits (design decision 8)."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from mtlsign.errors import ModelError

MAX_HEADER_BYTES = 16 * 1024 * 1024
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def serialize_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes: tensors sorted by name in header and data, no metadata, header padded to 8 bytes.

    The library's own writer sorts by dtype first and so does not give this layout. Raises `ModelError` for a
    dtype that has no safetensors name.
    """
    header: dict[str, object] = {}
    chunks, offset = [], 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"tensor {name!r} has dtype {tensor.dtype}; convert it to float32 first", field="model"
            )
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([struct.pack("<Q", len(head)), head, *chunks])


def parse_safetensors(
    data: bytes, *, max_bytes: int = 2 * 1024**3, max_tensors: int = 10_000, max_dims: int = 8
) -> dict[str, Tensor]:
    """Parse safetensors bytes from anybody. Raises `ModelError`; never executes anything."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if len(data) > max_bytes:
        raise ModelError(f"is {len(data)} bytes, over the limit of {max_bytes}", field="model")
    if len(data) < 8 or struct.unpack("<Q", data[:8])[0] > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ModelError(
            "is not a safetensors file; save the state_dict with safetensors.torch.save_file", field="model"
        )
    try:
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        entries = [v for k, v in header.items() if k != "__metadata__"]
        if len(entries) > max_tensors or any(len(v["shape"]) > max_dims for v in entries):
            raise ModelError(
                f"has over {max_tensors} tensors or {max_dims} dimensions; give the plain weights",
                field="model",
            )
        return dict(load(data))
    except ModelError:
        raise
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        RuntimeError,
    ):
        raise ModelError(
            "is not a valid safetensors file; save the state_dict with safetensors.torch.save_file",
            field="model",
        ) from None
