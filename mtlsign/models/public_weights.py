"""Recognition of weights that everybody can download.

Marking them as they are protects nothing: an attacker takes the unmarked original, or subtracts it.

`public_weights.json` holds `tensor_digests` of the weights in a few packages; most public models are unknown.
torchvision's files are recognised by the digests in their names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth$")
#: Share of the weights from which a network counts as unchanged.
_UNCHANGED = 0.5


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return digests of the matrices and kernels of a network, which depend on no names and no file format.

    Args:
        tensors: the weights; vectors and integers are left out.

    Returns:
        The first 16 hex digits of the SHA-256 of each tensor -> number of its elements. Tensors are rounded
        to bfloat16 before, so that the same weights in bfloat16 and in full precision agree.
    """
    digests = {}
    for tensor in tensors.values():
        if tensor.dim() > 1 and tensor.is_floating_point():
            rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16)
            content = repr(tuple(rounded.shape)).encode() + rounded.numpy().astype("<i2").tobytes()
            digests[hashlib.sha256(content).hexdigest()[:16]] = tensor.numel()
    return digests


def public_package(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the package that has at least half of these weights unchanged; None if none is known."""
    sizes = tensor_digests(tensors)
    total = sum(sizes.values())
    for package, digests in _known_digests().items():
        if total and sum(size for digest, size in sizes.items() if digest in digests) >= _UNCHANGED * total:
            return package
    return None


def torchvision_file(path: Path) -> str | None:
    """Return the name of torchvision's file of pretrained weights that `path` is; None if it is another.

    The names of these files end with the first eight digits of their SHA-256.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return _torchvision_files().get(digest.hexdigest()[:8])


def public_weights_warning(origin: str) -> str:
    """Return the warning about a W0 that is public under the name `origin`."""
    return (
        f"At least half of the weights are those of {origin}, which everybody can download. A mark in them "
        "protects nothing, because the unmarked original is public. Train the network on your own data first."
    )


@cache
def _known_digests() -> dict[str, frozenset[str]]:
    text = resources.files("mtlsign.models").joinpath("public_weights.json").read_text("utf-8")
    return {package: frozenset(digests) for package, digests in json.loads(text).items()}


@cache
def _torchvision_files() -> dict[str, str]:
    """Return the names of torchvision's files by the first eight digits of their SHA-256."""
    from torchvision import models

    urls = [str(weights.url) for name in models.list_models() for weights in models.get_model_weights(name)]
    names = [url.rpartition("/")[2] for url in urls]
    return {match[1]: f"torchvision's {name}" for name in names if (match := _HASH_IN_NAME.search(name))}
