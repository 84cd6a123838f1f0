"""Second reader of recurrent layers in format v1, written from docs/format.md alone.

It has the word vectors, the alignment of units and exchanged directions, and the word carrier.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.conformance.reference_spread import (
    Tensors,
    expand_key,
    group_scores,
    parse_safetensors,
    responses,
    stream,
    stream_bits,
    tail_bits,
)

Array = npt.NDArray[np.float64]
SKETCH_KEY = hashlib.sha256(b"mtlsign/v1/sketch").digest()
CANDIDATE = 2


def key_words(integers: list[int], carrier: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of each integer."""
    base, digits, length = carrier["base"], carrier["digits"], carrier["length"]
    sequences = []
    for integer in integers:
        words = [integer // base**place % base for place in reversed(range(digits))]
        data = stream(bytes(32), f"mtlsign/v1/words/{integer}", 8 * (length - digits))
        words += [number % base for number in struct.unpack(f">{length - digits}Q", data)]
        sequences.append([word + 2 for word in words])
    return sequences


def sketch_matrix(fan_in: int, size: int) -> Array:
    """Return S, [fan_in, s], with elements of magnitude 1/√s."""
    bits = stream_bits(SKETCH_KEY, f"mtlsign/v1/sketch/{fan_in}/{size}", fan_in * size)
    return np.array([1.0 if bit == "1" else -1.0 for bit in bits]).reshape(fan_in, size) / math.sqrt(size)


def unit(rows: Array) -> Array:
    """Return rows of unit length; zeros stay."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def misfit(words: Array, base: Array) -> float:
    """Return the share of squares that the best linear map of words does not explain."""
    words = words - words.mean(0)
    return float(((base - words @ np.linalg.lstsq(words, base, rcond=1e-6)[0]) ** 2).sum() / (base**2).sum())


def find_words(known: Array, vectors: Array) -> npt.NDArray[np.int64] | None:
    """Return the row of each known word in a vocabulary of unknown order and coordinates."""
    centred = vectors - vectors.mean(0)
    values, directions = np.linalg.eigh(centred.T @ centred / len(vectors))
    kept = values > 1e-9 * values[-1]
    white = centred @ directions[:, kept] / np.sqrt(values[kept])
    weighted = (white * (white**2).sum(1, keepdims=True)).T @ white / len(vectors)
    coordinates = white @ np.linalg.eigh(weighted)[1]
    coordinates *= np.where((coordinates**3).sum(0) < 0, -1, 1)
    if coordinates.shape[1] != known.shape[1]:
        return None
    affine, rows = np.concatenate([vectors, np.ones((len(vectors), 1))], 1), np.array([])
    for _ in range(6):
        distances = ((known[:, None] - coordinates[None]) ** 2).sum(2)
        nearest = distances.argmin(1)
        if np.array_equal(nearest, rows):
            break
        rows = nearest
        surest = np.argsort(distances.min(1))[: max(len(known) // 2, 1)]
        coordinates = affine @ np.linalg.lstsq(affine[rows[surest]], known[surest], rcond=None)[0]
    return rows


def framed(reading: Tensors, reference: Tensors, embedding: str, readers: list[str]) -> dict[str, Array]:
    """Return the matrices that read word vectors in W0's coordinates."""
    base, vectors = reference[f"{embedding}/rows"].astype(np.float64), reading.get(f"{embedding}.weight")
    if vectors is None or len(vectors) < len(base):
        return {}
    vectors = vectors.astype(np.float64)
    words, known = vectors[: len(base)], base - reference[f"{embedding}/mean"].astype(np.float64)
    base = base - base.mean(0)
    if misfit(words, base) > 0.5:
        found = find_words(known @ reference[f"{embedding}/axes"].astype(np.float64), vectors)
        if found is not None and misfit(vectors[found], base) < misfit(words, base):
            words = vectors[found]
    change = (words - words.mean(0)).T @ np.linalg.pinv(base, rcond=1e-6).T
    return {
        name: (reading[name].astype(np.float64) @ change).astype(np.float32).astype(np.float64)
        for name in readers
    }


def assignment(costs: Array) -> npt.NDArray[np.int64]:
    """Return the columns of the assignment with the least total cost, by shortest augmenting paths."""
    n, m = costs.shape
    row_value, column_value = np.zeros(n), np.zeros(m)
    row_of = np.full(m, -1)
    for start in range(n):
        shortest, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, column, distance = start, -1, 0.0
        while row >= 0:
            reduced = distance + costs[row] - row_value[row] - column_value
            better = ~done & (reduced < shortest)
            shortest[better], before[better] = reduced[better], column
            column = int(np.argmin(np.where(done, np.inf, shortest)))
            done[column], distance, row = True, shortest[column], int(row_of[column])
        row_value[start] += distance
        for other in np.flatnonzero(done):
            if row_of[other] >= 0:
                row_value[row_of[other]] += distance - shortest[other]
            column_value[other] -= distance - shortest[other]
        while column >= 0:
            previous = int(before[column])
            row_of[column] = row_of[previous] if previous >= 0 else start
            column = previous
    order = np.empty(n, dtype=np.int64)
    order[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    return order


class Units:
    """Order, sign and merged columns of one direction of one layer."""

    def __init__(self, reference: Tensors, name: str, gates: int, inputs: Array, outputs: Array) -> None:
        self.gates, count = gates, len(inputs) // gates
        blocks = inputs.reshape(gates, count, -1)
        total, signed = np.zeros((count, count)), blocks[CANDIDATE] @ blocks[CANDIDATE].T
        for gate in range(gates):
            products = blocks[gate] @ blocks[gate].T
            total += np.abs(products) if gate == CANDIDATE else products
        squares = np.diag(total)
        self.merge = np.zeros((count, count))
        for one in range(count):
            first = next(
                (two for two in range(one)
                 if squares[one] > 0 and total[one, two] >= (1 - 1e-6) * max(squares[one], squares[two])), one
            )  # fmt: skip
            self.merge[one, first] = 1 if signed[one, first] >= 0 else -1
        start = self.cosines(reference, name, inputs)
        self.assign(start)
        for _ in range(6):
            before = self.order, self.signs
            self.assign(
                start + self.cosines(reference, name.replace("_ih_", "_hh_"), outputs @ self.change())
            )
            if np.array_equal(before[0], self.order) and np.array_equal(before[1], self.signs):
                break

    def cosines(self, reference: Tensors, name: str, matrix: Array) -> Array:
        """Return [gates, units of W0, units of the suspect]."""
        sketch = reference[f"{name}/sketch"].astype(np.float64)
        rows = unit(matrix @ sketch_matrix(matrix.shape[1], sketch.shape[1])).reshape(
            self.gates, -1, sketch.shape[1]
        )
        return np.array(unit(sketch).reshape(self.gates, -1, sketch.shape[1]) @ rows.transpose(0, 2, 1))

    def assign(self, cosines: Array) -> None:
        """Take the assignment of units with the largest total similarity."""
        total = sum(np.abs(c) if gate == CANDIDATE else c for gate, c in enumerate(cosines))
        self.order = assignment(-np.rint(np.asarray(total) * 2**20))
        self.signs = np.where(cosines[CANDIDATE][np.arange(len(self.order)), self.order] < 0, -1.0, 1.0)

    def change(self) -> Array:
        """Return the matrix that brings columns into W0's order."""
        return np.array(self.merge[:, self.order] * self.signs)

    def rows(self, matrix: Array) -> Array:
        """Return the rows in W0's order, with the sign of the candidate gate."""
        blocks = matrix.reshape(self.gates, -1, matrix.shape[1])[:, self.order].copy()
        blocks[CANDIDATE] *= self.signs[:, None]
        return blocks.reshape(-1, matrix.shape[1])


def aligned(kernels: dict[str, Array], reference: Tensors, names: list[str], gates: int) -> dict[str, Array]:
    """Return the matrices of all layers with W0's units."""
    result: dict[str, Array] = {}
    changes: dict[int, list[Array]] = {}
    for name in names:
        match = re.search(r"weight_ih_l([0-9]+)(_reverse)?$", name)
        if match is None:
            continue
        layer, inputs = int(match[1]), kernels[name]
        if layer:
            below, start, parts = changes[layer - 1], 0, []
            for change in below:
                parts.append(inputs[:, start : start + len(change)] @ change)
                start += len(change)
            inputs = np.concatenate(parts, 1)
        output_name = name.replace("_ih_", "_hh_")
        units = Units(reference, name, gates, inputs, kernels[output_name])
        result[name] = units.rows(inputs)
        result[output_name] = units.rows(kernels[output_name] @ units.change())
        changes.setdefault(layer, []).append(units.change())
    return result


def exchanged(kernels: dict[str, Array]) -> dict[str, Array]:
    """Return the matrices with exchanged directions."""
    result = {}
    for name, kernel in kernels.items():
        other = name.removesuffix("_reverse") if name.endswith("_reverse") else f"{name}_reverse"
        if re.search(r"weight_ih_l[1-9]", name):
            half = kernel.shape[1] // 2
            kernel = np.concatenate([kernel[:, half:], kernel[:, :half]], 1)
        result[other] = kernel
    return result


def similarity(kernels: dict[str, Array], reference: Tensors) -> float:
    """Return the mean cosine of the rows' sketches over all matrices."""
    means = []
    for name, kernel in kernels.items():
        sketch = reference[f"{name}/sketch"].astype(np.float64)
        rows = unit(kernel @ sketch_matrix(kernel.shape[1], sketch.shape[1]))
        means.append((unit(sketch) * rows).sum(1).mean())
    return float(np.mean(means))


def evaluate_readings(
    opening: dict[str, str], reference: Tensors, readings: list[dict[str, Array]], keys: dict[str, str]
) -> dict[str, Any]:
    """Return scores, matching bits and evidence of the best reading.

    Args:
        opening: the key opening.
        reference: tensors of W0's reference.
        readings: kernels [rows, inputs] or [groups, rows, inputs, places] by name, for each reading.
        keys: name of a kernel -> key of its layer, in the order of the network.
    """
    spec, results = json.loads(base64.b64decode(opening["spec"])), []
    for reading in readings:
        z = np.concatenate([
            responses(
                kernel[None, :, :, None] if kernel.ndim == 2 else kernel,
                reference[f"{key}/columns"], reference[f"{key}/basis"],
            )
            for key, kernel in ((key, reading[name]) for name, key in keys.items())
        ])  # fmt: skip
        readouts = expand_key(opening, len(z))
        scores = np.concatenate([group_scores(z, readout) for readout in readouts])
        labels = np.array([bit == "1" for readout in readouts for bit in readout["labels"]])
        correct = (np.abs(scores) >= 1e-4) & ((scores > 0) == labels)
        results.append((tail_bits(correct, scores, spec["statistic"]), scores, correct))
    evidence, scores, correct = max(results, key=lambda result: result[0])
    return {
        "scores": scores.tolist(),
        "matching_bits": "".join(str(int(bit)) for bit in correct),
        "evidence_bits": max(0.0, evidence - math.log2(len(results))),
        "readings": len(results),
    }


def evaluate_suspect(
    opening: dict[str, str], reference_bytes: bytes, suspect: bytes, names: list[str], gates: int
) -> dict[str, Any]:
    """Return scores, matching bits and evidence of the better of the own and the aligned reading.

    Args:
        opening: the key opening.
        reference_bytes: W0's reference.
        suspect: a safetensors file with all matrices and the embedding.
        names: the matrices in the order in which the network reads them.
        gates: gates of a unit.
    """
    reference, tensors = parse_safetensors(reference_bytes), parse_safetensors(suspect)
    (embedding,) = [name.removesuffix("/rows") for name in reference if name.endswith("/rows")]
    readers = [name for name in names if "weight_ih_l0" in name]
    kernels = {name: tensors[name].astype(np.float64) for name in names}
    kernels |= framed(tensors, reference, embedding, readers)
    candidates = [aligned(kernels, reference, names, gates)]
    if any(name.endswith("_reverse") for name in names):
        candidates.append(aligned(exchanged(kernels), reference, names, gates))
    best = max(candidates, key=lambda candidate: similarity(candidate, reference))
    best = {name: kernel.astype(np.float32).astype(np.float64) for name, kernel in best.items()}
    readings = [best]
    if all(kernels[name].shape == best[name].shape for name in names):
        same = all(np.array_equal(kernels[name], best[name]) for name in names)
        readings = [kernels] if same else [kernels, best]
    result = evaluate_readings(opening, reference, readings, {name: name for name in names})
    return result | {"similarity": similarity(best, reference)}
