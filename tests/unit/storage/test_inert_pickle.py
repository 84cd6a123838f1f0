"""Files of torch.save with objects of unknown classes are read without running their code."""

from __future__ import annotations

import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtlsign.errors import ModelError
from mtlsign.storage.inert_pickle import Record, module_tensors, read_torch_file


class Hostile:
    """Object that would open a file for writing when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_code_of_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Hostile(tmp_path / "written"), "b": torch.ones(2)}, tmp_path / "f.pth")
    content = read_torch_file(tmp_path / "f.pth")
    assert isinstance(content["a"], Record) and torch.equal(content["b"], torch.ones(2))
    assert not (tmp_path / "written").exists()
    torch.load(tmp_path / "f.pth", weights_only=False)
    assert (tmp_path / "written").exists(), "an ordinary reader runs it"


def test_tensors_equal_those_of_torch(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = OrderedDict(
        view=base[1:3, ::2], transposed=base.T, long=torch.tensor([3, -1]), half=torch.ones(2).half(),
        empty=torch.empty(0, 3), flag=torch.tensor(True), parameter=nn.Parameter(torch.ones(1)),
    )  # fmt: skip
    torch.save(content, tmp_path / "f.pt")
    result = read_torch_file(tmp_path / "f.pt")
    assert list(result) == list(content)
    for name, tensor in content.items():
        assert result[name].dtype == tensor.dtype and torch.equal(result[name], tensor), name


def test_module_of_unknown_class_gives_its_state_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = types.ModuleType("another_program")
    other = type("Net", (nn.Sequential,), {"__module__": "another_program"})
    program.Net = other  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "another_program", program)
    network = other(nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(2)))
    torch.save({"model": network}, tmp_path / "f.pth")
    monkeypatch.delitem(sys.modules, "another_program")
    tensors = module_tensors(read_torch_file(tmp_path / "f.pth")["model"])
    expected = network.state_dict()
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_damaged_files_raise_model_error(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    with pytest.raises(ModelError, match="does not exist"):
        read_torch_file(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"no readable file of torch\.save"):
        read_torch_file(path)
    torch.save({"a": torch.ones(1000)}, tmp_path / "g.pth")
    with zipfile.ZipFile(tmp_path / "g.pth") as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, content[:8] if "/data/" in entry.filename else content)
    with pytest.raises(ModelError, match="UnpicklingError"):
        read_torch_file(path)


def test_module_tensors_of_other_object_raises() -> None:
    with pytest.raises(ModelError, match="no network"):
        module_tensors({"a": torch.ones(1)})


def test_module_that_contains_itself_raises() -> None:
    module = Record()
    module.state = {"_modules": {"self": module}}
    with pytest.raises(ModelError, match="too deeply"):
        module_tensors(module)
