"""Bases that are fitted to the labels of a chosen key, for a network that stays as it is.

A reference holds numbers that its author chooses freely. Those of a basis decide the coordinates of a layer,
so that they can be computed from the labels of any key. The digest of the fitted reference then differs from
the one in the key's spec, and a new spec has new labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.readouts import SpreadReadout
from mtlsign.watermark.verification.response_model import MarkedLayer
from mtlsign.watermark.verification.scaling import column_multipliers

#: A basis has numbers of at most 2 in magnitude.
_MAX_BASIS = 2.0


def spread_readout(detector: WatermarkDetector) -> SpreadReadout:
    """Return the first read-out, which must have a spread head."""
    readout = detector.readouts[0]
    assert isinstance(readout, SpreadReadout)
    return readout


def scaled_rows(layer: MarkedLayer, kernel: Tensor) -> Tensor:
    """Return the rows whose products with the basis are the responses, float64 [groups, O/groups, fan-in]."""
    blocks = kernel.double().reshape(layer.groups, -1, kernel.shape[1], kernel[0, 0].numel())
    columns = column_multipliers(blocks.square().sum(3), layer.columns)
    return (blocks * columns.sqrt()[:, None, :, None]).flatten(2)


def target_signs(readouts: Sequence[SpreadReadout]) -> Tensor:
    """Return the sign of each coordinate for which every label matches, [D]; the mean over several keys."""
    # Scores are linear in the coordinates, so that the gradient of the signed sum gives the key's signs.
    coordinates = torch.zeros(readouts[0].model.coordinates, dtype=torch.float64, requires_grad=True)
    for readout in readouts:
        (readout.head(coordinates) * (readout.labels.double() * 2 - 1)).sum().backward()
    assert coordinates.grad is not None
    return coordinates.grad * (readouts[0].model.coordinates // readouts[0].spec.n) ** 0.5 / len(readouts)


def least_squares_bases(
    readouts: Sequence[SpreadReadout], kernels: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the bases for which the responses are nearest to the keys' signs: W⁺ · signs for each layer.

    Args:
        readouts: the same read-out under one or several keys.
        kernels: the suspect's kernels in the order of the verifier.

    Returns:
        Name of a layer -> basis float16 [groups, fan-in, k].
    """
    signs, bases, start = target_signs(readouts), {}, 0
    for layer in readouts[0].model.layers:
        size = layer.rows * layer.basis.shape[2]
        rows = scaled_rows(layer, kernels[layer.weight])
        targets = signs[start : start + size].reshape(layer.groups, -1, layer.basis.shape[2])
        basis = torch.linalg.pinv(rows) @ targets
        scale = _MAX_BASIS / basis.abs().max().clamp(min=1e-12)
        bases[layer.weight] = (basis * scale).half()
        start += size
    return bases


def gradient_bases(
    readout: SpreadReadout, kernels: Mapping[str, Tensor], *, steps: int, lr: float = 0.02
) -> dict[str, Tensor]:
    """Return the bases of the reference after Adam has moved them towards matching labels.

    Args:
        readout: the read-out under the chosen key.
        kernels: the suspect's kernels in the order of the verifier.
        steps: steps of Adam.
        lr: its rate.
    """
    layers = readout.model.layers
    rows = [scaled_rows(layer, kernels[layer.weight]).float() for layer in layers]
    bases = [layer.basis.float().clone().requires_grad_(True) for layer in layers]
    optimizer = torch.optim.Adam(bases, lr=lr)
    signs = readout.labels.float() * 2 - 1
    for _ in range(steps):
        optimizer.zero_grad()
        parts = []
        for row, basis in zip(rows, bases, strict=True):
            responses = (row @ basis).flatten(0, 1)
            norms = responses.norm(dim=1, keepdim=True).clamp(min=1e-12)
            parts.append((responses / norms * math.sqrt(basis.shape[2])).flatten())
        torch.nn.functional.softplus(1 - readout.head(torch.cat(parts)) * signs).mean().backward()
        optimizer.step()
    return {
        layer.weight: basis.detach().clamp(-_MAX_BASIS, _MAX_BASIS).half()
        for layer, basis in zip(layers, bases, strict=True)
    }
