"""Fetching of models: links, size limits and the cache."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from mtlsign.config.service import ServiceSettings
from mtlsign.service.fetch.model_cache import ModelFetcher
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
