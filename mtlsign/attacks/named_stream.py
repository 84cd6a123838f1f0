"""Changes of the residual stream of any network with norms before its sub-layers, by names of its tensors.

The stream is described by `mtlsign.models.residual_stream`, which recognises the parts of other libraries'
networks, such as a vision transformer of timm. Callers check that the function is kept.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import Generator, Tensor, nn

from mtlsign.attacks.base import NotApplicableError
from mtlsign.models.attention_layers import is_row_norm
from mtlsign.models.residual_stream import ResidualStream
from mtlsign.models.taps import last_layer

_NUMBERED = re.compile(r"(.+?)\.([0-9]+)\.(.+)")


def turn_named_stream(model: nn.Module, stream: ResidualStream, generator: Generator) -> None:
    """Move gains of norms into the matrices after them, and turn the stream orthogonally, in place.

    Args:
        model: the network, whose last linear layer reads the stream after a norm.
        stream: its residual stream.
        generator: source of the matrix.

    Raises:
        NotApplicableError: a matrix that reads the stream has no norm before it, or no bias that could take
            that of the norm.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    gains = dict(stream.gains) | _gain_of_outputs(model, stream)
    if not stream.readers <= gains.keys():
        raise NotApplicableError("A matrix reads the residual stream without a norm.", field="model")
    with torch.no_grad():
        _move_gains(parameters, gains)
        matrix = orthogonal_matrix(stream.size, generator, keeps_mean=stream.subtracts_mean)
        matrix = matrix.to(next(model.parameters()).device)
        for name in gains:
            parameters[name].copy_(parameters[name].double() @ matrix.T)
        for name in (*stream.writers, *stream.sources):
            tensor, bias = parameters[name], parameters.get(_bias(name))
            if tensor.dim() == 2 and name in stream.writers:
                tensor.copy_(matrix @ tensor.double())
            elif tensor.dim() == 4:
                tensor.copy_((matrix @ tensor.double().flatten(1)).reshape(tensor.shape))
            else:
                tensor.copy_(tensor.double() @ matrix.T)
            if bias is not None:
                bias.copy_(matrix @ bias.double())


def orthogonal_matrix(size: int, generator: Generator, *, keeps_mean: bool) -> Tensor:
    """Return a random orthogonal matrix, float64 [size, size].

    Args:
        size: numbers of a vector.
        generator: source of random numbers.
        keeps_mean: whether the vector of ones stays as it is.
    """
    free = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if not keeps_mean:
        return torch.as_tensor(torch.linalg.qr(free)[0])
    basis = torch.linalg.qr(torch.cat([torch.ones(size, 1, dtype=torch.float64), free[:, 1:]], 1))[0]
    inner = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64))[0]
    turn = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner)
    return torch.as_tensor(basis @ turn @ basis.T)


def insert_named_block(model: nn.Module, stream: ResidualStream, generator: Generator, place: int) -> None:
    """Insert a block of random weights whose output matrices are zero, in place.

    Args:
        model: the network, whose blocks are numbered members of one `nn.Sequential` or `nn.ModuleList`.
        stream: its residual stream.
        generator: source of the weights.
        place: number of the new block.

    Raises:
        NotApplicableError: there is no such list of blocks, or it is shorter than `place`.
    """
    matches = [_NUMBERED.fullmatch(layer.module) for layer in stream.attentions]
    prefixes = {match[1] for match in matches if match is not None}
    blocks = model.get_submodule(prefixes.pop()) if len(prefixes) == 1 and all(matches) else None
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or place > len(blocks):
        raise NotApplicableError(
            "The attack needs norms before sub-layers, and a list of at least as many blocks as the place.",
            field="model",
        )
    first = matches[0]
    assert first is not None
    prefix, number = f"{first[1]}.{first[2]}.", int(first[2])
    writers = {name.removeprefix(prefix) for name in stream.writers if name.startswith(prefix)}
    block = copy.deepcopy(blocks[number])
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name in writers or name in {_bias(writer) for writer in writers}:
                parameter.zero_()
            elif parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.copy_(parameter.std() * noise)
    blocks.insert(place, block)


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _gain_of_outputs(model: nn.Module, stream: ResidualStream) -> dict[str, str]:
    """Return the last linear layer's matrix and the gain of the last norm, if nothing else reads it."""
    head = last_layer(model)
    weight, used = f"{head}.weight", set(stream.gains.values())
    norms = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if is_row_norm(module) and module.get_parameter("weight").numel() == stream.size
    ]
    module = model.get_submodule(head)
    if weight in stream.readers or not isinstance(module, nn.Linear) or module.in_features != stream.size:
        return {}
    return {weight: norms[-1]} if norms and norms[-1] not in used else {}


def _move_gains(parameters: dict[str, Tensor], gains: dict[str, str]) -> None:
    """Move gains and biases of norms into the matrices after them."""
    for weight, gain in gains.items():
        offset, bias = parameters.get(_bias(gain)), parameters.get(_bias(weight))
        if offset is not None:
            if bias is None:
                raise NotApplicableError("The matrices have no biases.", field="model")
            bias.add_(parameters[weight] @ offset)
        parameters[weight].mul_(parameters[gain])
    for gain in set(gains.values()):
        parameters[gain].fill_(1)
        if _bias(gain) in parameters:
            parameters[_bias(gain)].zero_()
