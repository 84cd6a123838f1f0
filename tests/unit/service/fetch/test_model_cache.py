"""Fetching of models: links, size limits and the cache."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.service import ServiceSettings
from mtlsign.service.fetch.model_cache import ModelFetcher
from mtlsign.service.problems import Problem
from tests.unit.service.fixtures import problem_kind


def make_fetcher(tmp_path: Path, **settings: Any) -> ModelFetcher:
    values = {"state_dir": tmp_path / "s", "allowed_locations": [f"file://{tmp_path}/in"], **settings}
    return ModelFetcher(ServiceSettings.of(values))


def test_fetch_model_through_link_pipe_or_folder_is_refused(tmp_path: Path) -> None:
    inside, secret = tmp_path / "in", tmp_path / "secret.safetensors"
    (inside / "sub").mkdir(parents=True)
    secret.write_bytes(b"x")
    (inside / "link.safetensors").symlink_to(secret)
    (inside / "dir").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe.safetensors")
    (inside / "sub.safetensors").mkdir()
    fetcher = make_fetcher(tmp_path)
    for name in ("link.safetensors", "dir/secret.safetensors", "pipe.safetensors", "sub.safetensors"):
        fetch = partial(fetcher.fetch_model, f"file://{inside}/{name}")
        assert problem_kind(fetch) == "pointer-refused", name
    assert problem_kind(lambda: fetcher.fetch_model(f"file://{inside}/none.safetensors")) == "unreachable"
    assert not [p for p in (tmp_path / "s" / "cache").iterdir()]


def test_fetch_model_checks_size_first_and_bounds_cache(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    with (inside / "big.safetensors").open("wb") as file:
        file.truncate(3 * 2**20)
    for i in range(4):
        (inside / f"{i}.safetensors").write_bytes(bytes([i]) * 2**20)
    fetcher = make_fetcher(tmp_path, max_model_mb=2, cache_mb=2)
    assert problem_kind(lambda: fetcher.fetch_model(f"file://{inside}/big.safetensors")) == "too-large"
    for i in range(4):
        fetcher.fetch_model(f"file://{inside}/{i}.safetensors")
    assert sum(p.stat().st_size for p in fetcher.cache.folder.iterdir()) <= 2 * 2**20
    before = fetcher.downloads
    assert fetcher.fetch_model(f"file://{inside}/3.safetensors")[2]
    assert fetcher.downloads == before  # from the cache


def test_fetch_model_of_another_format_states_the_format_and_the_fix(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    for name in ("hf/config.json", "hf/model.safetensors", "old/config.json", "old/pytorch_model.bin",
                 "split/model.safetensors.index.json", "empty/README.md", "weights", "llm.GGUF"):  # fmt: skip
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(b"x" * 30)
    fetcher = make_fetcher(tmp_path)
    for name, kind, words in (
        ("model.pt", "not-a-model", "names a PyTorch checkpoint"),
        ("a/model.ckpt", "not-a-model", "save_file"),
        ("llm.GGUF", "not-a-model", "no little-endian GGUF"), ("hf", "not-a-model", "add /model.safetensors"),
        ("old", "not-a-model", "safe_serialization"), ("split", "not-a-model", "cannot be read"),
        ("empty", "not-a-model", "folder without a manifest.json"),
        ("none", "unreachable", "No file or folder"),
        ("weights", "not-a-model", "does not end in .safetensors"),
    ):  # fmt: skip
        with pytest.raises(Problem) as caught:
            fetcher.fetch_model(f"file://{inside}/{name}")
        assert caught.value.kind == kind and words in caught.value.detail, name


def test_uploaded_file_of_another_format_is_named(tmp_path: Path) -> None:
    fetcher = make_fetcher(tmp_path)
    for data, words in ((b"PK\x03\x04....", "PyTorch"), (b"GGUF....", "GGUF"), (b"\x80\x02}q", "pickle")):
        with fetcher.uploads.pending_file() as file:
            file.write(data)
            location = f"sha256:{file.digest}"
            file.commit()
        with pytest.raises(Problem, match="not-a-model") as caught:
            fetcher.fetch_model(location)
        assert words in caught.value.detail
