from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mtlsign.models.recurrent_layers import (
    PaddedBatch,
    PaddedGRU,
    PaddedLSTM,
    is_recurrent,
    step_inputs,
    weight_place,
)

LENGTHS = torch.tensor([7, 3, 1, 5])


def module(cell: type[nn.LSTM | nn.GRU], **options: bool) -> nn.LSTM | nn.GRU:
    torch.manual_seed(0)
    return cell(5, 4, 2, bidirectional=True, batch_first=True, **options)


def sequences() -> Tensor:
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_step_inputs_repeat_the_steps_of_pytorch(cell: type[nn.LSTM | nn.GRU]) -> None:
    rnn, x = module(cell), sequences()
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    read = step_inputs(rnn, packed)
    single_cell = nn.LSTMCell(8, 4) if cell is nn.LSTM else nn.GRUCell(8, 4)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    with torch.no_grad():
        for name in names:
            getattr(single_cell, name).copy_(getattr(rnn, f"{name}_l1_reverse"))
    # The vectors of one text in the reverse direction of layer 1 give the outputs of the network.
    start = int(LENGTHS[0])
    inputs = read["weight_ih_l1_reverse"][start : start + 3]
    hidden = read["weight_hh_l1_reverse"][start : start + 3]
    alone, _ = rnn(x[1:2, :3])
    assert torch.equal(hidden[0], torch.zeros(4))
    torch.testing.assert_close(hidden[1:], alone[0, 1:, 4:].flip(0))
    state: object = (torch.zeros(1, 4), torch.zeros(1, 4)) if cell is nn.LSTM else torch.zeros(1, 4)
    for step in range(3):
        state = single_cell(inputs[step : step + 1], state)  # type: ignore[arg-type]
        output = state[0] if isinstance(state, tuple) else state
        torch.testing.assert_close(output[0], alone[0, 2 - step, 4:])  # type: ignore[index]


@pytest.mark.parametrize("cell", [PaddedLSTM, PaddedGRU])
@pytest.mark.parametrize("options", [{}, {"bias": False}])
def test_padded_layers_repeat_outputs_and_gradients_of_packed_sequences(
    cell: type[PaddedLSTM | PaddedGRU], options: dict[str, bool]
) -> None:
    rnn, gradients = module(cell, **options), []
    packed = pack_padded_sequence(sequences(), LENGTHS, batch_first=True, enforce_sorted=False)
    expected = pad_packed_sequence(rnn(packed)[0], batch_first=True)[0]
    outputs = rnn(PaddedBatch(sequences(), LENGTHS))
    torch.testing.assert_close(outputs, expected)
    assert not outputs[2, 1:].any() and bool(outputs[2, 0].all())
    for result in (expected, outputs):
        rnn.zero_grad()
        (result * torch.arange(7.0)[:, None]).square().sum().backward()
        gradients.append([p.grad.clone() for p in rnn.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(rnn.parameters()))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_padded_layers_take_other_inputs_as_pytorch_does() -> None:
    rnn = module(PaddedLSTM)
    outputs, (hidden, _) = rnn(sequences())
    torch.testing.assert_close(outputs[:, -1, :4], hidden[2])


def test_step_inputs_are_equal_for_padded_and_packed_sequences() -> None:
    packed = pack_padded_sequence(sequences(), LENGTHS, batch_first=True, enforce_sorted=False)
    padded = step_inputs(module(PaddedGRU), PaddedBatch(sequences(), LENGTHS))
    for name, vectors in step_inputs(module(nn.GRU), packed).items():
        torch.testing.assert_close(padded[name], vectors)


def test_step_inputs_leave_out_padding() -> None:
    packed = pack_padded_sequence(sequences(), LENGTHS, batch_first=True, enforce_sorted=False)
    read = step_inputs(module(nn.LSTM), packed)
    assert len(read) == 8 and {len(vectors) for vectors in read.values()} == {int(LENGTHS.sum())}
    assert torch.equal(read["weight_ih_l0"][:7], sequences()[0])
    assert torch.equal(read["weight_ih_l0_reverse"][7:10], sequences()[1, :3].flip(0))


def test_step_inputs_accept_unbatched_and_time_first_inputs() -> None:
    first, rnn = sequences(), module(nn.GRU)
    rnn.batch_first = False
    expected = step_inputs(module(nn.GRU), first[:1])
    for inputs in (first[0], first[:1].transpose(0, 1)):
        for name, vectors in step_inputs(rnn, inputs).items():
            torch.testing.assert_close(vectors, expected[name])


def test_weight_place_of_names() -> None:
    place = weight_place("weight_hh_l3_reverse")
    assert (place.layer, place.is_reverse, place.reads_outputs) == (3, True, True)
    with pytest.raises(ValueError, match="no matrix"):
        weight_place("bias_hh_l0")


def test_is_recurrent_refuses_projections_and_plain_cells() -> None:
    assert is_recurrent(nn.LSTM(3, 4)) and is_recurrent(nn.GRU(3, 4))
    assert not is_recurrent(nn.LSTM(3, 4, proj_size=2)) and not is_recurrent(nn.RNN(3, 4))
