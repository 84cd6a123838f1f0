"""Splits, deterministic batches, readers of the official files, and tasks of the user's own."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision import datasets

from mtlsign.errors import DataError, ModelError
from mtlsign.tasks import SPLITS, InputTransform, Task, from_loaders, load_task, user_task
from mtlsign.tasks.base import seeded_generator, split_training_rows, stratified_permutation
from mtlsign.tasks.tensor_split import crop_and_flip


def images(count: int = 100, side: int = 6, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = seeded_generator("test", seed)
    x = torch.randint(256, (count, 1, side, side), generator=gen, dtype=torch.uint8)
    return x, torch.arange(count) % classes


def task(**options: Any) -> Task:
    return Task.from_tensors(*images(), recipe=InputTransform((0.5,), (0.5,), pad=2, flip=True), **options)


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# Splits


@pytest.mark.parametrize("labels", [100, torch.arange(100) % 5])
def test_parts_are_disjoint_and_of_the_right_size(labels: Tensor | int) -> None:
    rows = split_training_rows(labels, 3)
    assert {name: len(part) for name, part in rows.items()} == {
        "validation": 5,
        "attacker": 10,
        "train": 85,
        "inner": 8,
    }
    together = torch.cat([rows[name] for name in ("validation", "attacker", "train")])
    assert torch.equal(together.sort().values, torch.arange(100))
    assert set(rows["inner"].tolist()) < set(rows["train"].tolist())
    again, other = split_training_rows(labels, 3), split_training_rows(labels, 4)
    assert all(torch.equal(rows[name], again[name]) for name in rows)
    assert not torch.equal(rows["attacker"], other["attacker"])


def test_every_stretch_holds_the_classes_in_proportion() -> None:
    labels = torch.tensor([0] * 80 + [1] * 20)
    order = stratified_permutation(labels, seeded_generator(1))
    for start in range(0, 100, 20):
        assert 3 <= int(labels[order[start : start + 20]].sum()) <= 5


def test_too_few_samples() -> None:
    with pytest.raises(DataError, match="too few"):
        split_training_rows(3, 0)


# Batches


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(world: int) -> None:
    t = task()
    for step in (0, 7, 1000):
        x, y = t.batch_at("train", 20, step, seed=5, augment=True)
        parts = [
            t.batch_at("train", 20, step, seed=5, rank=r, world=world, augment=True) for r in range(world)
        ]
        assert torch.equal(joined(parts)[0], x) and torch.equal(joined(parts)[1], y)


def test_an_epoch_is_the_stream_and_covers_the_split() -> None:
    t = task()
    assert t.size("train") == 68 and t.steps("train", 20) == 3
    epoch = list(t.batches("train", 20, epoch=2, seed=1, augment=True))
    assert len(epoch) == 3
    for position, (x, y) in enumerate(epoch):
        again = t.batch_at("train", 20, 2 * 3 + position, seed=1, augment=True)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    orders = [joined(list(t.batches("train", 17, epoch=e, seed=1)))[0] for e in (0, 1)]
    assert not torch.equal(*orders)
    assert torch.equal(*(order.flatten(1).sum(1).sort().values for order in orders))
    other = t.batch_at("train", 20, 0, seed=2)
    assert not torch.equal(other[0], t.batch_at("train", 20, 0, seed=1)[0])


def test_batches_do_not_touch_the_global_generator() -> None:
    t = task()
    state = torch.get_rng_state()
    t.batch_at("train", 20, 0, augment=True)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_in_order_nothing_is_dropped(world: int) -> None:
    t = task()
    every = [list(t.batches("test", 7, shuffle=False, rank=r, world=world)) for r in range(world)]
    assert sum(len(y) for part in every for _, y in part) == t.size("test") == 20
    if world == 1:
        assert torch.equal(joined(every[0])[1], t.splits["test"].batch(torch.arange(20))[1])


def test_a_small_split_is_one_batch() -> None:
    t = task()
    assert t.steps("inner", 1000) == 1
    assert len(t.batch_at("inner", 1000, 5)[1]) == t.size("inner") == 7


def test_impossible_batches() -> None:
    t = task()
    with pytest.raises(DataError, match="larger batch"):
        t.batch_at("train", 2, 0, rank=0, world=3)
    with pytest.raises(DataError, match="unknown split"):
        t.size("valid")


def test_normalisation_and_augmentation() -> None:
    t = task()
    x, _ = t.splits["train"].batch(torch.arange(3))
    raw = t.splits["train"].x[t.splits["train"].rows[:3]]  # type: ignore[attr-defined]
    assert x.dtype == torch.float32 and torch.allclose(x, (raw.float() / 255 - 0.5) / 0.5)
    draws = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1], [0.0, 0.999, 0.9]])
    out = crop_and_flip(raw, draws, 2, True)
    assert torch.equal(out[0], raw[0]) and torch.equal(out[1], raw[1].flip(2))
    expected = torch.zeros_like(raw[2])
    expected[:, 2:, :-2] = raw[2][:, :-2, 2:]
    assert torch.equal(out[2], expected)


def test_loss_and_metric_defaults() -> None:
    t = task()
    out, y = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    assert t.loss(out.bfloat16(), y).dtype == torch.float32
    assert t.correct(out, y).tolist() == [1.0, 0.0]
    assert t.to("cpu").size("train") == t.size("train")


# Built-in tasks


def test_digits() -> None:
    t = load_task("digits", seed=1)
    assert (t.channels, t.height, t.width, t.classes) == (1, 32, 32, 10)
    assert t.size("test") == 359 and t.size("train") == 1222
    assert torch.bincount(t.splits["test"].batch(torch.arange(359))[1]).min() >= 34
    x, _ = joined(list(t.batches("train", 500, shuffle=False)))
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1
    other = load_task("digits", seed=2)
    rows = torch.arange(359)
    assert torch.equal(t.splits["test"].batch(rows)[0], other.splits["test"].batch(rows)[0])
    assert not torch.equal(t.batch_at("attacker", 9, 0)[0], other.batch_at("attacker", 9, 0)[0])


def write_idx(root: Path, folder: str, counts: tuple[int, int] = (40, 10)) -> None:
    where = root / folder / "raw"
    where.mkdir(parents=True)
    for part, count in zip(("train", "t10k"), counts, strict=True):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (where / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (where / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files(tmp_path: Path, name: str, folder: str) -> None:
    write_idx(tmp_path, folder)
    t = load_task(name, data=tmp_path, seed=0)
    assert {part: t.size(part) for part in SPLITS} == {
        "train": 34,
        "inner": 3,
        "validation": 2,
        "attacker": 4,
        "test": 10,
    }
    assert t.batch_at("train", 8, 0, augment=True)[0].shape == (8, 1, 28, 28)
    (tmp_path / folder / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 broken")
    with pytest.raises(DataError, match="damaged"):
        load_task(name, data=tmp_path)


def test_a_share_of_a_task_is_the_same_for_every_seed(tmp_path: Path) -> None:
    write_idx(tmp_path, "MNIST")
    a, b = (load_task("mnist@0.5", data=tmp_path, seed=seed) for seed in (0, 1))
    assert a.name == "mnist@0.5" and a.size("test") == 10
    assert sum(a.size(part) for part in ("train", "validation", "attacker")) == 20
    x, y = (t.splits["test"].batch(torch.arange(10))[0] for t in (a, b))
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["mnist@", "mnist@2", "mnist@0", "mnist@nan", "mnist@x", "digits@0.5"])
def test_impossible_shares(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path, "MNIST")
    with pytest.raises(DataError, match="task"):
        load_task(name, data=tmp_path)


def write_cifar(root: Path, folder: str, files: dict[str, int], key: str, classes: int) -> dict[str, str]:
    where = root / folder
    where.mkdir(parents=True)
    for seed, (name, count) in enumerate(files.items()):
        if count:
            pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
            entry: dict[str, Any] = {"data": pixels, key: [i % classes for i in range(count)]}
        else:
            entry = {"label_names": ["x"], "fine_label_names": ["x"]}
        (where / name).write_bytes(pickle.dumps(entry, protocol=2))
    return {name: hashlib.md5((where / name).read_bytes()).hexdigest() for name in files}


def test_cifar10_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [f"data_batch_{i}" for i in range(1, 6)]
    files = {**dict.fromkeys(train, 8), "test_batch": 10, "batches.meta": 0}
    sums = write_cifar(tmp_path, "cifar-10-batches-py", files, "labels", 10)
    with pytest.raises(DataError, match="damaged"):
        load_task("cifar10", data=tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in train])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", sums["batches.meta"])
    t = load_task("cifar10", data=tmp_path)
    assert (t.channels, t.height, t.classes, t.size("train"), t.size("test")) == (3, 32, 10, 34, 10)
    assert t.batch_at("train", 8, 0, augment=True)[0].shape == (8, 3, 32, 32)


def test_an_unofficial_cifar100_is_read_with_a_warning_and_runs_nothing(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar-100-python", {"train": 40, "test": 10, "meta": 0}, "fine_labels", 100)
    with pytest.warns(UserWarning, match="not the official"):
        t = load_task("cifar100", data=tmp_path)
    assert t.classes == 100 and t.size("train") == 34

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Runs()}))
    with pytest.raises(DataError, match="not allowed"):
        load_task("cifar100", data=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_data_say_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_task(name, data=tmp_path)
    text = str(caught.value)
    assert "--download" in text and "--data" in text and str(tmp_path) in text


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
    with pytest.raises(DataError, match="check the network"):
        load_task("mnist", data=tmp_path, download=True)


def test_unknown_names() -> None:
    with pytest.raises(DataError, match="'fashion-mnist'"):
        load_task("fashionmnist")
    with pytest.raises(ModelError, match="cannot import"):
        load_task("no_such_package:task")


# The user's own


class Pixels(Dataset[tuple[Tensor, int]]):
    """A map-style dataset with random transforms from all three global generators."""

    def __init__(self, count: int = 60) -> None:
        self.count = count
        self.targets = [i % 3 for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(1) + random.random() + np.random.rand()
        return torch.full((2, 5, 4), float(index)) + noise, self.targets[index]


class Stream(IterableDataset[tuple[Tensor, int]]):
    """A dataset that can only be read from its beginning."""

    def __iter__(self) -> Any:
        return iter([(torch.full((2, 5, 4), float(i)), i % 3) for i in range(30)])


def test_loaders_of_every_kind() -> None:
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
        assert (t.channels, t.height, t.width, t.classes) == (2, 5, 4, 3)
        assert {part: t.size(part) for part in SPLITS} == {
            "train": 51,
            "inner": 5,
            "validation": 3,
            "attacker": 6,
            "test": 30,
        }
        whole = t.batch_at("train", 10, 3, augment=True)
        parts = [t.batch_at("train", 10, 3, augment=True, rank=r, world=2) for r in range(2)]
        assert torch.equal(joined(parts)[0], whole[0]) and torch.equal(joined(parts)[1], whole[1])
        assert whole[1].dtype == torch.int64


def test_transforms_are_fixed_by_their_number_and_leave_the_generators_alone() -> None:
    t = from_loaders({"train": Pixels(), "test": Pixels(9)})
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    first = t.batch_at("train", 10, 0, augment=True)[0]
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]
    random.random()
    assert torch.equal(first, t.batch_at("train", 10, 0, augment=True)[0])
    assert not torch.equal(first, t.batch_at("train", 10, 0)[0])


def test_given_parts_are_kept() -> None:
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
        ({"train": 7, "test": Pixels()}, "give a DataLoader"),
        ({"train": [], "test": Pixels()}, "no batch"),
        ({"train": [torch.ones(2)], "test": Pixels()}, "pair of tensors"),
        (
            {"train": TensorDataset(torch.ones(30, 4), torch.ones(30).long()), "test": Pixels()},
            "return images",
        ),
        (
            {"train": Pixels(), "test": TensorDataset(torch.ones(9, 2, 4, 4), torch.ones(9))},
            "make them equal",
        ),
        ({"train": TensorDataset(torch.ones(30, 2, 5, 4), torch.ones(30, 2)), "test": Pixels()}, "classes"),
        ({"train": Pixels(), "test": Pixels(0)}, "empty"),
    ],
)
def test_unusable_loaders(loaders: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        from_loaders(loaders)


def test_streams_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_task, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="map-style"):
        from_loaders({"train": DataLoader(Stream(), batch_size=4), "test": Pixels()})


def test_own_loss_and_metric() -> None:
    def l1(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).abs()

    t = Task.from_tensors(
        torch.rand(40, 1, 4, 4), torch.rand(40), loss=l1, metric=lambda o, y: -1.0, classes=1
    )
    out = torch.zeros(4)
    assert t.loss(out, torch.ones(4)).shape == ()
    assert t.correct(out, torch.ones(4)).tolist() == [-1.0] * 4
    with pytest.raises(DataError, match="one per sample"):
        Task.from_tensors(*images(), metric=lambda o, y: torch.ones(3)).correct(out, out)
    with pytest.raises(DataError, match=r"\[N, C, H, W\]"):
        Task.from_tensors(torch.rand(40, 4), torch.rand(40))


def test_factories_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("my_task")
    module.ready = task
    module.seeded = lambda seed: {"loaders": {"train": Pixels(), "test": Pixels(seed)}, "classes": 4}
    module.wrong = lambda: 7
    module.misspelt = lambda: {"loader": {}}
    monkeypatch.setitem(sys.modules, "my_task", module)
    assert load_task("my_task:ready", seed=1).name == "own"
    made = load_task("my_task:seeded", seed=11)
    assert made.size("test") == 11 and made.classes == 4 and made.name == "my_task.seeded"
    for name in ("wrong", "misspelt"):
        with pytest.raises(DataError, match="return"):
            load_task(f"my_task:{name}")
