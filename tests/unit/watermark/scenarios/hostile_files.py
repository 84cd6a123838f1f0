"""Suspect files that try to mislead a verifier: decoys, damage, other stored forms, and no models at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from safetensors.torch import save
from torch import Tensor

from tests.unit.models.network import transformers_name

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


def decoys(tensors: Tensors, spelling: Callable[[str], str] = str) -> Tensors:
    """Return random tensors of the same shapes under another spelling of the names."""
    generator = torch.Generator().manual_seed(1)
    return {spelling(name): torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def renamed(tensors: Tensors, spelling: Callable[[str], str]) -> Tensors:
    return {spelling(name): t for name, t in tensors.items()}


def backbone_name(name: str) -> str:
    return transformers_name(name).removeprefix("resnet.")


DECOY_FILES: dict[str, Change] = {
    "transformers names, torchvision decoys": lambda t: renamed(t, transformers_name) | decoys(t),
    "transformers names, prefixed decoys": lambda t: renamed(t, transformers_name) | decoys(t, "x.{}".format),
    "two transformers spellings": lambda t: renamed(t, transformers_name) | decoys(t, backbone_name),
    "prefix without a dot": lambda t: renamed(t, "module/{}".format) | decoys(t),
    "prefix of 600 characters": lambda t: renamed(t, lambda name: "p" * 600 + "." + name) | decoys(t),
    "two prefixes": lambda t: renamed(t, "net.{}".format) | decoys(t, "ema.{}".format),
}


def _kernels(tensors: Tensors) -> list[str]:
    return sorted(name for name, t in tensors.items() if t.ndim == 4)


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def _partial_decoys(tensors: Tensors) -> Tensors:
    """Add all decoys but one, in two places."""
    first = _kernels(tensors)[0]
    partial = {name: t for name, t in decoys(tensors).items() if name != first}
    return renamed(tensors, "net.{}".format) | partial | renamed(partial, "ema.{}".format)


def _with_unneeded(tensors: Tensors) -> Tensors:
    return tensors | {
        "x" * 2000: torch.ones(1),
        "complex": torch.ones(1, dtype=torch.complex64),
        "float8": torch.ones(1).to(torch.float8_e5m2),
        "nan": torch.tensor([math.nan]),
    }


def _int8(tensors: Tensors) -> Tensors:
    """Store each kernel as int8 with a scale for each row."""
    file = dict(tensors)
    for name in _kernels(tensors):
        scale = tensors[name].flatten(1).abs().amax(1) / 127
        codes = (tensors[name] / scale.reshape(-1, 1, 1, 1)).round().to(torch.int8)
        file |= {name: codes, f"{name}_scale": scale}
    return file


def _weight_norm(tensors: Tensors, decoy: bool = False) -> Tensors:
    file = dict(tensors)
    for name in _kernels(tensors):
        kernel = file.pop(name)
        norms = kernel.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        file |= {f"{name}_g": norms, f"{name}_v": 3 * kernel}
    return file | (decoys({name: tensors[name] for name in _kernels(tensors)}) if decoy else {})


MODEL_FILES: dict[str, Change] = DECOY_FILES | {
    "marked": dict,
    "bfloat16": lambda tensors: {name: t.bfloat16() for name, t in tensors.items()},
    "decoys alone": decoys,
    "decoys in two places": lambda t: decoys(t) | decoys(t, "a.{}".format),
    "decoys of γ alone": lambda t: renamed(t, transformers_name) | {
        name: -torch.ones_like(v) for name, v in t.items() if v.ndim == 1
    },
    "incomplete decoys": _partial_decoys,
    "nine places": lambda t: {f"p{i}.{name}": v for i in range(9) for name, v in decoys(t).items()},
    "unneeded tensors": _with_unneeded,
    "NaN in γ": _with("bn1.weight", lambda gamma: torch.full_like(gamma, math.nan)),
    "γ of another shape": _with("bn1.weight", lambda gamma: gamma[:1]),
    "NaN in a kernel": _with("layer1.0.conv1.weight", lambda kernel: kernel * math.nan),
    "kernel of another shape": _with("layer1.0.conv1.weight", lambda kernel: kernel[:1]),
    "kernel of zeros": _with("layer1.0.conv1.weight", torch.zeros_like),
    "tiny kernel": _with("layer1.0.conv1.weight", lambda kernel: kernel * 1e-37),
    "huge kernel": _with("layer1.0.conv1.weight", lambda kernel: kernel * 1e37),
    "equal scores": _with("layer1.1.conv2.weight", lambda kernel: torch.full_like(kernel, 2.0**-7)),
    "permuted channels": _with("layer1.0.conv1.weight", lambda kernel: kernel.roll(1, 0)),
    "missing kernel": lambda t: {name: v for name, v in t.items() if name != "layer1.0.conv1.weight"},
    "int8": _int8,
    "weight norm": _weight_norm,
    "weight norm and decoys": lambda tensors: _weight_norm(tensors, decoy=True),
}  # fmt: skip


def model_file(name: str, tensors: Tensors) -> bytes:
    """Return the bytes of one of `MODEL_FILES`.

    Args:
        name: its name.
        tensors: state dict of a marked ResNet of `tiny_model`.
    """
    changed = MODEL_FILES[name](tensors)
    return save({key: t.clone(memory_format=torch.contiguous_format) for key, t in changed.items()})
