"""Second reader of attention layers in format v1, written from docs/format.md alone.

It has the products of attention layers, gains, the turned stream with a renumbered vocabulary, and the order
of heads. Neurons stay in the file's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.conformance.reference_recurrent import (
    assignment,
    evaluate_readings,
    find_words,
    misfit,
    sketch_matrix,
    unit,
)
from tests.conformance.reference_spread import Tensors, parse_safetensors

Array = npt.NDArray[np.float64]
Structure = dict[str, Any]


def normalised(tensors: Tensors, structure: Structure) -> dict[str, Array]:
    """Return the matrices with the gains of norms, and writers less the mean of their rows."""
    matrices = {}
    for name in (*structure["readers"], *structure["writers"]):
        if name not in tensors:
            continue
        matrix = tensors[name].astype(np.float64)
        gain = tensors.get(structure["gains"].get(name, ""))
        if gain is not None:
            matrix = matrix * gain.astype(np.float64)
        if structure["subtracts_mean"] and name in structure["writers"]:
            matrix = matrix - matrix.mean(0, keepdims=True)
        matrices[name] = matrix.astype(np.float32).astype(np.float64)
    return matrices


def products(matrices: dict[str, Array], reference: Tensors, structure: Structure) -> dict[str, Array]:
    """Return the kernels of all marked layers."""
    kernels = dict(matrices)
    for layer in structure["attention"]:
        query, key, value, output = (
            kernels.pop(layer[part], None) for part in ("query", "key", "value", "output")
        )
        heads, shared = layer["heads"], layer["heads"] // layer["kv_heads"]
        basis = reference[f"{layer['module']}.query_key/basis"][0].astype(np.float64)
        assert query is not None and key is not None and value is not None and output is not None
        size = len(query) // heads
        rows, columns = [], []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            group = slice(head // shared * size, (head // shared + 1) * size)
            rows.append((query[own] @ basis).T @ key[group])
            columns.append(output[:, own] @ value[group])
        kernels[f"{layer['module']}.query_key"] = np.concatenate(rows)
        kernels[f"{layer['module']}.value_output"] = np.concatenate(columns)
    return kernels


def relative(vectors: Array, structure: Structure) -> Array:
    """Return the vectors of a source without the parts that can be moved."""
    if structure["subtracts_mean"]:
        vectors = vectors - vectors.mean(1, keepdims=True)
    return vectors - vectors.mean(0) if len(vectors) > 1 else vectors


def turned(
    matrices: dict[str, Array], tensors: Tensors, reference: Tensors, structure: Structure
) -> dict[str, Array]:
    """Return the matrices in the coordinates of W0's stream."""
    pairs = []
    for source in structure["sources"]:
        known, vectors = reference[f"{source}/rows"].astype(np.float64), tensors.get(source)
        if vectors is None or len(vectors) < len(known):
            continue
        vectors = vectors.astype(np.float64)
        own = vectors[: len(known)]
        if f"{source}/mean" in reference:
            base = known - known.mean(0)
            if misfit(own, base) > 0.5:
                mean, axes = (reference[f"{source}/{part}"].astype(np.float64) for part in ("mean", "axes"))
                rows = find_words((known - mean) @ axes, vectors)
                if rows is not None and misfit(vectors[rows], base) < misfit(own, base):
                    own = vectors[rows]
        pairs.append((relative(own, structure), relative(known, structure)))
    if all(np.allclose(own, known, rtol=1e-2, atol=1e-3) for own, known in pairs):
        return matrices
    product = np.sum([own.T @ known for own, known in pairs], 0)
    product = product / np.linalg.norm(product)
    product += 1e-3 * np.linalg.svd(product, compute_uv=False).mean() * np.eye(len(product))
    left, _, right = np.linalg.svd(product)
    turn, result = left @ right, {}
    for name, matrix in matrices.items():
        changed = matrix @ turn if name in structure["readers"] else turn.T @ matrix
        result[name] = changed.astype(np.float32).astype(np.float64)
    return result


def ordered(kernels: dict[str, Array], reference: Tensors, structure: Structure) -> dict[str, Array]:
    """Return the products with W0's order of heads."""
    result = dict(kernels)
    for layer in structure["attention"]:
        names = [f"{layer['module']}.{part}" for part in ("query_key", "value_output")]
        heads, similarity = layer["heads"], np.zeros((layer["heads"],) * 2)
        for name in names:
            sketch = unit(reference[f"{name}/sketch"].astype(np.float64))
            own = unit(kernels[name] @ sketch_matrix(kernels[name].shape[1], sketch.shape[1]))
            one, two = (rows.reshape(heads, -1, sketch.shape[1]) for rows in (sketch, own))
            similarity += np.array([[(a * b).sum(1).mean() for b in two] for a in one])
        order = assignment(-np.rint(similarity * 2**20))
        for name in names:
            blocks = kernels[name].reshape(heads, -1, kernels[name].shape[1])
            result[name] = blocks[order].reshape(kernels[name].shape)
    return result


def similarity_of(kernels: dict[str, Array], reference: Tensors) -> float:
    """Return the mean cosine of the rows' sketches over all layers."""
    means = []
    for name, kernel in kernels.items():
        sketch = reference[f"{name.removesuffix('.weight')}/sketch"].astype(np.float64)
        rows = unit(kernel @ sketch_matrix(kernel.shape[1], sketch.shape[1]))
        means.append((unit(sketch) * rows).sum(1).mean())
    return float(np.mean(means))


def evaluate_suspect(
    opening: dict[str, str], reference_bytes: bytes, suspect: bytes, structure: Structure
) -> dict[str, Any]:
    """Return scores, matching bits and evidence of the better of the own and the aligned reading.

    Args:
        opening: the key opening.
        reference_bytes: W0's reference.
        suspect: a safetensors file.
        structure: parts of the residual stream, and the marked layers in the order of the network.
    """
    reference, tensors = parse_safetensors(reference_bytes), parse_safetensors(suspect)
    matrices = normalised(tensors, structure)
    own = products(matrices, reference, structure)
    best = products(turned(matrices, tensors, reference, structure), reference, structure)
    best = ordered(best, reference, structure)
    same = all(np.array_equal(own[name], best[name]) for name in own)
    keys = {name: name.removesuffix(".weight") for name in structure["layers"]}
    result = evaluate_readings(opening, reference, [own] if same else [own, best], keys)
    return result | {"similarity": similarity_of(best, reference)}
