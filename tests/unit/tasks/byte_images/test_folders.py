from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.tasks import NAMES, SPLITS, load_task
from mtlsign.tasks.byte_images.malimg import byte_image
from tests.unit.tasks.byte_images.layouts import content, write_classes


def test_load_task_virusshare_divides_classes_in_proportion(tmp_path: Path) -> None:
    write_classes(tmp_path, {"b": 30, "a": 20})
    assert "virusshare" in NAMES
    task = load_task("virusshare", data=tmp_path)
    assert task.input_spec == ImageSpec(1, 64, 64, 2)
    assert {part: task.size(part) for part in SPLITS} == {
        "train": 34,
        "inner": 3,
        "validation": 2,
        "attacker": 4,
        "test": 10,
    }
    batch = task.splits["test"].batch(torch.arange(10))
    assert batch.targets.tolist() == [0] * 4 + [1] * 6 and batch.inputs.shape == (10, 1, 64, 64)


def test_load_task_virusshare_test_part_does_not_depend_on_seed_or_names(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 20, "b": 20})
    first = load_task("virusshare", data=tmp_path).splits["test"].batch(torch.arange(8))
    for path in list((folder / "a").iterdir()):
        path.rename(path.with_name(f"renamed-{hash(path.name)}"))
    second = load_task("virusshare", data=tmp_path, seed=3).splits["test"].batch(torch.arange(8))
    assert torch.equal(first.inputs, second.inputs)


def test_load_task_virusshare_reads_images_again_from_private_file(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 20, "b": 20})
    first = load_task("virusshare", data=tmp_path).splits["train"].batch(torch.arange(20))
    (stored,) = (tmp_path / "byte-images").glob("virusshare-*.npz")
    assert stored.stat().st_mode & 0o777 == 0o600
    for path in folder.glob("*/*"):
        path.chmod(0)  # root may read it all the same
    assert torch.equal(
        load_task("virusshare", data=tmp_path).splits["train"].batch(torch.arange(20)).inputs, first.inputs
    )
    stored.write_bytes(b"PK damaged")
    for path in folder.glob("*/*"):
        path.chmod(0o600)
    assert torch.equal(
        load_task("virusshare", data=tmp_path).splits["train"].batch(torch.arange(20)).inputs, first.inputs
    )


def test_load_task_virusshare_notices_changed_files(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 20, "b": 20})
    load_task("virusshare", data=tmp_path)
    (folder / "a" / "sample99").write_bytes(content(99_999))
    images = load_task("virusshare", data=tmp_path).splits["train"].x
    expected = torch.from_numpy(byte_image(content(99_999), 64))
    assert len(images) == 33 and (images[:, 0] == expected).flatten(1).all(1).any()


def test_load_task_virusshare_skips_links_pipes_hidden_small_and_equal_files(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 20, "b": 20})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(content(7))
    (folder / "a" / "link").symlink_to(outside / "secret")
    (folder / "linked").symlink_to(outside)
    (folder / "README").write_bytes(content(8))
    (folder / "a" / "small").write_bytes(b"x" * 1023)
    (folder / "a" / ".hidden").write_bytes(content(10))
    (folder / ".git").mkdir()
    (folder / "a" / "empty").write_bytes(b"")
    (folder / "a" / "folder").mkdir()
    os.mkfifo(folder / "a" / "pipe")
    (folder / "a" / "copy").write_bytes((folder / "a" / "sample0").read_bytes())
    with open(os.path.join(os.fsencode(folder), b"a", b"new\nline\xff"), "wb") as file:
        file.write(content(9))
    task = load_task("virusshare", data=tmp_path)
    assert task.classes == 2
    labels = np.concatenate([task.splits[part].y.numpy() for part in ("train", "test")])
    assert np.bincount(labels).tolist() == [21, 20]


def test_load_task_virusshare_skips_contents_of_two_classes(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 21, "b": 20})
    (folder / "b" / "copy").write_bytes((folder / "a" / "sample0").read_bytes())
    with pytest.warns(UserWarning, match="that occur in several classes and are skipped: 1"):
        task = load_task("virusshare", data=tmp_path)
    assert len(task.splits["train"].y) + task.size("test") == 40


def test_load_task_virusshare_of_share_keeps_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 50, "b": 50})
    task = load_task("virusshare@0.5", data=tmp_path)
    assert task.name == "virusshare@0.5" and task.size("test") == 10
    assert task.splits["train"].y.bincount().tolist() == [20, 20]


def test_load_task_virusshare_without_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"virusshare cannot be read .*one folder of files per class"):
        load_task("virusshare", data=tmp_path)


@pytest.mark.parametrize(
    ("counts", "problem"),
    [({"a": 20}, "has 1 folders"), ({"a": 20, "b": 19}, r"b' has 19 different files .* at least 20")],
)
def test_load_task_virusshare_of_too_few_files_raises_data_error(
    tmp_path: Path, counts: dict[str, int], problem: str
) -> None:
    write_classes(tmp_path, counts)
    with pytest.raises(DataError, match=problem) as caught:
        load_task("virusshare", data=tmp_path)
    assert caught.value.field == "data"
