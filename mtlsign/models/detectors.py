"""Object detectors: their body, which carries the watermark, and what a verifier needs of it.

A detector, such as torchvision's Mask R-CNN, FCOS or RetinaNet, has a body with several stages in
`backbone.body`, a feature pyramid and heads. A verifier reads the body alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

#: Name of the body in a detector.
BODY = "backbone.body"


def body_of(model: nn.Module) -> nn.Module | None:
    """Return the body of a detector; None for other networks."""
    body = getattr(getattr(model, "backbone", None), "body", None)
    return body if isinstance(body, nn.Module) else None


def body_stages(model: nn.Module) -> Sequence[str]:
    """Return the names of the body's modules whose outputs the feature pyramid reads; empty if unknown."""
    returned = getattr(body_of(model), "return_layers", None)
    return tuple(f"{BODY}.{name}" for name in returned) if isinstance(returned, dict) else ()


def as_template(body: nn.Module) -> nn.Module:
    """Return a network that is only the body, under the names that it has in a detector."""
    return nn.Sequential(OrderedDict(backbone=nn.Sequential(OrderedDict(body=body))))


def template_of(model: nn.Module) -> nn.Module:
    """Return the part of a network that a verifier needs: the body of a detector, or all of it."""
    body = body_of(model)
    return model if body is None or not body_stages(model) else as_template(body)
