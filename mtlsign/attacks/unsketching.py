"""Unsketching: the parts of kernels that an opened reference shows are put back to those of W0."""

from __future__ import annotations

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
    layers = [layer for name, layer in key.detector.aligner.layers.items() if name in tensors]
    if not layers or any(tuple(tensors[layer.weight].shape) != layer.shape for layer in layers):
        raise NotApplicableError("The kernels of the model do not fit the reference.", field="model")
    signs = _row_signs(attacked, data)
    with torch.no_grad():
        for layer in layers:
            weight = tensors[layer.weight]
            rows = weight.double().cpu().flatten(1)
            sign = signs.get(layer.weight, torch.ones(len(rows))).double().cpu()[:, None]
            weight.copy_((sign * _unsketched(sign * rows, layer.sketch)).reshape(weight.shape))
    return AttackOutcome(recalibrate_batch_norm(attacked, data))


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
