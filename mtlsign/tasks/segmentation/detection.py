"""Loss, distillation and metric of detectors in torchvision's form.

Such a detector takes a list of images, and in training a list of targets. It returns a mapping of losses in
training mode, and in evaluation mode a list with boxes, labels, scores and possibly masks for each image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from mtlsign.errors import DataError
from mtlsign.models.batch_norms import is_batch_norm
from mtlsign.tasks.batch import Batch
from mtlsign.tasks.segmentation.average_precision import InstanceMetric, require_pycocotools

#: Images that are evaluated at once.
_EVALUATION_BATCH = 8


class _StopForward(BaseException):
    """End of a forward pass after the backbone. Not an `Exception`, so that no detector catches it."""


def detection_fields() -> dict[str, Any]:
    """Return the fields of a `Task` of instances. Raises `DataError` if pycocotools is not installed."""
    require_pycocotools()
    return {
        "loss": detection_loss,
        "metric": InstanceMetric,
        "logits_of": feature_vectors,
        "training_outputs": training_outputs,
        "predictions": detections,
        "targets": "values",
        "evaluation_batch": _EVALUATION_BATCH,
    }


def detections(network: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """Return the detections of a network in evaluation mode."""
    results: list[dict[str, Tensor]] = network(list(batch.inputs))
    return results


def training_outputs(network: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return `losses`, a mapping, and `features`, the maps that the backbone gives to the heads.

    All modules but the batch norms are in training mode during the pass, because a detector in evaluation
    mode computes no losses. Without gradients, as for a teacher, only the backbone runs.

    Args:
        network: the detector, or DistributedDataParallel around it.
        batch: images [n, C, H, W] and a list of n targets.
    """
    detector = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    backbone, features_only = getattr(detector, "backbone", None), not torch.is_grad_enabled()
    features: list[Tensor] = []

    def store(module: nn.Module, args: Any, output: Any) -> None:
        features.extend(output.values() if isinstance(output, Mapping) else [output])
        if features_only:
            raise _StopForward

    handle = backbone.register_forward_hook(store) if isinstance(backbone, nn.Module) else None
    losses: Any = {}
    try:
        with _training_mode(detector):
            losses = network(list(batch.inputs), [_trained_target(target) for target in batch.targets])
    except _StopForward:
        pass
    finally:
        if handle is not None:
            handle.remove()
    if not isinstance(losses, Mapping):
        raise DataError(
            f"The detector returned {type(losses).__name__} in training mode. It must return a mapping of "
            "losses.",
            field="task",
        )
    return {"losses": losses, "features": features}


@contextmanager
def _training_mode(detector: nn.Module) -> Iterator[None]:
    """Put a detector into training mode without its batch norms; restore the modes at the end.

    Images are scaled as in evaluation. In training mode a detector with several scales draws one, and
    features of two networks could not be compared.
    """
    modes = [(module, module.training) for module in detector.modules()]
    for module, mode in modes:
        module.training = mode if is_batch_norm(module) else not isinstance(module, GeneralizedRCNNTransform)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _trained_target(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a target without the instances that are crowd."""
    crowd = target.get("iscrowd")
    if crowd is None or not bool(crowd.any()):
        return dict(target)
    keep = ~crowd.bool()
    return {name: values[keep] if len(values) == len(keep) else values for name, values in target.items()}


def detection_loss(outputs: Mapping[str, Any], targets: object) -> Tensor:
    """Return the sum of the losses of `training_outputs`."""
    losses = list(outputs["losses"].values())
    if not losses:
        raise DataError("The detector returned no loss in training mode. Return at least one.", field="task")
    return torch.stack([loss.float() for loss in losses]).sum()


def feature_vectors(outputs: Mapping[str, Any]) -> Tensor:
    """Return the feature maps of each image as one vector, [n, K], in which every map counts the same.

    The squared distance of two such vectors, in units of their variance, is the mean of that of the maps.

    Args:
        outputs: result of `training_outputs`.
    """
    features: Sequence[Tensor] = outputs["features"]
    if not features:
        raise DataError(
            "The detector has no module 'backbone' whose features distillation can compare. Set "
            "phase2.distillation to 0, or give logits_of.",
            field="logits_of",
        )
    return torch.cat([x.float().flatten(1) * x[0].numel() ** -0.5 for x in features], 1)
