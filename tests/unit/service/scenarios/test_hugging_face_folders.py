"""Suspects as Hugging Face folders of several files and as GGUF; hostile folders stay within the limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtlsign.models.conversion import convert_weights
from mtlsign.service.fetch.content_store import PARTIAL
from mtlsign.service.fetch.shards import INDEX, MAX_SHARDS
from mtlsign.service.verifier.claim_bundle import to_json
from mtlsign.storage.safetensors_io import serialize_safetensors
from tests.unit.attacks.transformer_examples import marked_transformer
from tests.unit.models.test_pretrained_transformer import GGUF_PARTS, PARTS
from tests.unit.service.fixtures import ClaimFixtures, ServiceHarness, limit_memory_and_time

Files = dict[str, bytes]


def library_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the marked decoder under the names of the transformers library."""
    renamed = {"model.embed_tokens.weight": model.state_dict()["embedding.weight"]}
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks."):
            _, number, part = name.removesuffix(".weight").split(".", 2)
            renamed[f"model.layers.{number}.{PARTS['llama'][part]}.weight"] = tensor
    return renamed


def sharded_folder(count: int = 3) -> Files:
    """Return the files of a Hugging Face folder whose weights are in `count` files."""
    tensors = library_tensors(marked_transformer("rms")[0])
    files, weight_map = {}, {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[number::count])
        files[name] = serialize_safetensors(part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return files | {INDEX: json.dumps(index).encode(), "config.json": b"{}"}


def claim_on(fixtures: ClaimFixtures, folder: str, files: Files) -> dict[str, Any]:
    for name, data in files.items():
        fixtures.write(f"{folder}/{name}", data)
    kit = marked_transformer("rms")[1].kit
    return {"model": fixtures.location(folder), "bundle": to_json(kit.opening, kit.reference)}


def test_sharded_folder_of_marked_transformer_is_accepted(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    claim = claim_on(claim_fixtures, "shards", sharded_folder())
    one = claim_on(claim_fixtures, "single", sharded_folder(1))
    first, second, third = service.verify(claim, one, claim).json()["results"]
    for item in (first, second, third):
        assert item["verdict"]["status"] == "accepted" and item["verdict"]["matches"] == 128
    assert first["verdict"]["model_digest"] == third["verdict"]["model_digest"]
    assert service.verifier.fetcher.downloads == 2  # the second claim on the same folder is cached


def test_gguf_of_marked_transformer_is_accepted_directly_and_after_conversion(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, tmp_path: Path
) -> None:
    model = marked_transformer("rms")[0]
    path = tmp_path / "marked.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", model.state_dict()["embedding.weight"].numpy())
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks."):
            _, number, part = name.removesuffix(".weight").split(".", 2)
            if part in ("attention.query", "attention.key"):  # the pairs of rotary positions are neighbours
                size = model.get_submodule("blocks.0.attention").head_size
                halves = tensor.reshape(-1, 2, int(str(size)) // 2, tensor.shape[1])  # type: ignore[arg-type]
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            target = f"blk.{number}.{GGUF_PARTS[part]}.weight"
            writer.add_tensor(target, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    claim = claim_on(claim_fixtures, "gguf", {"marked.gguf": path.read_bytes()})
    claim["model"] += "/marked.gguf"
    verdict = service.verify(claim).json()["results"][0]["verdict"]
    assert verdict["status"] == "accepted" and verdict["matches"] == 128
    convert_weights(path, tmp_path / "marked.safetensors")
    data = (tmp_path / "marked.safetensors").read_bytes()
    claim["model"] = claim_fixtures.write("gguf/marked.safetensors", data)
    verdict = service.verify(claim).json()["results"][0]["verdict"]
    assert verdict["status"] == "accepted" and verdict["matches"] == 128


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], Files]:
    """Return a change of the index of a folder."""

    def changed(files: Files) -> Files:
        weight_map = json.loads(files[INDEX])["weight_map"]
        return files | {INDEX: json.dumps({"weight_map": change(weight_map)}).encode()}

    return changed


FIRST = "model-00001-of-00003.safetensors"
BOMB = (2**40).to_bytes(8, "little") + b"{"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (_index(lambda m: dict.fromkeys(m, "../../etc/passwd.safetensors")), "not-a-model", "same folder"),
        (_index(lambda m: dict.fromkeys(m, "/etc/passwd")), "not-a-model", "same folder"),
        (_index(lambda m: list(m)), "not-a-model", "same folder"),
        (_index(lambda m: {}), "not-a-model", "same folder"),
        (_index(lambda m: m | {"x": 3}), "not-a-model", "same folder"),
        (_index(lambda m: {f"t{i}": f"f{i}.safetensors" for i in range(2000)}), "not-a-model",
         f"{MAX_SHARDS} are allowed"),
        (_index(lambda m: m | {"x": "absent.safetensors"}), "unreachable", "does not exist"),
        (lambda f: f | {INDEX: b"[" * 100_000}, "not-a-model", "cannot be read"),
        (lambda f: f | {INDEX: b" " * (9 * 2**20)}, "too-large", "allowed"),
        (lambda f: f | {FIRST: f["model-00002-of-00003.safetensors"]}, "not-a-model", "in two files"),
        (lambda f: f | {FIRST: BOMB}, "not-a-model", "header length"),
        (lambda f: f | {FIRST: f[FIRST][:-4]}, "not-a-model", "size that its header states"),
        (lambda f: f | {FIRST: serialize_safetensors({f"t{i}": torch.zeros(1) for i in range(10_001)})},
         "not-a-model", ""),
    ],
)  # fmt: skip
def test_hostile_folder_is_refused_within_limits(
    change: Callable[[Files], Files], kind: str, words: str, service: ServiceHarness,
    claim_fixtures: ClaimFixtures, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    folder = f"hostile{abs(hash(request.node.name))}"
    claim = claim_on(claim_fixtures, folder, change(sharded_folder()))
    with limit_memory_and_time():
        item = service.verify(claim).json()["results"][0]
    assert item["problem"]["type"].endswith(kind), item
    assert words in item["problem"]["detail"], item
    cache = service.verifier.fetcher.cache.folder
    assert not [path for path in cache.iterdir() if path.name.startswith(PARTIAL)]


def test_shard_that_is_a_link_is_refused(service: ServiceHarness, claim_fixtures: ClaimFixtures) -> None:
    claim = claim_on(claim_fixtures, "linked", sharded_folder())
    file = claim_fixtures.folder / "linked" / FIRST
    file.unlink()
    file.symlink_to(claim_fixtures.folder / "marked.safetensors")
    item = service.verify(claim).json()["results"][0]
    assert item["problem"]["type"].endswith("pointer-refused")
