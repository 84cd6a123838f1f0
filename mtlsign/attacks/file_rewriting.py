"""Rewritten files: the same network under other names, in other layouts, or among further tensors.

Most forms leave every number that the network computes with; `half` and `int8` round the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.quantisation import quantise
from mtlsign.attacks.training import trainable_copy
from mtlsign.models.loading import cpu_state
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

Form = Literal[
    "prefix",
    "half",
    "names",
    "hwio",
    "ohwi",
    "flat",
    "weight_norm",
    "int8",
    "padded",
    "decoys",
    "extra",
    "lora",
    "anonymous",
    "exchanged",
    "factors",
]
State = dict[str, Tensor]

#: Rank of the product that `lora` stores separately.
_RANK = 4
_INT8_MAX = 127
#: Sizes of the tensors that `extra` adds.
_EXTRA_SIZES = ((64, 64), (32, 16, 3, 3), (64,))


def rewrite_file(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, *, form: Form = "names"
) -> AttackOutcome:
    """Save the model in another form; its user converts the file back.

    `prefix`, `names` and `anonymous` rename, the last one without any order, and `exchanged` gives tensors of
    one shape each other's names. `hwio`, `ohwi` and `flat` store
    kernels with other axes, `padded` gives 3x3 kernels a rim of zeros, `weight_norm`, `int8` and `lora` store
    a kernel as several tensors, `factors` makes two layers of each. `decoys` and `extra` add tensors that
    nothing uses.
    """
    generator, changed = seeded_generator("mtlsign/attack/file", seed), trainable_copy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if form == "half":
                parameter.copy_(parameter.half())
            elif form == "int8" and parameter.dim() > 1:
                parameter.copy_(quantise(parameter, 8))
    state = cpu_state(changed)
    tensors = _FORMS[form](state, generator)
    if tensors.keys() == state.keys() and all(_is_same(tensors[name], t) for name, t in state.items()):
        raise NotApplicableError(f"The model has no kernel for form={form}.", field="form")
    return AttackOutcome(changed, tensors=tensors)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _prefix(state: State, generator: Generator) -> State:
    return {f"network.module.{name}": tensor for name, tensor in state.items()}


def _half(state: State, generator: Generator) -> State:
    return {name: t.half() if t.is_floating_point() else t for name, t in state.items()}


def _names(state: State, generator: Generator) -> State:
    """Number the modules in their order; the last parts of the names stay."""
    modules = {name: index for index, name in enumerate(dict.fromkeys(n.rpartition(".")[0] for n in state))}
    return {
        f"blocks.{modules[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
        for name, tensor in state.items()
    }


def _of_kernels(change: Callable[[Tensor], Tensor]) -> Callable[[State, Generator], State]:
    """Return the form that changes every kernel of a convolution alone."""

    def rewritten(state: State, generator: Generator) -> State:
        return {name: change(t).contiguous() if t.dim() == 4 else t for name, t in state.items()}

    return rewritten


def _padded(kernel: Tensor) -> Tensor:
    return pad(kernel, (1, 1, 1, 1)) if tuple(kernel.shape[2:]) == (3, 3) else kernel


def _of_weights(
    parts: Callable[[Tensor, Generator], Mapping[str, Tensor]],
) -> Callable[[State, Generator], State]:
    """Return the form that stores every weight of two or more dimensions as several tensors."""

    def rewritten(state: State, generator: Generator) -> State:
        new: State = {}
        for name, tensor in state.items():
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and tensor.dim() > 1:
                new |= {f"{layer}.{suffix}": part for suffix, part in parts(tensor, generator).items()}
            else:
                new[name] = tensor
        return new

    return rewritten


def _weight_norm(weight: Tensor, generator: Generator) -> Mapping[str, Tensor]:
    norms = weight.flatten(1).norm(dim=1).reshape(-1, *([1] * (weight.dim() - 1)))
    scale = torch.exp(torch.randn(norms.shape, generator=generator))
    # A direction has no zeros; the magnitude of an empty row is 0.
    direction = torch.where(norms > 0, weight, torch.ones_like(weight))
    return {"weight_g": norms, "weight_v": direction * scale}


def _int8(weight: Tensor, generator: Generator) -> Mapping[str, Tensor]:
    scale = weight.flatten(1).abs().amax(1) / _INT8_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (weight / scale.reshape(-1, *([1] * (weight.dim() - 1)))).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}


def _lora(weight: Tensor, generator: Generator) -> Mapping[str, Tensor]:
    """Return W − B·A with A and B, whose product is as large as W."""
    rows = weight.flatten(1)
    rank = min(_RANK, *rows.shape)
    a = torch.randn((rank, rows.shape[1]), generator=generator)
    b = torch.randn((rows.shape[0], rank), generator=generator)
    b = b * (rows.norm() / (b @ a).norm())
    return {
        "weight": weight - (b @ a).reshape(weight.shape),
        "lora_A.weight": a.reshape(rank, *weight.shape[1:]),
        "lora_B.weight": b.reshape(len(rows), rank, *([1] * (weight.dim() - 2))),
    }


def _anonymous(state: State, generator: Generator) -> State:
    """Give each tensor a number without any order as its name."""
    numbers = torch.randperm(len(state), generator=generator).tolist()
    return {f"tensor_{number}": tensor for number, tensor in zip(numbers, state.values(), strict=True)}


def _exchanged(state: State, generator: Generator) -> State:
    """Give the tensors of each shape each other's names, all of them others where there are two or more."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(tuple(tensor.shape), []).append(name)
    exchanged: State = {}
    for group in names.values():
        order = [group[number] for number in torch.randperm(len(group), generator=generator).tolist()]
        exchanged |= {name: state[other] for name, other in zip(order, [*order[1:], *order[:1]], strict=True)}
    return {name: exchanged[name] for name in state}


def _factors(weight: Tensor, generator: Generator) -> Mapping[str, Tensor]:
    """Return two layers, one after the other, whose product is W; one of them is a random square matrix."""
    rows = weight.flatten(1).double()
    rank = min(rows.shape)
    mix = torch.randn((rank, rank), generator=generator, dtype=torch.float64)
    mix = torch.linalg.qr(mix).Q
    outer, inner = (mix, mix.T @ rows) if len(rows) == rank else (rows @ mix.T, mix)
    return {
        "0.weight": inner.to(weight.dtype).reshape(rank, *weight.shape[1:]),
        "1.weight": outer.to(weight.dtype).reshape(len(rows), rank, *([1] * (weight.dim() - 2))),
    }


def _decoys(state: State, generator: Generator) -> State:
    """Add random weights of the same shapes under another prefix."""
    decoys = {
        f"ema.{name}": torch.randn(t.shape, generator=generator) * t.std() if t.dim() > 1 else t
        for name, t in state.items()
    }
    return state | decoys


def _extra(state: State, generator: Generator) -> State:
    return state | {
        f"auxiliary.{index}.weight": torch.randn(size, generator=generator)
        for index, size in enumerate(_EXTRA_SIZES)
    }


_FORMS: Mapping[Form, Callable[[State, Generator], State]] = {
    "prefix": _prefix,
    "half": _half,
    "names": _names,
    "hwio": _of_kernels(lambda kernel: kernel.permute(2, 3, 1, 0)),
    "ohwi": _of_kernels(lambda kernel: kernel.permute(0, 2, 3, 1)),
    "flat": _of_kernels(lambda kernel: kernel.flatten(1)),
    "weight_norm": _of_weights(_weight_norm),
    "int8": _of_weights(_int8),
    "padded": _of_kernels(_padded),
    "decoys": _decoys,
    "extra": _extra,
    "lora": _of_weights(_lora),
    "anonymous": _anonymous,
    "exchanged": _exchanged,
    "factors": _of_weights(_factors),
}
