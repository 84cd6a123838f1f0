"""Weights from which phase 1 starts: those of a pretrained network, such as the body of a detector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.checkpoints import converted, read_checkpoint
from mtlsign.models.detectors import BODY, body_of
from mtlsign.models.tensor_names import is_counter

FIELD = "phase1.initial-weights"
#: Share of a network's tensors that have to be in the file. Last layers for other classes are missing.
_REQUIRED_SHARE = 0.8


def initialize_from_checkpoint(path: str | Path, model: nn.Module) -> tuple[int, int]:
    """Load the tensors of a checkpoint that fit a network, or its body if it is a detector.

    Tensors are compared by name and shape, under any common prefix of the file's names. If the names are
    those of another library, the tensors are taken in their order, as long as every shape is equal.

    Args:
        path: see `mtlsign.models.checkpoints.read_checkpoint`.
        model: changed in place, or left unchanged if an error is raised; tensors that are not in the file
            keep their values.

    Returns:
        Number of tensors that were loaded, and number of tensors of the network or body.

    Raises:
        ModelError: the file is invalid, or holds less than four fifths of the tensors.
    """
    try:
        tensors = read_checkpoint(path).tensors
        loaded, count = _load(tensors, model)
    except ModelError as error:
        raise ModelError(error.detail, field=FIELD) from None
    return loaded, count


def _load(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[int, int]:
    target = model.state_dict()
    sources = _sources(target, tensors)
    body = body_of(model)
    if body is not None and len(sources) < _parameter_count(target):
        start = f"{BODY}."
        target = {name: t for name, t in target.items() if name.startswith(start)}
        short = {name.removeprefix(start): t for name, t in target.items()}
        sources = {start + name: source for name, source in _sources(short, tensors).items()}
    count = _parameter_count(target)
    if len(sources) < max(1, _REQUIRED_SHARE * count):
        raise ModelError(
            f"The file has {len(sources)} of the {count} tensors of the network"
            f"{'' if body is None else chr(39) + 's body'}, with the same shapes. "
            "Give a checkpoint of this architecture, or another --model.",
            field=FIELD,
        )
    values = {name: converted(source, tensors[source], target[name]) for name, source in sources.items()}
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
    return len(values), count


def _parameter_count(state: Mapping[str, Tensor]) -> int:
    return sum(not is_counter(name) for name in state)


def _sources(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the file's name of each tensor that it has, by name or, if that gives more, by order."""
    by_order = _by_order(target, tensors)
    mappings = [_by_name(target, tensors, prefix) for prefix in _prefixes(target, tensors)]
    return max([*mappings, by_order], key=len)


def _prefixes(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes under which the file has the network's first tensor with a name of two parts."""
    first = next((name for name in target if "." in name), "")
    return sorted({name.removesuffix(first) for name in tensors if first and name.endswith(first)} | {""})


def _by_name(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    return {
        name: prefix + name
        for name, own in target.items()
        if not is_counter(name) and prefix + name in tensors and tensors[prefix + name].shape == own.shape
    }


def _by_order(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors up to the first one of another shape, in the order of both."""
    sources: dict[str, str] = {}
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    for own, name in zip((n for n in target if not is_counter(n)), names, strict=False):
        if target[own].shape != tensors[name].shape:
            break
        sources[own] = name
    return sources
