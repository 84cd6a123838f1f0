"""Recurrent layers of PyTorch: their matrices, gates, and the vectors that each matrix is multiplied with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

#: Rows of the gate that a change of a unit's sign negates; the other gates keep theirs.
CANDIDATE_GATE = 2
_WEIGHT = re.compile(r"weight_(ih|hh)_l([0-9]+)(_reverse)?")


@dataclass(frozen=True)
class RecurrentWeight:
    """Place of one matrix [gates * hidden, in] in a recurrent module.

    Attributes:
        layer: number of the layer, from 0.
        is_reverse: whether it belongs to the direction from the last token to the first.
        reads_outputs: whether it reads the unit's own outputs at the step before, instead of the inputs.
    """

    layer: int
    is_reverse: bool
    reads_outputs: bool


class PaddedBatch(NamedTuple):
    """Sequences of different lengths with padding at their ends.

    Attributes:
        vectors: float [n, L, d].
        lengths: int64 [n], at least 1, on the device of the vectors.
    """

    vectors: Tensor
    lengths: Tensor


class PaddedLSTM(nn.LSTM):
    """LSTM that takes a `PaddedBatch` as well; batches come first, without projections.

    PyTorch's backward pass of packed sequences on CPUs takes time that grows with the square of the length:
    a step of 128 texts of 200 words takes seven times as long as with padded ones, with equal results.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return outputs [n, L, directions * hidden], zeros after the last token, of a `PaddedBatch`.

        Other inputs are those of `torch.nn.LSTM`.
        """
        return _padded_outputs(self, input) if isinstance(input, PaddedBatch) else super().forward(input, hx)


class PaddedGRU(nn.GRU):
    """GRU that takes a `PaddedBatch` as well; see `PaddedLSTM`."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return outputs [n, L, directions * hidden], zeros after the last token, of a `PaddedBatch`.

        Other inputs are those of `torch.nn.GRU`.
        """
        return _padded_outputs(self, input) if isinstance(input, PaddedBatch) else super().forward(input, hx)


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is an LSTM or GRU without projections."""
    return isinstance(module, nn.LSTM | nn.GRU) and not module.proj_size


def gate_count(module: nn.Module) -> int:
    """Return the number of gates: 4 for an LSTM, 3 for a GRU."""
    return 4 if isinstance(module, nn.LSTM) else 3


def weight_place(leaf: str) -> RecurrentWeight:
    """Return the place of a matrix, from its name in the module such as `weight_ih_l0_reverse`.

    Raises:
        ValueError: the name is that of no matrix.
    """
    match = _WEIGHT.fullmatch(leaf)
    if match is None:
        raise ValueError(f"{leaf!r} is no matrix of a recurrent layer")
    return RecurrentWeight(int(match[2]), match[3] is not None, match[1] == "hh")


@torch.no_grad()
def step_inputs(
    module: nn.LSTM | nn.GRU, inputs: Tensor | PackedSequence | PaddedBatch
) -> Mapping[str, Tensor]:
    """Compute the vectors that every matrix is multiplied with, over all steps of a batch.

    Args:
        module: the recurrent module, in any mode; dropout between its layers is left out.
        inputs: as the module takes them; padding of a packed or padded batch is left out.

    Returns:
        Name of a matrix in the module -> [steps, in].
    """
    vectors, lengths = _padded(module, inputs)
    mask = torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None]
    turned = _reversal(mask, lengths)
    read: dict[str, Tensor] = {}
    for layer in range(module.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
            name = f"l{layer}{suffix}"
            own = _gather(vectors, turned) if suffix else vectors
            hidden = _single_layer(module, name, own.shape[2])(own)[0]
            before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
            read[f"weight_ih_{name}"], read[f"weight_hh_{name}"] = own[mask], before[mask]
            outputs.append(_gather(hidden, turned) if suffix else hidden)
        vectors = torch.cat(outputs, 2)
    return read


def _padded_outputs(module: PaddedLSTM | PaddedGRU, batch: PaddedBatch) -> Tensor:
    """Return the outputs of the last layer, [n, L, directions * hidden]; zeros after the last token."""
    vectors, lengths = batch
    if vectors.device.type != "cpu":  # cuDNN reads packed sequences at once
        packed = pack_padded_sequence(vectors, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(module(packed)[0], batch_first=True, total_length=vectors.shape[1])
        return outputs
    mask = torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None]
    turned = _reversal(mask, lengths)
    for layer in range(module.num_layers):
        directions = []
        for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
            inputs = _gather(vectors, turned) if suffix else vectors
            hidden = _one_direction(module, f"l{layer}{suffix}", inputs)
            directions.append(_gather(hidden, turned) if suffix else hidden)
        vectors = torch.cat(directions, 2)
    return vectors.masked_fill(~mask[:, :, None], 0.0)


def _one_direction(module: PaddedLSTM | PaddedGRU, name: str, inputs: Tensor) -> Tensor:
    """Return the outputs [n, L, hidden] of one direction of one layer, from zero states."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]
    weights = [getattr(module, f"{part}_{name}") for part in parts]
    state = inputs.new_zeros(1, len(inputs), module.hidden_size)
    options = (weights, module.bias, 1, 0.0, module.training, False, True)
    if isinstance(module, PaddedLSTM):
        return torch.lstm(inputs, (state, state), *options)[0]
    return torch.gru(inputs, state, *options)[0]


def _padded(module: nn.LSTM | nn.GRU, inputs: Tensor | PackedSequence | PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return inputs as [n, L, d] with the length of each sequence."""
    if isinstance(inputs, PaddedBatch):
        return inputs.vectors, inputs.lengths
    if isinstance(inputs, PackedSequence):
        vectors, lengths = pad_packed_sequence(inputs, batch_first=True)
        return vectors, lengths.to(vectors.device)
    if inputs.dim() == 2:
        inputs = inputs[None]
    elif not module.batch_first:
        inputs = inputs.transpose(0, 1)
    return inputs, torch.full((len(inputs),), inputs.shape[1], device=inputs.device)


def _reversal(mask: Tensor, lengths: Tensor) -> Tensor:
    """Return the positions that reverse the tokens of each sequence, and keep padding: int64 [n, L]."""
    positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return torch.where(mask, lengths[:, None] - 1 - positions, positions)


def _gather(vectors: Tensor, positions: Tensor) -> Tensor:
    return vectors.gather(1, positions[:, :, None].expand_as(vectors))


def _single_layer(module: nn.LSTM | nn.GRU, name: str, inputs: int) -> nn.LSTM | nn.GRU:
    """Return one direction of one layer as a separate module."""
    single = type(module)(inputs, module.hidden_size, bias=module.bias, batch_first=True)
    example = next(module.parameters())
    single = single.to(example.device, example.dtype)
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]:
        getattr(single, f"{part}_l0").copy_(getattr(module, f"{part}_{name}"))
    return single
