from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import text_task
from tests.unit.attacks.transformer_examples import KINDS, marked_transformer


@pytest.mark.parametrize("kind", KINDS)
def test_prune_activations_sets_ratio_of_each_row_to_zero(kind: str) -> None:
    model = marked_transformer(kind)[0]
    outcome = run("prune_activations:ratio=0.5,samples=40", model, text_task())
    state, before = outcome.model.state_dict(), model.state_dict()
    assert outcome.steps == 0
    for name, tensor in state.items():
        if name.startswith("blocks.") and tensor.dim() == 2:
            assert torch.equal((tensor == 0).sum(1), torch.full((len(tensor),), tensor.shape[1] // 2))
            assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])
        else:
            assert torch.equal(tensor, before[name])


def test_prune_activations_keeps_weights_of_large_inputs_of_real_tokens() -> None:
    model = marked_transformer("pre")[0]
    query = model.get_submodule("blocks.0.attention.query")
    inputs: list[torch.Tensor] = []
    handle = query.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    task = text_task()
    tokens = task.splits["attacker"].batch(torch.arange(32)).inputs
    with torch.no_grad():
        model(tokens)
    handle.remove()
    norms = inputs[0][tokens != 0].norm(dim=0)
    weight: torch.Tensor = query.weight  # type: ignore[assignment]
    threshold = (weight.abs() * norms).median(1, keepdim=True).values
    expected = (weight.abs() * norms > threshold) * weight
    pruned = run("prune_activations:ratio=0.5,samples=32", model, task).model
    assert torch.equal(pruned.get_submodule("blocks.0.attention.query").weight, expected)


def test_prune_activations_of_convolutions_is_not_applicable(
    marked_module: nn.Module, tiny_task: Task
) -> None:
    with pytest.raises(NotApplicableError, match="no linear layers"):
        run("prune_activations", marked_module, tiny_task)
