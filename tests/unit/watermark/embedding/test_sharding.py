"""Sharded training (FSDP2) of two processes: weights and checkpoints equal those of replicas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

import mtlsign
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import SettingsError
from mtlsign.models.architectures import build
from mtlsign.models.loading import cpu_state
from mtlsign.watermark.embedding.memory import estimate_memory
from mtlsign.watermark.embedding.phase1 import train_clean_model
from mtlsign.watermark.embedding.phase2 import embed_watermark
from mtlsign.watermark.embedding.sharding import ShardedNetwork, is_sharded
from mtlsign.watermark.embedding.worker import SingleProcessContext, sum_over_group
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import OwnerKit, detector_for_kit
from tests.unit.attacks.text_examples import OPTIONS, text_task
from tests.unit.attacks.transformer_examples import architecture

STEPS = {"phase1.epochs": 2, "phase2.steps": 60, "phase1.batch": 32, "phase2.batch": 32, "phase2.lr": 0.005}
#: Local parts of all tensors have a multiple of 16 numbers, the width of the vector units of AVX-512. The
#: fused kernel of Adam rounds the remaining numbers of a tensor in another way.
WIDE = {"embedding": 32, "head_size": 16, "inner": 64, "classes": 3}


class GroupWorker(SingleProcessContext):
    """Worker context of one process of a group."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.states: list[dict[str, Any]] = []
        self.rows: list[Any] = []
        super().__init__(
            on_progress=self.rows.append, on_checkpoint=lambda s: self.states.append(copy.deepcopy(s)),
            state=state,
        )  # fmt: skip
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0  # type: ignore[misc]
        self.world_size = distributed.get_world_size() if distributed.is_initialized() else 1  # type: ignore[misc]

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        sum_over_group(tensors)


def settings(**options: Any) -> EmbedSettings:
    values = OPTIONS | STEPS | {"task": "custom", "model": "transformer"} | options
    return EmbedSettings.of(values).with_defaults()


def fields() -> dict[str, object]:
    return architecture("rms") | WIDE


def train(rank: int, folder: str, kit: OwnerKit) -> None:
    """Run both phases as one of two processes with replicas and with shards, and write the results."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for sharding in ("none", "fsdp"):
        torch.manual_seed(0)
        model, values = build(fields()), settings(sharding=sharding)
        first = GroupWorker()
        rows = train_clean_model(model, text_task(), values, first)
        clean = cpu_state(model)
        model = build(fields())
        model.load_state_dict(clean)
        second = GroupWorker()
        marked_rows, measured = embed_watermark(model, text_task(), detector_for_kit(kit), values, second)
        held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        results[sharding] = {
            "clean": clean, "marked": cpu_state(model), "measured": measured, "held": held,
            "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in (*rows, *marked_rows)],
            "states": (first.states, second.states),
        }  # fmt: skip
    # A checkpoint of replicas is continued with shards.
    states = copy.deepcopy(results["none"]["states"])
    model, values = build(fields()), settings(sharding="fsdp")
    train_clean_model(model, text_task(), values, GroupWorker(states[0][0]))
    results["resumed clean"] = cpu_state(model)
    model = build(fields())
    model.load_state_dict(results["none"]["clean"])
    embed_watermark(model, text_task(), detector_for_kit(kit), values, GroupWorker(states[1][0]))
    results["resumed marked"] = cpu_state(model)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sharding")
    marked = mtlsign.embed(
        build(fields()), text_task(), identity=Identity.generate(), architecture=fields(),
        **OPTIONS | {"phase1.epochs": 1, "phase2.steps": 1},
    )  # fmt: skip
    multiprocessing.spawn(train, (str(folder), marked.kit), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("phase", ["clean", "marked"])
def test_sharded_training_ends_with_the_weights_of_replicas(results: Any, phase: str) -> None:
    replicas, shards = (results[sharding][phase] for sharding in ("none", "fsdp"))
    assert replicas.keys() == shards.keys()
    assert [name for name, t in replicas.items() if not torch.equal(t, shards[name])] == []
    assert results["none"]["held"] > 1.9 * results["fsdp"]["held"]


def test_sharded_training_has_equal_metrics(results: Any) -> None:
    replicas, shards = results["none"], results["fsdp"]
    assert replicas["measured"] == shards["measured"] and shards["rows"][-1]["wm_accuracy"] > 0.9
    for one, two in zip(replicas["rows"], shards["rows"], strict=True):
        assert one.keys() == two.keys()
        assert all(two[key] == (pytest.approx(v) if type(v) is float else v) for key, v in one.items())


def test_checkpoint_of_replicas_is_equal_to_that_of_shards_and_continued(results: Any) -> None:
    for one, two in zip(results["none"]["states"], results["fsdp"]["states"], strict=True):
        for a, b in zip(one, two, strict=True):
            assert all(torch.equal(t, b["model"][n]) for n, t in a["model"].items())
            moments = [x["optimizer"]["state"] for x in (a, b)]
            for number, entries in moments[0].items():
                for key, value in entries.items():
                    assert torch.equal(value, moments[1][number][key]), (number, key)
    for phase in ("clean", "marked"):
        resumed = results[f"resumed {phase}"]
        assert all(torch.equal(t, resumed[n]) for n, t in results["none"][phase].items())


@pytest.mark.parametrize(
    "options", [{"lambda2": 1.0}, {"adapter": "x"}, {"phase2.distillation": 0, "phase2.task_loss": 0}]
)
def test_settings_that_need_the_whole_network_are_refused(options: dict[str, Any]) -> None:
    worker = SingleProcessContext()
    assert not is_sharded(settings(sharding="fsdp", **options), worker)
    worker.world_size = 2  # type: ignore[misc]
    assert not is_sharded(settings(**options), worker)
    with pytest.raises(SettingsError, match=r"sharding: A sharded network"):
        is_sharded(settings(sharding="fsdp", **options), worker)


def test_whole_tensors_of_uneven_parts_are_gathered(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 5)), torch.nn.Linear(5, 1))
        state = cpu_state(model)
        sharded = ShardedNetwork(model)
        optimizer = torch.optim.Adam(sharded.local.values(), lr=0.1)
        model(torch.ones(2, 3)).sum().backward()
        sharded.pull_gradients()
        optimizer.step()
        assert not torch.equal(cpu_state(model)["1.weight"], state["1.weight"])
        sharded.load(state)
        assert all(torch.equal(t, state[n]) for n, t in cpu_state(model).items())
        whole = sharded.whole_optimizer_state(optimizer)
        sharded.load_optimizer_state(optimizer, whole)
        assert whole["state"][0]["exp_avg"].shape == (5, 3)
    finally:
        distributed.destroy_process_group()


def test_network_with_batch_norms_is_refused() -> None:
    with pytest.raises(SettingsError, match="batch norms"):
        ShardedNetwork(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)))


def test_estimated_memory_of_shards_is_smaller_than_that_of_replicas() -> None:
    wide = fields() | {"embedding": 256, "inner": 1024, "layers": 8}
    spec = text_task().input_spec
    replicas, shards = (
        estimate_memory(settings(sharding=sharding), wide, spec, world=4) for sharding in ("none", "fsdp")
    )
    assert replicas is not None and shards is not None
    parameters = sum(p.numel() for p in build(wide).parameters())
    assert replicas.phase1 > shards.phase1 > 4 * 3 * parameters  # the first worker's checkpoint
    assert 4 * parameters < replicas.phase2 - shards.phase2 < replicas.phase1
    alone = estimate_memory(settings(sharding="fsdp"), wide, spec, world=1)
    assert alone == estimate_memory(settings(), wide, spec, world=1)
