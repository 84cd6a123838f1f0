"""Every registered attack runs, repeats, costs what it reports, and leaves the marked model unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mtlsign.attacks import ATTACKS, AttackDivergedError
from mtlsign.attacks.registry import RENAMED, RENAMED_PARAMETERS
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.conftest import TINY
from tests.unit.attacks.helpers import Maker, run

#: Parameters with which an attack takes well under a second on the tiny network.
QUICK = {
    "overwrite": "epochs=1,n=128,images=16", "spoil": "steps=3,batch=16",
    "decorrelate": "steps=2,codes=32,batch=16", "reinit_early_layers": "steps=3,batch=16",
    "ambiguity_trained_head": "steps=5,hidden=4", "average_models": "copies=1",
    "mix_input": "kind=negate", "turn_input": "kind=transposed",
    "prune_to_accuracy_drop": "points=50", "tune": "steps=3,batch=16", "relearn": "epochs=1,batch=16",
    "neural_cleanse": "steps=1,epochs=1,batch=16", "merge_models": "epochs=1,batch=16,weight=0.3",
}  # fmt: skip
#: Attacks on networks of texts, on transformers, on detectors and on linear bottlenecks.
NOT_FOR_IMAGES = {
    "mix_linear_channels",
    "recurrent_symmetries",
    "permute_vocabulary",
    "attention_symmetries",
    "rotate_stream",
    "reorder_joint_matrices",
    "lora_tune",
    "prune_activations",
    "drop_layers",
    "ftdet",
}
#: Attacks on models with outputs besides the task's classes.
NOT_FOR_CLASSES = {"remove_outputs"}
TOOLBOX = ("extract", "adversarial_training", "label_smoothing", "regularize", "shift_weights")
TUNING = (
    *("ftll", "ftal", "rtll", "rtal", "retrain", "transfer", "fine_prune", "fine_prune_channels"),
    *TOOLBOX,
)
TRAINING = (
    *(
        *TUNING,
        "neural_cleanse",
        "tune",
        "relearn",
        "overwrite",
        "spoil",
        "decorrelate",
        "reinit_early_layers",
        "merge_models",
    ),
    "ambiguity_trained_head",
)


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - NOT_FOR_IMAGES - NOT_FOR_CLASSES))
def test_attack_runs_twice_alike_and_leaves_marked_model_unchanged(
    name: str, marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    parameters = QUICK.get(name, "epochs=1,batch=16" if name in TUNING else "")
    text = f"{name}:{parameters}" if parameters else name
    before = copy.deepcopy(marked_module.state_dict())
    others = [{n: t + 0.01 if t.is_floating_point() else t for n, t in before.items()}]
    rng_state = torch.random.get_rng_state()
    resources = {"key": key, "other_models": others, "public_base": others[0]}
    first = run(text, marked_module, tiny_task, seed=3, **resources)
    assert torch.equal(rng_state, torch.random.get_rng_state()), "the caller's generator moved"
    assert all(torch.equal(t, before[n]) for n, t in marked_module.state_dict().items())
    second = run(text, marked_module, tiny_task, seed=3, **resources)
    state = first.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in second.model.state_dict().items())
    assert not first.model.training and (first.steps, first.images) == (second.steps, second.images)
    changed = any(n not in state or not torch.equal(t, state[n]) for n, t in before.items())
    assert changed != (name in ("none", "ambiguity_trained_head", "rewrite_file", "preprocess_input"))
    assert (first.steps > 0) == (name in TRAINING) == (first.images > 0)
    verdict = verify(state, key.detector)
    assert verdict.status != "not_verifiable" and all(torch.isfinite(t).all() for t in state.values())


@pytest.mark.parametrize("text", ["ftal:lr=100,epochs=5,batch=16", "spoil:steps=20,lr=100,batch=16"])
def test_attack_with_infinite_loss_raises_diverged_error(
    text: str, marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    with torch.no_grad():
        marked_module.fc.bias[0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(AttackDivergedError, match="not finite"):
        run(text, marked_module, tiny_task, key=key)


def test_free_head_is_attacked_without_being_trained(
    tiny_task: Task, tiny_graph: dict[str, object], tiny_model: Maker, owner: Any
) -> None:
    import mtlsign

    model = tiny_model()
    options = TINY | {"head": "free", "hidden": 8, "features": "pooled"}
    options |= {"phase2.steps": 60, "phase2.lr": 0.02}
    done = mtlsign.embed(
        model, tiny_task, trained=True, identity=owner, architecture=tiny_graph,
        **{name: value for name, value in options.items() if name not in ("task", "model", "width")},
    )  # fmt: skip
    key = MTLSignKey(detector_for_kit(done.kit))
    head = key.detector.head_bytes()
    before = verify(model.state_dict(), key.detector).accuracy
    spoiled = run("spoil:steps=30,batch=16,lr=0.005", model, tiny_task, key=key)
    assert verify(spoiled.model.state_dict(), key.detector).accuracy < before - 0.1
    assert key.detector.head_bytes() == head, "the attacker trained the owner's head"
    run("decorrelate:steps=2,codes=32,batch=16,stages=3", model, tiny_task)


def test_renamed_names_lead_to_registered_attacks() -> None:
    assert set(RENAMED.values()) <= set(ATTACKS) and not set(RENAMED) & set(ATTACKS)
    assert set(RENAMED_PARAMETERS) == {"path"}
