"""Changes of a torchvision ResNet (basic blocks) that leave its function alone: what a thief may use freely.

Each takes and returns a state dict. `attacks/` will grow out of these.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

State = dict[str, Tensor]


def _norms(state: State) -> list[str]:
    return [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]


def _random(n: int, generator: torch.Generator) -> Tensor:
    return torch.exp(0.7 * torch.randn(n, generator=generator))


def batch_norm_gauge(state: State, generator: torch.Generator, eps: float = 1e-5) -> State:
    """(γ, σ²) → (aγ, a²σ²) and (μ, β) → (μ + t, β + γt/σ) with random a > 0 and t, exact with ε."""
    out = dict(state)
    for bn in _norms(state):
        gamma, beta = state[f"{bn}.weight"], state[f"{bn}.bias"]
        mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        a, t = _random(len(gamma), generator), torch.randn(len(gamma), generator=generator)
        out[f"{bn}.bias"] = beta + gamma * t / (var + eps).sqrt()
        out[f"{bn}.running_mean"] = mean + t
        out[f"{bn}.weight"], out[f"{bn}.running_var"] = a * gamma, a**2 * (var + eps) - eps
    return out


def fold(state: State, eps: float = 1e-5) -> State:
    """Batch norms folded into their convolutions, which get biases; no batch norm is left."""
    out = dict(state)
    for bn in _norms(state):
        conv = re.sub(r"bn(\d)$", r"conv\1", bn) if "downsample" not in bn else bn[:-1] + "0"
        scale = state[f"{bn}.weight"] / (state[f"{bn}.running_var"] + eps).sqrt()
        out[f"{conv}.weight"] = state[f"{conv}.weight"] * scale[:, None, None, None]
        out[f"{conv}.bias"] = state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            out.pop(f"{bn}.{part}", None)
    return out


def scale_inner(state: State, generator: torch.Generator) -> State:
    """Inner channels of each block times a > 0 at its first norm, divided out of its second convolution."""
    out = dict(state)
    for name in [n for n in state if re.fullmatch(r"layer\d\.\d+\.bn1\.weight", n)]:
        block = name.removesuffix(".bn1.weight")
        a = _random(len(state[name]), generator)
        for part in ("weight", "bias"):
            out[f"{block}.bn1.{part}"] = out[f"{block}.bn1.{part}"] * a
        out[f"{block}.conv2.weight"] = out[f"{block}.conv2.weight"] / a[None, :, None, None]
    return out


def scale_stream(state: State, generator: torch.Generator) -> State:
    """Stage one's residual stream times a > 0 per channel at its producers, divided out of its consumers."""
    out = dict(state)
    a = _random(len(state["bn1.weight"]), generator)
    producers = [
        "bn1",
        *(n.removesuffix(".weight") for n in state if re.fullmatch(r"layer1\.\d+\.bn2\.weight", n)),
    ]
    consumers = [n for n in state if re.fullmatch(r"layer1\.\d+\.conv1\.weight", n)]
    consumers += [n for n in ("layer2.0.conv1.weight", "layer2.0.downsample.0.weight") if n in state]
    for bn in producers:
        for part in ("weight", "bias"):
            out[f"{bn}.{part}"] = out[f"{bn}.{part}"] * a
    for conv in consumers:
        out[conv] = out[conv] / a[None, :, None, None]
    return out
