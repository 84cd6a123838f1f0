from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from mtlsign.errors import DataError
from mtlsign.tasks import SPLITS, load_task, torchvision_datasets


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
def test_load_task_reads_idx_files(tmp_path: Path, name: str, folder: str) -> None:
    write_idx(tmp_path, folder)
    t = load_task(name, data=tmp_path, seed=0)
    assert {part: t.size(part) for part in SPLITS} == {
        "train": 34,
        "inner": 3,
        "validation": 2,
        "attacker": 4,
        "test": 10,
    }
    assert t.batch_at("train", 8, 0, augment=True).inputs.shape == (8, 1, 28, 28)
    (tmp_path / folder / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 broken")
    with pytest.raises(DataError, match="damaged"):
        load_task(name, data=tmp_path)


def test_load_task_with_files_of_another_data_set_raises_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path, "FashionMNIST")
    labels = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    digest = hashlib.md5(labels.read_bytes()).hexdigest()
    monkeypatch.setitem(torchvision_datasets.OFFICIAL_FILES, digest, ("mnist", labels.name))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte of mnist"):
        load_task("fashion-mnist", data=tmp_path)


def test_load_task_with_share_keeps_same_samples_for_all_seeds(tmp_path: Path) -> None:
    write_idx(tmp_path, "MNIST")
    a, b = (load_task("mnist@0.5", data=tmp_path, seed=seed) for seed in (0, 1))
    assert a.name == "mnist@0.5" and a.size("test") == 10
    assert sum(a.size(part) for part in ("train", "validation", "attacker")) == 20
    x, y = (t.splits["test"].batch(torch.arange(10)).inputs for t in (a, b))
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["mnist@", "mnist@2", "mnist@0", "mnist@nan", "mnist@x", "digits@0.5"])
def test_load_task_with_invalid_share_raises_data_error(tmp_path: Path, name: str) -> None:
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


def test_load_task_reads_cifar10_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [f"data_batch_{i}" for i in range(1, 6)]
    files = {**dict.fromkeys(train, 8), "test_batch": 10, "batches.meta": 0}
    sums = write_cifar(tmp_path, "cifar-10-batches-py", files, "labels", 10)
    with pytest.raises(DataError, match="damaged"):
        load_task("cifar10", data=tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in train])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", sums["batches.meta"])
    t = load_task("cifar10", data=tmp_path)
    assert (t.input_spec.channels, t.input_spec.height, t.classes, t.size("train"), t.size("test")) == (
        3,
        32,
        10,
        34,
        10,
    )
    assert t.batch_at("train", 8, 0, augment=True).inputs.shape == (8, 3, 32, 32)


def test_load_task_of_unofficial_cifar100_warns_and_runs_no_code(tmp_path: Path) -> None:
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
def test_load_task_without_data_names_folder_and_flags(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_task(name, data=tmp_path)
    text = str(caught.value)
    assert "--download" in text and "--data" in text and str(tmp_path) in text


def test_load_task_with_failed_download_raises_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
    with pytest.raises(DataError, match="Check the network"):
        load_task("mnist", data=tmp_path, download=True)
