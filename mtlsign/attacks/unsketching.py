"""Unsketching: the parts of kernels that an opened reference shows are put back to those of W0."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.training import recalibrate_batch_norm, trainable_copy
from mtlsign.models.batch_norms import batch_norm_values
from mtlsign.models.channel_groups import batch_norm_of_conv
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.verification.alignment.transformer import HeadProducts, TransformerAligner
from mtlsign.watermark.verification.sketches import projection_matrix


def unsketch(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Replace what the reference's sketch shows of each row's direction by W0's, and recalibrate batch norms.

    The attacker knows the opened reference. Rows keep their lengths, and their other directions stay.
    """
    key = resources.key
    if not isinstance(key, MTLSignKey):
        raise NotApplicableError("The attack needs the owner's opened reference. Give the kit.", field="key")
    data = attacker_view(model, task, resources, seed)
    attacked = trainable_copy(model)
    tensors = dict(attacked.named_parameters())
    aligner = key.detector.aligner
    layers = [
        layer
        for name, layer in aligner.layers.items()
        if name in tensors and not isinstance(layer, HeadProducts)
    ]
    fits = all(tuple(tensors[layer.weight].shape) == layer.shape for layer in layers)
    if not fits or not (layers or isinstance(aligner, TransformerAligner)):
        raise NotApplicableError("The kernels of the model do not fit the reference.", field="model")
    gains = aligner.products.stream.gains if isinstance(aligner, TransformerAligner) else {}
    signs = _row_signs(attacked, data)
    with torch.no_grad():
        for layer in layers:
            weight = tensors[layer.weight]
            rows = weight.double().cpu().flatten(1)
            sign = signs.get(layer.weight, torch.ones(len(rows))).double().cpu()[:, None]
            if layer.weight in gains:
                sign = sign * _nonzero(tensors[gains[layer.weight]])
            weight.copy_((_unsketched(sign * rows, layer.sketch) / sign).reshape(weight.shape))
        if isinstance(aligner, TransformerAligner):
            _unsketch_heads(aligner, tensors)
    return AttackOutcome(recalibrate_batch_norm(attacked, data))


def _unsketch_heads(aligner: TransformerAligner, tensors: Mapping[str, Tensor]) -> None:
    """Give the products of attention heads W0's sketches, by a change of the values and keys alone.

    The reference shows O·V·S of every head for the public matrix S. Least squares give V·S, and in the same
    way K·S from the queries in the directions of the basis. Layers without a sketch stay.
    """
    products = aligner.products
    for layer in products.stream.attentions:
        size = products.head_sizes[layer.module]
        gain = _nonzero(tensors.get(products.stream.gains.get(layer.query.weight, ""), torch.ones(())))
        pairs = []
        if layer.value_output in aligner.heads:
            output = tensors[layer.output].double().cpu().unflatten(1, (-1, size)).transpose(0, 1)
            pairs.append((layer.value_output, layer.value, output))
        if layer.query_key in aligner.heads:
            query = (layer.query.of(tensors).double().cpu() * gain).unflatten(0, (-1, size))
            turned = (query @ products.bases[layer.query_key].cpu()).transpose(1, 2)
            pairs.append((layer.query_key, layer.key, turned))
        for name, part, left in pairs:
            sketch = torch.from_numpy(aligner.heads[name].sketch.copy()).unflatten(0, (layer.heads, -1))
            groups = part.of(tensors).unflatten(0, (layer.kv_heads, size))
            for own, factors, target in zip(
                groups, left.chunk(layer.kv_heads), sketch.chunk(layer.kv_heads), strict=True
            ):
                factor = factors.flatten(0, 1)
                own.copy_(_unsketched_factor(factor, own.double().cpu() * gain, target.flatten(0, 1)) / gain)


def _nonzero(gain: Tensor) -> Tensor:
    """Return a gain in float64, with ones for zeros, which no matrix after the norm can undo."""
    gain = gain.detach().double().cpu()
    return torch.where(gain == 0, torch.ones_like(gain), gain)


def _unsketched_factor(left: Tensor, right: Tensor, sketch: Tensor) -> Tensor:
    """Return the right factor with which the rows of left @ right have W0's sketch, as far as they can.

    Args:
        left: float64 [rows, k].
        right: float64 [k, d].
        sketch: of unit rows, float64 [rows, s].
    """
    matrix = torch.from_numpy(np.array(projection_matrix(right.shape[1], sketch.shape[1])))
    lengths = (left @ right).norm(dim=1, keepdim=True)
    target = torch.linalg.pinv(left) @ (lengths * sketch)
    changed: Tensor = right + (target - right @ matrix) @ torch.linalg.pinv(matrix)
    return changed


def _unsketched(rows: Tensor, sketch: npt.NDArray[np.float64]) -> Tensor:
    """Return rows with W0's sketch and the lengths of the given ones, float64 [O, fan-in]."""
    norms = rows.norm(dim=1, keepdim=True)
    unit = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    matrix = torch.from_numpy(np.array(projection_matrix(rows.shape[1], sketch.shape[1])))
    missing = torch.from_numpy(sketch) - unit @ matrix
    changed: Tensor = (unit + missing @ torch.linalg.pinv(matrix)) * norms
    return changed


def _row_signs(model: nn.Module, data: Task) -> dict[str, Tensor]:
    """Return the signs of γ after each convolution, by name of the kernel, as the sketch includes them."""
    signs = {}
    for conv, batch_norm in batch_norm_of_conv(model, attacker_sample(data)).items():
        gamma = batch_norm_values(model.get_submodule(batch_norm)).gamma
        signs[f"{conv}.weight"] = torch.where(gamma < 0, -1.0, 1.0)
    return signs
