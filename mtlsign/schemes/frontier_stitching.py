"""Le Merrer, Perez and Tredan 2020, "Adversarial Frontier Stitching" (arXiv 1711.01894).

Key samples are adversarial points near the decision boundary: half of them flip the class, half do not. The
marked model answers the original class of all of them. The null rate of one half is the paper's assumption:
it holds for the base model, and other models may answer more of them right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.schemes.base import Detection, Forgery
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.training import evaluation_mode
from mtlsign.schemes.trigger_marks import (
    TriggerKey,
    TriggerMark,
    logits_of,
    pixel_range,
    require_classified_images,
    training_images,
)
from mtlsign.tasks import Task
from mtlsign.tasks.outputs import default_logits
from mtlsign.tasks.splitting import seeded_generator

#: Sizes of the step that are tried.
_HALVINGS = 6


@dataclass(frozen=True)
class FrontierStitchingScheme(TriggerMark[TriggerKey]):
    """Scheme of Le Merrer et al.

    Attributes:
        epsilon: size of the fast gradient sign step, in units of the range of pixel values. It is halved
            while too few points keep their class.
    """

    name: ClassVar[str] = "frontier_stitching"
    needs_commitment: ClassVar[bool] = True

    epsilon: float = 0.25

    def unsupported_reason(self, model: nn.Module, task: Task) -> str | None:
        """Return why the scheme cannot mark this task; None if it can.

        Which points flip the class depends on the trained network, so that `generate_key` alone checks them.
        """
        try:
            require_classified_images(task)
        except ModelError as error:
            return error.detail
        return None

    def draw_key(self, model: nn.Module, task: Task, seed: int) -> TriggerKey:
        """Make adversarial points of correctly classified training images."""
        generator = seeded_generator("mtlsign/frontier_stitching", seed)
        count = min(task.size("train"), 20 * self.key_size)
        images, classes = training_images(task, count, generator)
        half = self.key_size // 2
        for halvings in range(_HALVINGS):
            epsilon = self.epsilon / 2**halvings
            points = fast_gradient_sign(model, images, classes, epsilon, pixel_range(task))
            with torch.no_grad(), evaluation_mode(model):
                right = logits_of(model, images).argmax(1).cpu() == classes
                flips = logits_of(model, points).argmax(1).cpu() != classes
            chosen = [torch.nonzero(right & group).flatten()[:half] for group in (flips, ~flips)]
            balanced = min(map(len, chosen))
            if balanced >= max(1, half // 2):
                break
        else:
            raise ModelError(
                f"Only {len(chosen[0])} points flip the class and {len(chosen[1])} do not. Use another "
                "epsilon or another network.",
                field="epsilon",
            )
        rows = torch.cat([group[:balanced] for group in chosen])
        return TriggerKey(points[rows], classes[rows], 0.5)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Use other points that the model answers right: only those that do not flip its class."""

        def detect() -> Detection:
            generator = seeded_generator("mtlsign/frontier_stitching", seed)
            images, classes = training_images(task, self.key_size, generator)
            with torch.no_grad(), evaluation_mode(model):
                answered = logits_of(model, images).argmax(1).cpu()
            return self.verify(model, replace(TriggerKey(images, classes, 0.5), classes=answered))

        return computed_key("classes read from the model", detect)


def fast_gradient_sign(
    model: nn.Module, images: Tensor, classes: Tensor, epsilon: float, span: tuple[float, float]
) -> Tensor:
    """Return images after one step of the fast gradient sign method, on the CPU.

    Args:
        model: unchanged; in evaluation mode during the step.
        images: [n, C, H, W].
        classes: classes that the step leads away from, [n].
        epsilon: size of the step, in units of the range of pixel values.
        span: smallest and largest pixel value.
    """
    device = next(model.parameters()).device
    points = []
    with evaluation_mode(model):
        for x, y in zip(images.split(250), classes.split(250), strict=True):
            start = x.to(device).requires_grad_(True)
            loss = F.cross_entropy(default_logits(model(start)), y.to(device))
            (gradient,) = torch.autograd.grad(loss, start)
            step = epsilon * (span[1] - span[0]) * gradient.sign()
            points.append((start.detach() + step).clamp(*span).cpu())
    return torch.cat(points)
