"""Free changes of networks of texts: word vectors, the order of words, and the units of recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    NotApplicableError,
    TokenRenumbering,
)
from mtlsign.attacks.training import trainable_copy
from mtlsign.models.families.recurrent import RecurrentClassifier
from mtlsign.models.recurrent_layers import CANDIDATE_GATE, gate_count
from mtlsign.models.transformer import Transformer
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


def recurrent_symmetries(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Change the coordinates of the word vectors, and order and signs of the units.

    Word vectors are multiplied with a random invertible matrix and moved by a random vector. The signs of the
    last layer's units stay, because the network takes their maximum.

    Raises:
        NotApplicableError: the network is no recurrent classifier of this package.
    """
    if not isinstance(model, RecurrentClassifier):
        raise NotApplicableError("The attack needs an LSTM or GRU classifier.", field="model")
    attacked = trainable_copy(model)
    assert isinstance(attacked, RecurrentClassifier)
    generator = seeded_generator("mtlsign/attack/recurrent", seed)
    with torch.no_grad():
        _change_word_vectors(attacked, generator)
        _change_units(attacked, generator)
    return AttackOutcome(attacked.eval())


def permute_vocabulary(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Put the words into another order; a user of the model renumbers the tokenizer.

    The outputs of a language model keep their order, so that its function stays as it is. They get a matrix
    by themselves if they were tied to the token vectors.

    Raises:
        NotApplicableError: the network is none of this package's networks of texts.
    """
    if not isinstance(model, RecurrentClassifier | Transformer):
        raise NotApplicableError("The attack needs a network of texts of this package.", field="model")
    attacked = trainable_copy(model)
    assert isinstance(attacked, RecurrentClassifier | Transformer)
    if isinstance(attacked, Transformer):
        attacked.untie_outputs()
    words = attacked.embedding.weight
    numbers = torch.randperm(len(words) - 1, generator=seeded_generator("mtlsign/attack/vocabulary", seed))
    # numbers[old - 1] + 1 is the new number of a word; 0 remains the padding.
    order = torch.empty_like(numbers)
    order[numbers] = torch.arange(len(numbers))
    with torch.no_grad():
        words.copy_(torch.cat([words[:1], words[1:][order.to(words.device)]]))
    return AttackOutcome(attacked.eval(), input_transforms=(TokenRenumbering(tuple(numbers.tolist())),))


def random_invertible_matrix(size: int, generator: torch.Generator) -> Tensor:
    """Return a matrix with singular values from 1/2 to 2, float64 [size, size]."""
    left, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = 4 ** (torch.rand(size, generator=generator, dtype=torch.float64) - 0.5)
    product: Tensor = left @ torch.diag(values) @ right
    return product


def _change_word_vectors(model: RecurrentClassifier, generator: torch.Generator) -> None:
    rnn, vectors = model.encoder.rnn, model.embedding.weight
    matrix = random_invertible_matrix(vectors.shape[1], generator)
    offset = torch.randn(vectors.shape[1], generator=generator, dtype=torch.float64)
    vectors.copy_(vectors.double() @ matrix + offset)
    for suffix in ("", "_reverse")[: 1 + rnn.bidirectional]:
        weight = rnn.get_parameter(f"weight_ih_l0{suffix}")
        changed = weight.double() @ torch.linalg.inv(matrix).T
        weight.copy_(changed)
        rnn.get_parameter(f"bias_ih_l0{suffix}").sub_(changed @ offset)


def _change_units(model: RecurrentClassifier, generator: torch.Generator) -> None:
    rnn, last = model.encoder.rnn, model.encoder.rnn.num_layers - 1
    columns = torch.empty(0)
    for layer in range(rnn.num_layers):
        changes = []
        for suffix in ("", "_reverse")[: 1 + rnn.bidirectional]:
            order = torch.randperm(rnn.hidden_size, generator=generator)
            signs = torch.where(torch.rand(rnn.hidden_size, generator=generator) < 0.5, -1.0, 1.0)
            change = torch.eye(rnn.hidden_size)[:, order] * (1.0 if layer == last else signs)
            _reorder(rnn, f"l{layer}{suffix}", change, columns)
            changes.append(change)
        columns = torch.block_diag(*changes)
    width = model.fc.in_features // 2
    for start in (0, width):  # mean, then maximum
        part = model.fc.weight[:, start : start + width]
        part.copy_(part @ columns)


def _reorder(rnn: nn.LSTM | nn.GRU, name: str, change: Tensor, columns: Tensor) -> None:
    """Change one direction of one layer: h becomes h·change, with inputs that became x·columns."""
    gates, hidden = gate_count(rnn), rnn.hidden_size
    inputs, outputs = rnn.get_parameter(f"weight_ih_{name}"), rnn.get_parameter(f"weight_hh_{name}")
    if len(columns):
        inputs.copy_(inputs @ columns)
    outputs.copy_(outputs @ change)
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        values = rnn.get_parameter(f"{part}_{name}")
        blocks = values.reshape(gates, hidden, -1)
        changed = torch.stack(
            [(change if gate == CANDIDATE_GATE else change.abs()).T @ blocks[gate] for gate in range(gates)]
        )
        values.copy_(changed.reshape(values.shape))
