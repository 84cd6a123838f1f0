from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import text_task
from tests.unit.attacks.transformer_examples import KINDS, marked_transformer


@pytest.mark.parametrize("kind", KINDS)
def test_lora_tune_changes_inner_matrices_by_the_rank_alone(kind: str) -> None:
    model, result, _ = marked_transformer(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (run("lora_tune:rank=2,lr=0.01,epochs=2", model, text_task(), seed=3) for _ in range(2))
    state = first.model.state_dict()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert all(torch.equal(t, state[n]) for n, t in second.model.state_dict().items())
    assert list(state) == list(before) and first.steps > 0 and first.images > 0
    for name, tensor in state.items():
        change = (tensor - before[name]).double()
        is_inner = name.startswith("blocks.") and name.endswith("weight") and tensor.dim() == 2
        assert bool(change.abs().max() > 0) == is_inner, name
        if is_inner:
            values = torch.linalg.svdvals(change)
            assert float(values[2:].max()) < 1e-4 * float(values[0])
    assert all(p.requires_grad for p in first.model.parameters())
    verdict = verify(state, MTLSignKey(detector_for_kit(result.kit)).detector)
    assert verdict.evidence_bits > 50


def test_lora_tune_learns_the_attackers_labels() -> None:
    model = marked_transformer("pre")[0]
    task = text_task()
    batch = task.splits["attacker"].batch(torch.arange(100))
    flipped = (batch.targets + 1) % 3
    task.splits["attacker"].labels[:100] = flipped  # type: ignore[attr-defined]
    tuned = run("lora_tune:rank=4,lr=0.02,epochs=10", model, task).model
    with torch.no_grad():
        before, after = (net(batch.inputs).argmax(1).eq(flipped).float().mean() for net in (model, tuned))
    assert after > before + 0.3


def test_lora_tune_of_convolutions_is_not_applicable(marked_module: nn.Module, tiny_task: Task) -> None:
    with pytest.raises(NotApplicableError, match="no linear layers"):
        run("lora_tune", marked_module, tiny_task)
