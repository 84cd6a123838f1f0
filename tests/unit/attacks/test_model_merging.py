from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import NotApplicableError
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import text_task
from tests.unit.attacks.transformer_examples import marked_transformer

RATES = {"training_lr": 0.002, "training_optimizer": "adam"}


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a public base near the network, without its outputs."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
        if not name.startswith("fc.")
    }


def test_merge_models_mixes_stolen_weights_with_tuned_copy() -> None:
    model, task = marked_transformer("pre")[0], text_task()
    half, other = (run(f"merge_models:weight={weight},epochs=1", model, task, **RATES) for weight in (0.5, 1))
    tuned = run("ftal:lr=full,epochs=1", model, task, **RATES)
    assert half.steps == tuned.steps > 0 and half.images == tuned.images
    states = (model.state_dict(), half.model.state_dict(), tuned.model.state_dict())
    for name, own in states[0].items():
        torch.testing.assert_close(states[1][name], (own + states[2][name]) / 2)
        torch.testing.assert_close(other.model.state_dict()[name], states[2][name])


def test_merge_models_adds_change_of_tuned_base() -> None:
    model, task = marked_transformer("pre")[0], text_task()
    base = base_of(model)
    text = "merge_models:start=base,mode=arithmetic/average,weight=0.5,epochs=1"
    from mtlsign.attacks import AttackerResources, parse_attacks

    resources = AttackerResources(public_base=base, training_lr=0.002, training_optimizer="adam")
    added, mean = (plan.run(model, task, resources, 0).model.state_dict() for plan in parse_attacks(text))
    own = model.state_dict()
    for name in base:  # (W + V) / 2 and W + (V - B) / 2 differ by (W - B) / 2
        torch.testing.assert_close(added[name] - mean[name], (own[name] - base[name]) / 2)
    assert any(not torch.equal(added[name], own[name]) for name in base)


@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_subtract_public_base_scales_change(keep: float) -> None:
    model, base = marked_transformer("pre")[0], base_of(marked_transformer("pre")[0])
    state = run(f"subtract_public_base:keep={keep}", model, text_task(), public_base=base).model.state_dict()
    for name, own in model.state_dict().items():
        expected = base[name] + keep * (own - base[name]) if name in base else own
        torch.testing.assert_close(state[name], expected)


def test_subtract_public_base_keeps_largest_entries_or_singular_values() -> None:
    model, base = marked_transformer("pre")[0], base_of(marked_transformer("pre")[0])
    own, name = model.state_dict(), "blocks.1.mlp.up.weight"
    change = own[name] - base[name]
    for mode in ("prune", "low_rank"):
        text = f"subtract_public_base:mode={mode},keep=0.25"
        state = run(text, model, text_task(), public_base=base).model.state_dict()
        remaining = state[name] - base[name]
        if mode == "prune":
            stays = remaining.abs() > 1e-7
            assert abs(float(stays.float().mean()) - 0.25) < 0.02
            assert change.abs()[stays].min() >= change.abs()[~stays].max()
        else:
            rank = int(0.25 * min(change.shape))
            values, original = torch.linalg.svdvals(remaining), torch.linalg.svdvals(change)
            torch.testing.assert_close(values[:rank], original[:rank], rtol=1e-3, atol=1e-5)
            assert float(values[rank:].max()) < 1e-5


@pytest.mark.parametrize("text", ["subtract_public_base", "merge_models:start=base"])
def test_attacks_without_fitting_base_are_not_applicable(
    text: str, marked_module: nn.Module, tiny_task: Task
) -> None:
    other = {"conv1.weight": marked_module.state_dict()["conv1.weight"], "fc.weight": torch.ones(3, 3)}
    for base, message in ((None, "needs a public base"), (other, "less than half")):
        with pytest.raises(NotApplicableError, match=message):
            run(text, marked_module, tiny_task, public_base=base)
