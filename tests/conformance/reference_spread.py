"""Second implementation of the spread head of `docs/format.md`, written from that text alone.

It shares no code with the package and needs only numpy and the library `cryptography`: no torch, and no
library for safetensors files. It reads prefixes, damaged kernels and both statistics, but no keyed or free
heads, no other spellings of names, and no kernels that are stored in another form.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import struct
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
#: Module name, groups, and name of the batch norm after it or None; in execution order.
Layer = tuple[str, int, str | None]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
REQUIRED_BITS = 120


def length_prefixed(part: bytes) -> bytes:
    """Return the 8-byte big-endian length, then the bytes."""
    return struct.pack(">Q", len(part)) + part


def derive_key(opening: dict[str, str]) -> bytes:
    """Check the signature of an opening and return its key."""
    public_key, signature = bytes.fromhex(opening["public_key"]), bytes.fromhex(opening["signature"])
    signed = length_prefixed(base64.b64decode(opening["spec"])) + length_prefixed(public_key)
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, b"mtlsign/v1/spec" + signed)
    return hashlib.sha256(b"mtlsign/v1/key" + signed + length_prefixed(signature)).digest()


def stream(key: bytes, label: str, size: int) -> bytes:
    """Return the first bytes of a keystream."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    subkey = hmac.digest(extracted, label.encode() + b"\x01", "sha256")
    return Cipher(algorithms.ChaCha20(subkey, bytes(16)), None).encryptor().update(bytes(size))


def stream_bits(key: bytes, label: str, count: int) -> str:
    """Return the first bits of a keystream as text of 0 and 1."""
    return "".join(f"{byte:08b}" for byte in stream(key, label, -(-count // 8)))[:count]


def permutation(key: bytes, d: int) -> list[int]:
    """Return σ: the positions 0…d − 1 sorted by integers of the keystream."""
    numbers = struct.unpack(f">{d}Q", stream(key, "mtlsign/v1/spread", 8 * d))
    return sorted(range(d), key=lambda position: (numbers[position], position))


def expand_key(opening: dict[str, str], d: int) -> list[dict[str, str]]:
    """Return key, labels, signs and permutation of each read-out over d coordinates."""
    key, spec = derive_key(opening), json.loads(base64.b64decode(opening["spec"]))
    expanded = []
    for index, readout in enumerate([spec, *(spec["readouts"] if spec["readouts"] != 1 else [])]):
        assert readout["head"] == {"kind": "spread"} and d >= readout["n"]
        own_key = stream(key, f"mtlsign/v1/readout/{index}", 32) if index else key
        expanded.append({
            "key": own_key.hex(),
            "labels": stream_bits(own_key, "mtlsign/v1/labels", readout["n"]),
            "signs": stream_bits(own_key, "mtlsign/v1/signs/0", d).replace("1", "+").replace("0", "-"),
            "order": " ".join(map(str, permutation(own_key, d))),
        })  # fmt: skip
    return expanded


def parse_safetensors(data: bytes) -> Tensors:
    """Return the floating-point tensors; those of type BF16 as binary32."""
    (size,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + size]), {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in DTYPES:
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[start:end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def readings(tensors: Tensors, layers: list[Layer]) -> list[Tensors]:
    """Return the tensors under each prefix that has at least half of the kernels, or else most of them."""
    kernels = [f"{layer}.weight" for layer, _, _ in layers]
    prefixes = [n.removesuffix(kernel) for n in tensors for kernel in kernels if n.endswith(kernel)]
    counts = Counter(p for p in prefixes if not (p and (p[-1].isalnum() or p[-1] == "_")))
    most = max(counts.values())
    bound = len(kernels) / 2 if most == len(kernels) else min(len(kernels) / 2, most)
    chosen = sorted(prefix for prefix, count in counts.items() if count >= bound)
    assert len(chosen) <= 8, "not verifiable"
    return [{n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)} for p in chosen]


def signed_kernel(reading: Tensors, layer: Layer, reference: Tensors) -> Array | None:
    """Return the signed kernel in binary64 as [groups, rows, input columns, places]; None if damaged."""
    name, groups, norm = layer
    rows, columns = len(reference[f"{name}/sketch"]), reference[f"{name}/columns"].shape[1]
    size, kernel = rows * reference[f"{name}/basis"].shape[1], reading.get(f"{name}.weight")
    if kernel is None or kernel.shape[:2] != (rows, columns) or kernel.size != size:
        return None
    kernel = kernel.astype(np.float32).astype(np.float64)
    if not np.isfinite(kernel).all():
        return None
    gamma = reading.get(f"{norm}.weight")
    if gamma is None or gamma.shape != (rows,) or not np.isfinite(gamma).all():
        gamma = np.ones(rows)
    signs = np.where(gamma < 0, -1.0, 1.0)
    return (kernel.reshape(rows, -1) * signs[:, None]).reshape(groups, -1, columns, size // rows // columns)


def positive_or_one(sums: Array) -> Array:
    """Replace sums of 0 by 1."""
    return np.where(sums > 0, sums, 1.0)


def responses(kernel: Array, columns: Array, basis: Array) -> Array:
    """Return the coordinates of one layer: column scaling, response and unit, for each group."""
    parts = []
    for block, target, directions in zip(kernel, columns, basis.astype(np.float64), strict=True):
        masses, c = (block**2).sum(2), np.ones(len(target))
        for _ in range(50):
            r = 1 / positive_or_one(masses @ c)
            c = target**2 / positive_or_one(r @ masses)
        u = (block * np.sqrt(c)[None, :, None]).reshape(len(block), -1) @ directions
        parts.append(u * math.sqrt(u.shape[1]) / positive_or_one(np.linalg.norm(u, axis=1, keepdims=True)))
    return np.concatenate(parts).ravel()


def coordinates(reading: Tensors, layers: list[Layer], reference: Tensors) -> tuple[Array, list[str]]:
    """Return z of all marked layers, and the names of kernels that are missing or damaged."""
    parts, missing = [], []
    for layer in layers:
        basis, kernel = reference[f"{layer[0]}/basis"], signed_kernel(reading, layer, reference)
        if kernel is None:
            missing.append(f"{layer[0]}.weight")
            parts.append(np.zeros(len(reference[f"{layer[0]}/sketch"]) * basis.shape[2]))
        else:
            parts.append(responses(kernel, reference[f"{layer[0]}/columns"], basis))
    return np.concatenate(parts), missing


def group_scores(z: Array, readout: dict[str, str]) -> Array:
    """Return the scores of one read-out."""
    n, signs = len(readout["labels"]), np.array([float(f"{sign}1") for sign in readout["signs"]])
    g, order = len(z) // n, list(map(int, readout["order"].split()))
    return np.array((signs * z[order])[: n * g].reshape(n, g).sum(1) / math.sqrt(g))


def tail_bits(correct: Array, scores: Array, statistic: str) -> float:
    """Return -log2 of the exact tail of the statistic, counted in integers."""
    n, weights = len(scores), [1] * len(scores)
    if statistic == "weighted":
        sizes = np.abs(scores.astype(np.float32).astype(np.float64))
        mean = math.fsum(sizes) / n
        weights = [min(15, math.floor(8 * (size / mean))) if mean else 0 for size in sizes]
    counts = [1] + [0] * sum(weights)  # subsets by the sum of their weights
    for weight in weights:
        shifted = [0] * weight + counts[: len(counts) - weight]
        counts = [a + b for a, b in zip(counts, shifted, strict=True)]
    total = sum(weight for weight, match in zip(weights, correct, strict=True) if match)
    return n - math.log2(sum(counts[total:]))


def evaluate_suspect(
    opening: dict[str, str], reference_bytes: bytes, suspect: bytes, layers: list[Layer]
) -> dict[str, Any]:
    """Return scores, matching bits, evidence and status of the reading with most evidence."""
    spec, results = json.loads(base64.b64decode(opening["spec"])), []
    assert hashlib.sha256(reference_bytes).hexdigest() == spec["reference"]
    reference = parse_safetensors(reference_bytes)
    assert {f"{layer}/basis" for layer, _, _ in layers} == {n for n in reference if n.endswith("/basis")}
    for reading in readings(parse_safetensors(suspect), layers):
        z, missing = coordinates(reading, layers, reference)
        readouts = expand_key(opening, len(z))
        scores = np.concatenate([group_scores(z, readout) for readout in readouts])
        labels = np.array([bit == "1" for readout in readouts for bit in readout["labels"]])
        correct = (np.abs(scores) >= 1e-4) & ((scores > 0) == labels)
        results.append((tail_bits(correct, scores, spec["statistic"]), scores, correct, missing))
    bits, scores, correct, missing = max(results, key=lambda result: result[0])
    bits, incomplete = max(0.0, bits - math.log2(len(results))), any(result[3] for result in results)
    return {
        "scores": scores.tolist(),
        "matching_bits": "".join(str(int(match)) for match in correct),
        "near_zero": int((np.abs(scores) < 1e-4).sum()),
        "evidence_bits": bits,
        "missing": missing,
        "readings": len(results),
        "status": "accepted" if bits >= REQUIRED_BITS else "not_verifiable" if incomplete else "rejected",
    }
