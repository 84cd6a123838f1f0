"""Check that an attacked model computes the function of the marked model.

The outputs of both are compared in float64 on a few images of the attacker. A change of the function makes
the attack not applicable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view, transform_inputs
from mtlsign.attacks.base import AttackerResources, AttackOutcome, InputTransforms, NotApplicableError
from mtlsign.models.detectors import body_of
from mtlsign.tasks import Task

#: Largest difference of the outputs, relative to the largest output if that is above 1.
TOLERANCE = 1e-5
#: Largest difference for a part of a change, because the differences of the parts add up.
_PART_TOLERANCE = TOLERANCE / 10
#: Images of the attacker on which a change is checked.
_IMAGES = 8


def attacker_images(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> Tensor:
    """Return the attacker's images for checks on the model's device, [n, C, H, W] with n <= 8."""
    return attacker_sample(attacker_view(model, task, resources, seed), _IMAGES)


@torch.no_grad()
def function_change(
    model: nn.Module, changed: nn.Module, x: Tensor, transforms: InputTransforms = ()
) -> float:
    """Return the largest difference of two models' outputs in float64, of detectors of their feature maps.

    Args:
        model: the marked model.
        changed: the attacked model.
        x: images [n, C, H, W] or token ids [n, L].
        transforms: applied to the inputs of the attacked model.

    Returns:
        The difference relative to the largest output, if that is above 1.
    """
    x = x.double() if x.is_floating_point() else x
    expected = _outputs(model, x)
    actual = _outputs(changed, transform_inputs(x, transforms))
    return float((expected - actual).abs().max() / expected.abs().max().clamp(min=1))


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs in float64; of a detector the feature maps that its heads read, as one vector."""
    network = copy.deepcopy(model).eval().double()
    if body_of(network) is None:
        outputs: Tensor = network(x)
        return outputs
    maps = tree_leaves(network.backbone(x))  # type: ignore[operator]
    return torch.cat([own.flatten() for own in maps])


def preserved_outcome(
    model: nn.Module,
    changed: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    transforms: InputTransforms = (),
) -> AttackOutcome:
    """Return the outcome if the changed model computes the function of the marked model.

    Args:
        model: the marked model.
        changed: the attacked model.
        task: the primary task.
        resources: resources of the attacker.
        seed: seed of the attack.
        transforms: applied to the images of the attacked model.

    Raises:
        NotApplicableError: the function is another one.
    """
    x = attacker_images(model, task, resources, seed)
    try:
        difference = function_change(model, changed, x, transforms)
    except RuntimeError as error:  # the architecture needs images or channels of another shape
        raise NotApplicableError(
            f"The changed model cannot run ({str(error)[:80]}).", field="model"
        ) from None
    if not difference <= TOLERANCE:
        raise NotApplicableError(
            f"The change is no symmetry of this architecture, because outputs differ by {difference:.1e}.",
            field="model",
        )
    return AttackOutcome(changed.eval(), input_transforms=transforms)


def change_where_preserved(
    model: nn.Module, change: Callable[[Sequence[int]], nn.Module], parts: Sequence[int], images: Tensor
) -> nn.Module:
    """Return the model with all parts of a change, or with those alone that preserve the function.

    Args:
        model: the marked model.
        change: makes a changed copy from the numbers of the parts.
        parts: numbers of all parts.
        images: images of the attacker, [n, C, H, W].

    Raises:
        NotApplicableError: there is no part that preserves the function.
    """
    changed = change(parts)
    if parts and _is_preserved(model, changed, images, TOLERANCE):
        return changed
    preserving = [part for part in parts if _is_preserved(model, change([part]), images, _PART_TOLERANCE)]
    if not preserving:
        raise NotApplicableError(
            "The network has no channels of which the change is a symmetry.", field="model"
        )
    return change(preserving)


def _is_preserved(model: nn.Module, changed: nn.Module, x: Tensor, tolerance: float) -> bool:
    try:
        return function_change(model, changed, x) <= tolerance
    except RuntimeError:  # sizes that do not fit
        return False


def positive_factors(like: Tensor, generator: Generator, size: int | None = None) -> Tensor:
    """Draw log-normal numbers, by default as many as the tensor has rows, on its device."""
    drawn = torch.randn(size or len(like), generator=generator)
    return torch.exp(0.7 * drawn).to(like.device, like.dtype)
