from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlsign.attacks.recurrent_symmetries import random_invertible_matrix, recurrent_symmetries
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.input_spec import TextSpec
from mtlsign.watermark.verification.alignment import RecurrentAligner, make_aligner
from mtlsign.watermark.verification.embedding_frame import embedding_frame
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import placeholder_bases

SPEC = TextSpec(vocabulary=200, embedding=12, length=9, classes=3)
TAPS = ("encoder",)
Tensors = dict[str, Tensor]


def network(name: str, layers: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build(architecture_for(name, **SPEC.architecture_fields, width=10) | {"layers": layers}).eval()


@cache
def aligned_network(name: str, layers: int) -> tuple[RecurrentAligner, Any, Reference]:
    """Return the aligner of a network, and the network with a little noise."""
    model, sample = network(name, layers), SPEC.sample()
    reference = make_reference(model, TAPS, sample, bases=placeholder_bases(model, TAPS, sample))
    suspect = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight, parameter in suspect.named_parameters():
            if weight != "embedding.weight":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * parameter.std() * noise)
    aligner = make_aligner(network(name, layers, seed=7), TAPS, reference, sample)
    assert isinstance(aligner, RecurrentAligner)
    return aligner, suspect, reference


def read(aligner: RecurrentAligner, model: Any) -> Tensors:
    names = {*aligner.layers, *aligner.further_names}
    state = {name: t for name, t in model.state_dict().items() if name in names}
    return dict(aligner.align(state).kernels)


def changed(model: Any) -> Any:
    return recurrent_symmetries(model, None, None, 3).model  # type: ignore[arg-type]


NETWORKS = pytest.mark.parametrize(
    ("name", "layers"), [("bilstm", 1), ("bilstm", 2), ("gru", 3), ("lstm", 1)]
)


@NETWORKS
def test_align_undoes_word_vectors_units_and_signs(name: str, layers: int) -> None:
    aligner, suspect, _ = aligned_network(name, layers)
    other = changed(suspect)
    tokens = torch.randint(0, 200, (8, 9))
    torch.testing.assert_close(other(tokens), suspect(tokens), atol=2e-5, rtol=1e-4)
    expected, aligned = read(aligner, suspect), read(aligner, other)
    assert expected.keys() == aligned.keys() == aligner.layers.keys()
    for weight, kernel in expected.items():
        torch.testing.assert_close(aligned[weight], kernel, atol=1e-4, rtol=1e-3, msg=weight)
        torch.testing.assert_close(kernel, suspect.state_dict()[weight], atol=5e-3, rtol=5e-3, msg=weight)


def test_align_undoes_exchanged_directions() -> None:
    aligner, suspect, _ = aligned_network("bilstm", 2)
    state = suspect.state_dict()
    exchanged = {}
    for weight in aligner.layers:
        other = weight[:-8] if weight.endswith("_reverse") else f"{weight}_reverse"
        kernel = state[other]
        exchanged[weight] = kernel.roll(10, 1) if "ih_l1" in weight else kernel
    exchanged["embedding.weight"] = state["embedding.weight"]
    aligned = aligner.align(exchanged).kernels
    for weight, kernel in read(aligner, suspect).items():
        torch.testing.assert_close(aligned[weight], kernel)


def test_align_leaves_out_further_units_and_joins_parts() -> None:
    aligner, suspect, _ = aligned_network("bilstm", 2)
    state = {name: t.clone() for name, t in suspect.state_dict().items() if name in aligner.layers}
    inputs, outputs = state["encoder.rnn.weight_ih_l0"], state["encoder.rnn.weight_hh_l0"]
    following = [f"encoder.rnn.weight_ih_l1{suffix}" for suffix in ("", "_reverse")]
    # Unit 3 becomes two equal units that share its columns; a further unit is read by nothing.
    order = [*range(10), 3]
    gates_in = inputs.reshape(4, 10, -1)[:, order]
    gates_out = outputs.reshape(4, 10, -1)[:, order]
    gates_out = torch.cat([gates_out, 0.3 * gates_out[:, :, 3:4]], 2)
    gates_out[:, :, 3] *= 0.7
    noise = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(5))
    gates_in = torch.cat([gates_in, 0.3 * noise], 1)
    gates_out = torch.cat([gates_out, torch.randn(4, 1, 11)], 1)
    gates_out = torch.cat([gates_out, torch.zeros(4, 12, 1)], 2)
    state["encoder.rnn.weight_ih_l0"] = gates_in.reshape(48, 12)
    state["encoder.rnn.weight_hh_l0"] = gates_out.reshape(48, 12)
    for weight in following:
        forward, backward = state[weight][:, :10], state[weight][:, 10:]
        part = torch.cat([forward, 0.4 * forward[:, 3:4], torch.zeros(40, 1)], 1)
        part[:, 3] *= 0.6
        state[weight] = torch.cat([part, backward], 1)
    state["embedding.weight"] = suspect.state_dict()["embedding.weight"]
    aligned = aligner.align(state).kernels
    for weight, kernel in read(aligner, suspect).items():
        torch.testing.assert_close(aligned[weight], kernel, atol=1e-5, rtol=1e-5, msg=weight)


def test_recognizes_descendants_only() -> None:
    aligner, suspect, _ = aligned_network("bilstm", 1)

    def tensors(model: Any) -> Tensors:
        return {n: t for n, t in model.state_dict().items() if n in {*aligner.layers, "embedding.weight"}}

    assert aligner.recognizes(tensors(changed(suspect)))
    assert not any(aligner.recognizes(tensors(network("bilstm", 1, seed=seed))) for seed in range(1, 4))
    assert not aligner.recognizes({})


def test_align_of_damaged_sizes_leaves_kernels_out() -> None:
    aligner, suspect, _ = aligned_network("bilstm", 1)
    state = {n: t for n, t in suspect.state_dict().items() if n in {*aligner.layers, "embedding.weight"}}
    without = {name: t for name, t in state.items() if name != "embedding.weight"}
    assert aligner.align(without).kernels == {}
    short = state | {"embedding.weight": state["embedding.weight"][:50]}
    assert aligner.align(short).kernels == {}
    other = state | {"encoder.rnn.weight_hh_l0": torch.ones(40, 7)}
    assert "encoder.rnn.weight_hh_l0" not in aligner.align(other).kernels
    assert "encoder.rnn.weight_ih_l0" in aligner.align(other).kernels


def test_frame_accepts_longer_word_vectors_that_mean_the_same() -> None:
    _, suspect, reference = aligned_network("lstm", 1)
    frame = embedding_frame(network("lstm", 1), TAPS, SPEC.sample(), reference.tensors)
    assert frame is not None and frame.readers == ("encoder.rnn.weight_ih_l0",)
    state = suspect.state_dict()
    vectors, reader = state["embedding.weight"].double(), state["encoder.rnn.weight_ih_l0"].double()
    matrix = random_invertible_matrix(15, torch.Generator().manual_seed(2))
    longer = torch.cat([vectors, torch.randn(len(vectors), 3, dtype=torch.float64)], 1) @ matrix
    wider = torch.cat([reader, torch.zeros(40, 3)], 1) @ torch.linalg.inv(matrix).T
    plain = frame.apply({"embedding.weight": vectors, frame.readers[0]: reader})
    mixed = frame.apply({"embedding.weight": longer, frame.readers[0]: wider})
    torch.testing.assert_close(mixed[frame.readers[0]], plain[frame.readers[0]])
