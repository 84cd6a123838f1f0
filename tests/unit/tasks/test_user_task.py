from __future__ import annotations

import random
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mtlsign.errors import DataError, ModelError
from mtlsign.tasks import SPLITS, from_loaders, from_tensors, load_task, loader_splits
from tests.unit.tasks.synthetic import Pixels, Stream, images, joined, task


def test_from_loaders_accepts_every_kind_of_loader() -> None:
    x, y = torch.rand(60, 2, 5, 4), torch.arange(60) % 3
    batches = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)]
    for train in (
        DataLoader(Pixels(), batch_size=8, shuffle=True),
        DataLoader(Pixels(), batch_size=None),
        Pixels(),
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), batch_size=8),
        batches,
    ):
        t = from_loaders({"train": train, "test": DataLoader(Stream(), batch_size=4)})
        assert (t.input_spec.channels, t.input_spec.height, t.input_spec.width, t.classes) == (2, 5, 4, 3)
        assert {part: t.size(part) for part in SPLITS} == {
            "train": 51,
            "inner": 5,
            "validation": 3,
            "attacker": 6,
            "test": 30,
        }
        batch = t.batch_at("train", 10, 3, augment=True)
        parts = joined(t.batch_at("train", 10, 3, augment=True, rank=r, world=2) for r in range(2))
        assert torch.equal(parts.inputs, batch.inputs) and torch.equal(parts.targets, batch.targets)
        assert batch.targets.dtype == torch.int64


def test_dataset_split_seeds_transforms_and_leaves_generators_unchanged() -> None:
    t = from_loaders({"train": Pixels(), "test": Pixels(9)})
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    first = t.batch_at("train", 10, 0, augment=True).inputs
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]
    random.random()
    assert torch.equal(first, t.batch_at("train", 10, 0, augment=True).inputs)
    assert not torch.equal(first, t.batch_at("train", 10, 0).inputs)


def test_from_loaders_keeps_given_splits() -> None:
    t = from_loaders({"train": Pixels(), "test": Pixels(9), "attacker": Pixels(8), "inner": Pixels(7)})
    assert {part: t.size(part) for part in SPLITS} == {
        "train": 57,
        "inner": 7,
        "validation": 3,
        "attacker": 8,
        "test": 9,
    }


@pytest.mark.parametrize(
    ("loaders", "text"),
    [
        ({"train": Pixels()}, "must name train and test"),
        ({"train": Pixels(), "test": Pixels(), "extra": Pixels()}, "must name"),
        ({"train": 7, "test": Pixels()}, "Give a DataLoader"),
        ({"train": [], "test": Pixels()}, "no batch"),
        ({"train": [torch.ones(2)], "test": Pixels()}, "pair of tensors"),
        (
            {"train": TensorDataset(torch.ones(30, 4), torch.ones(30).long()), "test": Pixels()},
            "Return images",
        ),
        (
            {"train": Pixels(), "test": TensorDataset(torch.ones(9, 2, 4, 4), torch.ones(9))},
            "Make them equal",
        ),
        ({"train": TensorDataset(torch.ones(30, 2, 5, 4), torch.ones(30, 2)), "test": Pixels()}, "classes"),
        ({"train": Pixels(), "test": Pixels(0)}, "empty"),
    ],
)
def test_from_loaders_of_unusable_loaders_raises_data_error(loaders: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        from_loaders(loaders)


def test_from_loaders_of_large_stream_raises_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_splits, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="map-style"):
        from_loaders({"train": DataLoader(Stream(), batch_size=4), "test": Pixels()})


def test_from_tensors_uses_given_loss_and_metric() -> None:
    def l1(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).abs()

    t = from_tensors(torch.rand(40, 1, 4, 4), torch.rand(40), loss=l1, metric=lambda o, y: -1.0, classes=1)
    out = torch.zeros(4)
    assert t.loss(out, torch.ones(4)).shape == ()
    metric = t.metric("cpu")
    metric.update(out, torch.ones(4))
    assert metric.state.tolist() == [-4.0, 4.0] and metric.value() == -1.0
    with pytest.raises(DataError, match="one per sample"):
        from_tensors(*images(), metric=lambda o, y: torch.ones(3)).metric("cpu").update(out, out)
    with pytest.raises(DataError, match=r"\[N, C, H, W\]"):
        from_tensors(torch.rand(40, 4), torch.rand(40))


def test_load_task_calls_factories_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("my_task")
    module.ready = task
    module.seeded = lambda seed: {"loaders": {"train": Pixels(), "test": Pixels(seed)}, "classes": 4}
    module.wrong = lambda: 7
    module.misspelt = lambda: {"loader": {}}
    monkeypatch.setitem(sys.modules, "my_task", module)
    assert load_task("my_task:ready", seed=1).name == "custom"
    made = load_task("my_task:seeded", seed=11)
    assert made.size("test") == 11 and made.classes == 4 and made.name == "my_task.seeded"
    for name in ("wrong", "misspelt"):
        with pytest.raises(DataError, match="return"):
            load_task(f"my_task:{name}")


def test_load_task_with_old_name_names_new_one() -> None:
    with pytest.raises(DataError, match=r"^task: The task 'own' was renamed\. Use 'custom'\.$"):
        load_task("own")
    with pytest.raises(DataError, match=r"^task: .* Use package\.module:factory\.$"):
        load_task("custom")


def test_load_task_with_unknown_name_raises_error_with_hint() -> None:
    with pytest.raises(DataError, match="'fashion-mnist'"):
        load_task("fashionmnist")
    with pytest.raises(ModelError, match="cannot import"):
        load_task("no_such_package:task")
