"""Changes of the residual stream of any network with norms before its sub-layers, by names of its tensors.

The stream is described by `mtlsign.models.residual_stream`, which recognises the parts of other libraries'
networks, such as a vision transformer of timm. A network with stages of several widths, such as a Swin
transformer, has one turn for each of them. Callers check that the function is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from mtlsign.attacks.base import NotApplicableError
from mtlsign.models.attention_layers import is_row_norm
from mtlsign.models.residual_stream import ResidualStream
from mtlsign.models.stream_stages import StreamStage
from mtlsign.models.taps import last_layer

#: A gain below this share of the largest one cannot be moved into a matrix and out of an offset.
_SMALLEST_GAIN = 1e-4


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
    if stream.stages:
        _turn_stages(model, stream, generator)
        return
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


def _turn_stages(model: nn.Module, stream: ResidualStream, generator: Generator) -> None:
    """Turn every stage of a stream, in place; the common sign of a stage is random as well.

    Offsets of norms stay in them, because padded positions of a window pass none. A stage that begins with a
    norm is permuted, because the gains of this norm belong to single numbers.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    outputs = _gain_of_outputs(model, stream)
    gains = dict(stream.gains) | outputs
    device = next(model.parameters()).device
    with torch.no_grad():
        _move_gains_out_of_offsets(parameters, gains)
        for stage in stream.stages:
            turn = _turn_of_stage(stage, generator, keeps_mean=stream.subtracts_mean).to(device)
            if stage.first_norm is None:
                _write([parameters[name] for name in stage.sources], parameters, stage.sources, turn)
            else:
                order = turn.abs().argmax(1)
                for name in stage.sources:
                    for part in (name, _bias(name)):
                        if part in parameters:
                            parameters[part].copy_(parameters[part][order])
                for part in (f"{stage.first_norm}.weight", f"{stage.first_norm}.bias"):
                    if part in parameters:
                        parameters[part].copy_(turn @ parameters[part].double())
            writers = sorted(stage.writers)
            _write([parameters[name] for name in writers], parameters, writers, turn)
            last = outputs if stage is stream.stages[-1] else {}
            for name in (*sorted(stage.readers), *last):
                _read(parameters[name], turn)
            for norm in {gains[name] for name in (*stage.readers, *last)}:
                if _bias(norm) in parameters:
                    _read(parameters[_bias(norm)][None], turn)


def _turn_of_stage(stage: StreamStage, generator: Generator, *, keeps_mean: bool) -> Tensor:
    """Return a random orthogonal matrix of a stage, float64 [size, size]: a permutation behind a norm."""
    sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
    if stage.first_norm is not None:
        order = torch.randperm(stage.size, generator=generator)
        return sign * torch.eye(stage.size, dtype=torch.float64)[order]
    return sign * orthogonal_matrix(stage.size, generator, keeps_mean=keeps_mean)


def _read(matrix: Tensor, turn: Tensor) -> None:
    """Turn the inputs [out, m * size] of a matrix, each of m vectors by itself, in place."""
    vectors = matrix.double().reshape(-1, len(turn))
    matrix.copy_((vectors @ turn.T).reshape(matrix.shape))


def _write(
    matrices: Sequence[Tensor], parameters: dict[str, Tensor], names: Sequence[str], turn: Tensor
) -> None:
    """Turn the outputs of matrices or kernels [size, ...] and their biases, in place."""
    for matrix, name in zip(matrices, names, strict=True):
        matrix.copy_((turn @ matrix.double().flatten(1)).reshape(matrix.shape))
        if _bias(name) in parameters:
            parameters[_bias(name)].copy_(turn @ parameters[_bias(name)].double())


def _move_gains_out_of_offsets(parameters: dict[str, Tensor], gains: dict[str, str]) -> None:
    """Move gains of norms into the matrices after them; the norms keep offsets that give the same outputs.

    Raises:
        NotApplicableError: a gain is too small.
    """
    for weight, gain in gains.items():
        parameters[weight].mul_(parameters[gain])
    for gain in set(gains.values()):
        own = parameters[gain]
        if float(own.abs().min()) < _SMALLEST_GAIN * float(own.abs().max()):
            raise NotApplicableError("A gain of a norm is nearly 0.", field="model")
        if _bias(gain) in parameters:
            parameters[_bias(gain)].div_(own)
        own.fill_(1)


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
        model: the network, whose blocks are numbered members of one `nn.Sequential` or `nn.ModuleList`, or of
            one for each stage.
        stream: its residual stream.
        generator: source of the weights.
        place: number of the new block, counted over all stages; it belongs to the stage of the block that
            it follows.

    Raises:
        NotApplicableError: there is no such list of blocks, or it is shorter than `place`.
    """
    stages = list(stream.parts)
    while len(stages) > 1 and place > len(stages[0].attentions):
        place -= len(stages.pop(0).attentions)
    names = [layer.module for layer in stages[0].attentions]
    prefix, number = _first_block(model, names)
    blocks = model.get_submodule(prefix) if number is not None else None
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or number is None or place > len(blocks):
        raise NotApplicableError(
            "The attack needs norms before sub-layers, and a list of at least as many blocks as the place.",
            field="model",
        )
    prefix = f"{prefix}.{number}."
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


def _first_block(model: nn.Module, modules: Sequence[str]) -> tuple[str, int | None]:
    """Return the list of the blocks that modules belong to, and the first one's number; None without."""
    words = [name.split(".") for name in modules]
    for depth in range(1, min(map(len, words)) - 1):
        lists = {".".join(own[: -depth - 1]) for own in words}
        number = words[0][-depth - 1]
        if len(lists) == 1 and number.isdecimal():
            return lists.pop(), int(number)
    return "", None


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _gain_of_outputs(model: nn.Module, stream: ResidualStream) -> dict[str, str]:
    """Return the last linear layer's matrix and the gain of the last norm, if nothing else reads it."""
    head, size = last_layer(model), stream.parts[-1].size
    weight, used = f"{head}.weight", set(stream.gains.values())
    norms = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if is_row_norm(module) and module.get_parameter("weight").numel() == size
    ]
    module = model.get_submodule(head)
    if weight in stream.readers or not isinstance(module, nn.Linear) or module.in_features != size:
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
