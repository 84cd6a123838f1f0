from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.attacks import AttackerResources, NotApplicableError
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.pruning_masks import accuracy
from mtlsign.models.recurrent_layers import gate_count
from mtlsign.models.taps import forward_to_taps
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import attacker_images, changed_parameters, run
from tests.unit.attacks.text_examples import text_network, text_task


def pruned_channels(model: nn.Module, name: str) -> set[int]:
    rows = model.get_submodule(name).weight.flatten(1).norm(dim=1)  # type: ignore[union-attr, operator]
    return set(torch.nonzero(rows == 0).flatten().tolist())


def test_prune_removes_ratio_and_fine_prune_keeps_zeros(marked_module: nn.Module, tiny_task: Task) -> None:
    def zeros(model: nn.Module) -> list[float]:
        return [float((p == 0).float().mean()) for p in model.parameters() if p.dim() > 1]

    assert all(abs(z - 0.5) < 0.02 for z in zeros(run("prune:ratio=0.5", marked_module, tiny_task).model))
    tuned = run("fine_prune:ratio=0.5,epochs=1,batch=16", marked_module, tiny_task).model
    assert all(abs(z - 0.5) < 0.02 for z in zeros(tuned))
    largest = marked_module.conv1.weight.abs().max()  # type: ignore[union-attr, operator]
    weight = run("prune:ratio=0.9", marked_module, tiny_task).model.conv1.weight  # type: ignore[union-attr]
    assert weight.abs().max() == largest  # type: ignore[operator]
    rows = run("prune_channels:ratio=0.25,by=norm", marked_module, tiny_task).model
    pruned = rows.layer1[0].conv1.weight.flatten(1).norm(dim=1) == 0  # type: ignore[index, union-attr, operator]
    assert int(pruned.sum()) == 2 and (rows.layer1[0].bn1.weight[pruned] == 0).all()  # type: ignore[index, union-attr]


def test_prune_to_accuracy_drop_stops_at_points(marked_module: nn.Module, tiny_task: Task) -> None:
    data = attacker_view(marked_module, tiny_task, AttackerResources(), 0)
    trained = run("ftal:lr=0.005,epochs=20,batch=8", marked_module, tiny_task).model
    assert accuracy(trained, data) > 0.5, "a model that guesses has no accuracy to lose"
    lossless = run("prune_to_accuracy_drop:points=0", trained, tiny_task).model
    assert accuracy(lossless, data) >= accuracy(trained, data)
    lossy = run("prune_to_accuracy_drop:points=100", trained, tiny_task).model
    zeros = [sum((p == 0).sum() for p in model.parameters()) for model in (lossy, lossless)]
    assert zeros[0] > zeros[1]


@torch.no_grad()
def test_prune_channels_removes_least_active(module: nn.Module, tiny_task: Task) -> None:
    x, activities = attacker_images(module, tiny_task), {}
    pairs = {"conv1": "bn1", "layer1.0.conv1": "layer1.0.bn1", "layer3.0.conv2": "layer3.0.bn2"}
    for conv, norm in pairs.items():
        hook = module.get_submodule(norm).register_forward_hook(
            lambda _, __, out, conv=conv: activities.update({conv: out.relu().mean((0, 2, 3))})
        )
        module(x)
        hook.remove()
    pruned = run("prune_channels:ratio=0.25", module, tiny_task).model
    for conv, activity in activities.items():
        assert pruned_channels(pruned, conv) == set(activity.argsort()[: len(activity) // 4].tolist()), conv
    by_norm = run("prune_channels:ratio=0.25,by=norm", module, tiny_task).model
    norms = module.layer1[0].conv1.weight.flatten(1).norm(dim=1)  # type: ignore[index, union-attr, operator]
    assert pruned_channels(by_norm, "layer1.0.conv1") == set(norms.argsort()[:2].tolist())


def test_fine_prune_channels_keeps_pruned_channels_and_tunes_others(
    module: nn.Module, tiny_task: Task
) -> None:
    pruned = run("prune_channels:ratio=0.25", module, tiny_task).model
    tuned = run("fine_prune_channels:ratio=0.25,epochs=1", module, tiny_task).model
    for name in ("conv1", "layer1.0.conv1", "layer3.0.conv2"):
        assert pruned_channels(tuned, name) == pruned_channels(pruned, name) != set(), name
    assert "conv1.weight" in changed_parameters(pruned, tuned)


@pytest.mark.parametrize(
    "text",
    [
        "prune:ratio=0.3",
        "prune_channels:ratio=0.25",
        "prune_to_accuracy_drop:points=100",
        "noise",
        "average_models",
    ],
)
def test_recalibrated_statistics_are_those_of_attacker_images(
    text: str, module: nn.Module, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlsign.attacks.pruning.RATIOS", (0.1,))
    state = module.state_dict()
    others = [{n: t * 1.1 if t.is_floating_point() else t for n, t in state.items()}]
    x, join = attacker_images(module, tiny_task), "," if ":" in text else ":"
    model = run(f"{text}{join}bn=recalibrated", module, tiny_task, other_models=others).model
    with torch.no_grad():
        out = model.conv1(x)  # type: ignore[operator]
    norm = model.bn1
    assert torch.allclose(norm.running_mean, out.mean((0, 2, 3)), atol=1e-5)  # type: ignore[arg-type, union-attr]
    assert torch.allclose(norm.running_var, out.var((0, 2, 3)), rtol=1e-3)  # type: ignore[arg-type, union-attr]
    if text != "average_models":
        unchanged = run(f"{text}{join}bn=kept", module, tiny_task).model.state_dict()
        assert all(torch.equal(unchanged[n], t) for n, t in state.items() if "running" in n)


def silent_units(model: nn.Module, suffix: str) -> set[int]:
    """Return the units of one direction of a first layer whose rows and biases are 0 in every gate."""
    module = model.get_submodule("encoder.rnn")
    parts = [
        module.get_parameter(f"{part}_l0{suffix}")
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    rows = torch.cat([p.reshape(len(p), -1) for p in parts], 1).reshape(gate_count(module), 16, -1)
    return set(torch.nonzero((rows == 0).all(2).all(0)).flatten().tolist())


@torch.no_grad()
@pytest.mark.parametrize("name", ["bilstm", "lstm", "gru"])
@pytest.mark.parametrize("by", ["activity", "norm"])
def test_prune_channels_silences_least_active_units(name: str, by: str) -> None:
    model, task = text_network(name), text_task()
    for suffix in ("", "_reverse")[: 1 + (name == "bilstm")]:
        model.get_parameter(f"encoder.rnn.weight_ih_l0{suffix}").reshape(-1, 16, 8)[:, [3, 7, 8, 12]] *= 0.01
        model.get_parameter(f"encoder.rnn.weight_hh_l0{suffix}").reshape(-1, 16, 16)[:, [3, 7, 8, 12]] *= 0.01
        for part in ("bias_ih", "bias_hh"):
            model.get_parameter(f"encoder.rnn.{part}_l0{suffix}").reshape(-1, 16)[:, [3, 7, 8, 12]] *= 0.01
    pruned = run(f"prune_channels:ratio=0.25,by={by}", model, task).model
    tokens = task.splits["test"].batch(torch.arange(20)).inputs
    (outputs,) = forward_to_taps(pruned, tokens, ["encoder"])
    for number, suffix in enumerate(("", "_reverse")[: 1 + (name == "bilstm")]):
        assert silent_units(pruned, suffix) == {3, 7, 8, 12}
        silent = torch.tensor([3, 7, 8, 12]) + 16 * number
        assert (outputs[:, :, silent] == 0).all() and (outputs != 0).any()


def test_fine_prune_channels_keeps_units_silent_and_tunes_others() -> None:
    model, task = text_network(), text_task()
    pruned = run("prune_channels:ratio=0.25", model, task).model
    tuned = run("fine_prune_channels:ratio=0.25,epochs=1,batch=16", model, task).model
    for suffix in ("", "_reverse"):
        assert silent_units(tuned, suffix) == silent_units(pruned, suffix)
        assert len(silent_units(tuned, suffix)) == 4
    assert "encoder.rnn.weight_ih_l0" in changed_parameters(pruned, tuned)


def test_prune_channels_of_linear_network_is_not_applicable(tiny_task: Task) -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 4)).eval()
    with pytest.raises(NotApplicableError, match="no recurrent layer"):
        run("prune_channels", dense, tiny_task)
