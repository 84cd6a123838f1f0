from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.tasks import NAMES, load_task
from mtlsign.tasks.byte_images import files
from mtlsign.tasks.byte_images import manifest as manifest_module
from mtlsign.tasks.byte_images.malimg import byte_image
from tests.unit.tasks.byte_images.layouts import write_packages

pytestmark = pytest.mark.filterwarnings("ignore:The task files has no class")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    listed = write_packages(tmp_path / "usr", suffixes=("so", "gz"))
    monkeypatch.setattr(manifest_module, "MIN_FILES", 24)
    monkeypatch.setattr(manifest_module, "MIN_TEST_FILES", 3)
    monkeypatch.setattr(files, "installed_files", lambda: listed)
    return listed


def test_load_task_files_writes_private_manifest(tmp_path: Path, packages: dict[str, str]) -> None:
    assert "files" in NAMES
    task = load_task("files", data=tmp_path)
    assert task.input_spec == ImageSpec(1, 64, 64, 2) and task.size("test") == 12
    assert task.size("train") + task.size("validation") + task.size("attacker") == 48
    folder = tmp_path / "byte-images"
    assert task.data_digest == hashlib.sha256((folder / "files.json").read_bytes()).hexdigest()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    path = next(path for path in packages if path.endswith(".gz"))
    image = torch.from_numpy(byte_image(Path(path).read_bytes(), 64))
    images = torch.cat([task.splits[part].x[:, 0] for part in ("train", "test")])
    assert (images == image).flatten(1).all(1).sum() == 1


def test_load_task_files_uses_same_data_after_update_of_packages(
    tmp_path: Path, packages: dict[str, str]
) -> None:
    first = load_task("files", data=tmp_path).splits["train"].batch(torch.arange(20))
    for path in packages:
        Path(path).unlink()
    second = load_task("files", data=tmp_path).splits["train"].batch(torch.arange(20))
    assert torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)


def test_load_task_files_without_images_names_changed_file(tmp_path: Path, packages: dict[str, str]) -> None:
    load_task("files", data=tmp_path)
    digest = hashlib.sha256((tmp_path / "byte-images" / "files.json").read_bytes()).digest()
    (images,) = (tmp_path / "byte-images").glob("*.npz")
    images.unlink()
    assert load_task("files", data=tmp_path).size("test") == 12
    (tmp_path / "byte-images" / images.name).unlink()
    path = Path(next(iter(packages)))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"1 of 60 files have changed .* such as .*file0") as caught:
        load_task("files", data=tmp_path)
    assert caught.value.field == "data"
    assert hashlib.sha256((tmp_path / "byte-images" / "files.json").read_bytes()).digest() == digest


def test_load_task_files_of_damaged_manifest_raises_data_error(tmp_path: Path) -> None:
    (tmp_path / "byte-images").mkdir()
    (tmp_path / "byte-images" / "files.json").mkdir()
    with pytest.raises(DataError, match="is no readable file"):
        load_task("files", data=tmp_path)


def test_load_task_files_in_folder_without_permission_raises_data_error(
    tmp_path: Path, packages: dict[str, str]
) -> None:
    (tmp_path / "byte-images").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be written .* writable folder with --data"):
        load_task("files", data=tmp_path)


def test_load_task_files_of_share_names_it(tmp_path: Path, packages: dict[str, str]) -> None:
    task = load_task("files@0.5", data=tmp_path)
    assert task.name == "files@0.5" and task.size("test") == 10
