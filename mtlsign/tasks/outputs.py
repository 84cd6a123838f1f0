"""Outputs of networks: a tensor of logits, or a container that holds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mtlsign.errors import DataError

#: (outputs of a network) -> logits [n, classes, ...].
LogitsFunction = Callable[[Any], Tensor]

_LOGIT_KEYS = ("logits", "out")


def default_logits(outputs: Any) -> Tensor:
    """Return the logits of a network's outputs.

    A tensor is returned as it is. Of a mapping, such as a ModelOutput of the transformers library, the entry
    `logits`, then `out`, then the only tensor is taken. Of a tuple or list the first tensor is taken.

    Raises:
        DataError: the outputs do not show which tensor holds the logits.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        for key in _LOGIT_KEYS:
            if isinstance(outputs.get(key), Tensor):
                logits: Tensor = outputs[key]
                return logits
        tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
        shown = ", ".join(str(key)[:40] for key in list(outputs)[:5])
        raise DataError(
            f"The network returned {type(outputs).__name__} with the entries {shown}. "
            "Pass logits_of, a function that selects the logits.",
            field="logits_of",
        )
    if isinstance(outputs, tuple | list):
        for value in outputs:
            if isinstance(value, Tensor):
                return value
    raise DataError(
        f"The network returned {type(outputs).__name__} without a tensor. "
        "Pass logits_of, a function that returns the logits as a tensor.",
        field="logits_of",
    )
