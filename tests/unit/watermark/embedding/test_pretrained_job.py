"""Embedding into a pretrained transformer by the job's settings alone."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from mtlsign.commands.convert import convert
from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import EmbedSettings, public_model_name
from mtlsign.errors import DataError, ModelError, SettingsError
from mtlsign.experiments.attack_runs.target import load_target
from mtlsign.models.architectures import build
from mtlsign.models.loading import load_initial_weights
from mtlsign.models.pretrained_transformer import load_pretrained_transformer
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import load_task
from mtlsign.watermark.embedding.pipeline import LocalEmbeddingBackend, run_embedding_job
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.models.test_pretrained_transformer import folder
from tests.unit.tasks.text.layouts import WORDS, write_imdb, write_sst

pytestmark = pytest.mark.filterwarnings("ignore:.*of the official")


def write_tokenizer(path: Path, first: str = "[PAD]") -> Path:
    vocabulary = {word: i for i, word in enumerate((first, "[UNK]", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture
def settings(tmp_path: Path, owner: Identity) -> dict[str, Any]:
    """Settings of a job of seconds: a folder of a tiny BERT, its tokenizer, and small parts of SST."""
    model = tmp_path / "model"
    model.mkdir()
    owner.save(tmp_path / "identity.json", None)
    write_sst(tmp_path, (200, 40, 40))
    folder(model, "bert", max_position_embeddings=12)
    return {
        "task": "sst2", "data": tmp_path, "model": f"hf:{model}", "tokenizer": write_tokenizer(model),
        "storage": str(tmp_path / "store"), "owner": str(tmp_path / "identity.json"), "workers": 0,
        "key_size": 128, "phase1.lr": 0.003, "phase1.batch": 16, "phase2.steps": 150, "phase2.lr": 0.005,
        "phase2.batch": 16, "insecure_test_key": True,
    }  # fmt: skip


def test_job_marks_pretrained_network_and_returns_its_names(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    with pytest.raises(ModelError, match="12 positions"):
        run_embedding_job(EmbedSettings.of(settings), LocalEmbeddingBackend())
    tensors = parse_safetensors((model / "model.safetensors").read_bytes())
    positions = "embeddings.position_embeddings.weight"
    tensors[positions] = torch.cat([tensors[positions]] * 5)
    (model / "model.safetensors").write_bytes(serialize_safetensors(tensors))
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 60}
    (model / "config.json").write_text(json.dumps(config))
    run = run_embedding_job(EmbedSettings.of(settings), LocalEmbeddingBackend())
    assert run.verdict.matches == 128 and run.result["model"] == "hf:model"
    published = Path(run.result["model_path"])
    assert (published / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert str(tmp_path) not in json.dumps(run.result["name"])
    detector = detector_for_kit(run.kit)
    output = tmp_path / "marked.safetensors"
    with pytest.raises(SystemExit) as ended:
        convert.run([
            "--source", run.result["model_path"], "--output", str(output), "--original", str(model)
        ])  # fmt: skip
    assert not ended.value.code
    marked = parse_safetensors(output.read_bytes())
    assert marked.keys() == tensors.keys()
    renamed = {f"bert.{name}": tensor for name, tensor in marked.items()}
    assert verify(renamed, detector).matches == 128
    words = tensors["embeddings.word_embeddings.weight"]
    assert torch.equal(renamed["bert.embeddings.word_embeddings.weight"], words)
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(config))
    (again / "model.safetensors").write_bytes(output.read_bytes())
    network = build(dict(json.loads(run.kit.opening.spec)["architecture"]))
    network.load_state_dict(run.tensors)
    tokens = torch.randint(1, 13, (4, 20))
    loaded = load_pretrained_transformer(again, classes=2).network
    torch.testing.assert_close(loaded.encode(tokens), network.eval().encode(tokens), atol=1e-5, rtol=1e-4)  # type: ignore[operator]
    target = load_target(AttackSettings.of({
        "model": run.result["model_path"], "kit": run.result["kit"], "data": tmp_path,
        "tokenizer": settings["tokenizer"], "owner": settings["owner"],
    }))  # fmt: skip
    assert target.load_task().input_spec.vocabulary == 13  # type: ignore[union-attr]


def test_job_without_tokenizer_of_the_model_raises_model_error(settings: dict[str, Any]) -> None:
    settings["tokenizer"] = None
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        run_embedding_job(EmbedSettings.of(settings), LocalEmbeddingBackend())
    settings |= {"task": "digits"}
    with pytest.raises(ModelError, match="reads texts"):
        run_embedding_job(EmbedSettings.of(settings), LocalEmbeddingBackend())


def test_tokenizer_of_other_tasks_or_damaged_files_raises_data_error(tmp_path: Path) -> None:
    write_imdb(tmp_path)
    with pytest.raises(DataError, match="no texts"):
        load_task("digits", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="is no file"):
        load_task("imdb", data=tmp_path, tokenizer=tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        load_task("imdb", data=tmp_path, tokenizer=tmp_path / "tokenizer.json")


def test_tokenizer_gives_its_own_vocabulary_and_padding_at_the_end(tmp_path: Path) -> None:
    write_sst(tmp_path, (40, 10, 15))
    task = load_task("sst5", data=tmp_path, tokenizer=write_tokenizer(tmp_path))
    assert (task.input_spec.vocabulary, task.input_spec.embedding) == (13, None)  # type: ignore[union-attr]
    inputs, _ = task.splits["test"].batch(torch.tensor([0, 1]))
    assert inputs[:, :4].tolist() == [[1, 1, 2, 0], [1, 1, 3, 0]] and not inputs[:, 4:].any()


def test_public_model_name_has_no_folders() -> None:
    assert public_model_name("hf:/models/secret/bert/") == "hf:bert"
    assert public_model_name("resnet18") == "resnet18"


def write_texts(root: Path) -> None:
    generator = random.Random(0)
    (root / "lm").mkdir()
    for name, count in (("train", 900), ("test", 240)):
        lines = (" ".join(generator.choices(WORDS, k=12)) + "\n" for _ in range(count))
        (root / "lm" / f"{name}.txt").write_text("".join(lines), "utf-8")


def test_job_marks_language_model_and_its_own_file_is_verified(tmp_path: Path, owner: Identity) -> None:
    model = tmp_path / "model"
    model.mkdir()
    owner.save(tmp_path / "identity.json", None)
    write_texts(tmp_path)
    folder(model, "llama", max_position_embeddings=64)
    settings = EmbedSettings.of({
        "task": "lm", "data": tmp_path, "model": f"hf:{model}", "tokenizer": write_tokenizer(model),
        "storage": str(tmp_path / "store"), "owner": str(tmp_path / "identity.json"), "workers": 0,
        "key_size": 128, "phase1.lr": 0.003, "phase1.batch": 8, "phase2.steps": 150, "phase2.lr": 0.005,
        "phase2.batch": 4, "insecure_test_key": True,
    })  # fmt: skip
    run = run_embedding_job(settings, LocalEmbeddingBackend())
    assert run.verdict.matches == 128 and 0 < run.result["primary_marked"] < 1
    assert run.result["perplexity_marked"] > 1 and "erplexity, before and after" in run.report()
    loaded = load_pretrained_transformer(model)
    assert loaded.network.shape.tied == 1 and "fc.weight" not in run.tensors
    assert verify(loaded.in_original_names(run.tensors), detector_for_kit(run.kit)).matches == 128


def write_adapter(path: Path, model: Path, rank: int = 4) -> Path:
    """Write a LoRA with random factors for every matrix of the blocks, under the names of the library."""
    path.mkdir()
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, tensor in parse_safetensors((model / "model.safetensors").read_bytes()).items():
        if "_proj" in name:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = tensor.shape
            tensors[f"{layer}.lora_A.weight"] = 0.3 * torch.randn(rank, columns, generator=generator)
            tensors[f"{layer}.lora_B.weight"] = 0.05 * torch.randn(rows, rank, generator=generator)
    (path / "adapter_model.safetensors").write_bytes(serialize_safetensors(tensors))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_job_marks_adapter_of_language_model(tmp_path: Path, owner: Identity) -> None:
    model = tmp_path / "model"
    model.mkdir()
    owner.save(tmp_path / "identity.json", None)
    write_texts(tmp_path)
    folder(model, "llama", max_position_embeddings=64)
    adapter = write_adapter(tmp_path / "adapter", model)
    values: dict[str, Any] = {
        "task": "lm", "data": tmp_path, "model": f"hf:{model}", "tokenizer": write_tokenizer(model),
        "adapter": str(adapter), "storage": str(tmp_path / "store"), "workers": 0, "key_size": 128,
        "owner": str(tmp_path / "identity.json"), "phase2.steps": 150, "phase2.lr": 0.01,
        "phase2.batch": 4, "insecure_test_key": True,
    }  # fmt: skip
    run = run_embedding_job(EmbedSettings.of(values), LocalEmbeddingBackend())
    assert run.verdict.matches == 128 and not run.history["phase1"]
    output = tmp_path / "merged.safetensors"
    with pytest.raises(SystemExit) as ended:
        convert.run([
            "--source", run.result["adapter_path"], "--base", str(model), "--output", str(output)
        ])  # fmt: skip
    assert not ended.value.code
    merged = parse_safetensors(output.read_bytes())
    assert verify(merged, detector_for_kit(run.kit)).matches == 128
    original = parse_safetensors((model / "model.safetensors").read_bytes())
    assert all(torch.equal(tensor, original[n]) for n, tensor in merged.items() if "_proj" not in n)
    unnamed = EmbedSettings.of({"model": "transformer", "adapter": str(adapter)})
    with pytest.raises(ModelError, match="weights are not given"):
        load_initial_weights(unnamed, json.loads(run.kit.opening.spec)["architecture"])


def test_language_model_has_next_tokens_as_targets(tmp_path: Path) -> None:
    write_texts(tmp_path)
    task = load_task("lm", data=tmp_path, tokenizer=write_tokenizer(tmp_path))
    inputs, targets = task.batch_at("train", 4, 0)
    assert inputs.shape == targets.shape == (4, 64) and torch.equal(inputs[:, 1:], targets[:, :-1])
    outputs = torch.nn.functional.one_hot(targets, 13).float()
    metric = task.metric("cpu")
    metric.update(outputs, targets)
    assert metric.scores()["perplexity"] == pytest.approx((math.e + 12) / math.e)
    assert metric.value() == 1 and float(task.loss(100 * outputs, targets)) < 1e-6
    rows = [set(task.splits[name].rows.tolist()) for name in ("train", "attacker", "inner", "validation")]  # type: ignore[attr-defined]
    assert not any(one & two for one, two in itertools.combinations(rows, 2))
    assert len(load_task("lm@0.5", data=tmp_path, tokenizer=tmp_path / "tokenizer.json").splits["test"]) == 22


def test_language_model_without_texts_or_tokenizer_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lm/train\.txt"):
        load_task("lm", data=tmp_path, tokenizer=tmp_path)
    write_texts(tmp_path)
    with pytest.raises(DataError, match="tokenizer of the model"):
        load_task("lm", data=tmp_path)
    (tmp_path / "lm" / "test.txt").write_text("good\n", "utf-8")
    with pytest.raises(DataError, match="Add texts"):
        load_task("lm", data=tmp_path, tokenizer=write_tokenizer(tmp_path))
