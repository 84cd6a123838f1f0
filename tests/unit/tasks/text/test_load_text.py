from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from mtlsign.config.embed_defaults import TEXT_TASKS
from mtlsign.errors import DataError
from mtlsign.models.input_spec import TextSpec
from mtlsign.tasks import NAMES, SPLITS, load_task, text
from tests.unit.tasks.text.layouts import write_glove, write_imdb, write_sst

pytestmark = pytest.mark.filterwarnings("ignore:.*of the official")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_glove(tmp_path)
    write_sst(tmp_path, (40, 10, 15))
    write_imdb(tmp_path)
    return tmp_path


def test_load_task_lists_text_tasks() -> None:
    assert set(TEXT_TASKS) == {*text.NAMES, "lm"} <= set(NAMES)


def test_load_task_sst5_uses_official_parts(root: Path) -> None:
    task = load_task("sst5", data=root)
    sizes = {part: task.size(part) for part in SPLITS}
    assert sizes == {"train": 36, "inner": 4, "validation": 10, "attacker": 4, "test": 15}
    assert task.input_spec == TextSpec(vocabulary=5, embedding=50, length=56, classes=5)
    vectors = task.initial_tensors["embedding.weight"]
    assert vectors.shape == (5, 50) and vectors.dtype == torch.float32 and not vectors[0].any()
    inputs, targets = task.splits["test"].batch(torch.tensor([0, 1]))
    assert targets.tolist() == [0, 1]
    tokenizer = Tokenizer.from_str(task.model_files["tokenizer.json"].decode())
    assert inputs[0].tolist() == tokenizer.encode("The film0 good").ids
    # "the" is most frequent, "bad" and "good" are equally frequent, "film0" is unknown
    assert inputs[:, :4].tolist() == [[2, 1, 4, 0], [2, 1, 3, 0]] and not inputs[:, 4:].any()


def test_load_task_sst2_has_two_classes(root: Path) -> None:
    task = load_task("sst2", data=root)
    assert task.classes == 2 and task.size("test") == 12 and task.size("validation") == 8


def test_load_task_imdb_cuts_validation_out_of_training_part(root: Path) -> None:
    task = load_task("imdb", data=root)
    sizes = {part: task.size(part) for part in SPLITS}
    assert sizes == {"train": 34, "inner": 3, "validation": 2, "attacker": 4, "test": 12}
    assert task.input_spec == TextSpec(vocabulary=7, embedding=50, length=200, classes=2)
    assert task.splits["test"].batch(torch.arange(12)).targets.tolist() == [0] * 6 + [1] * 6


def test_load_task_of_texts_gives_equal_batches_for_equal_seeds(root: Path) -> None:
    one, two, other = (load_task("sst5", data=root, seed=seed) for seed in (1, 1, 2))
    for step in range(3):
        a, b = (task.batch_at("train", 8, step, augment=True) for task in (one, two))
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
    test, other_test = (task.splits["test"].batch(torch.arange(15)) for task in (one, other))
    assert torch.equal(test.inputs, other_test.inputs)
    assert torch.equal(one.initial_tensors["embedding.weight"], other.initial_tensors["embedding.weight"])
    rows = [set(task.splits["train"].rows.tolist()) for task in (one, two, other)]  # type: ignore[attr-defined]
    assert rows[0] == rows[1] != rows[2]
    assert not rows[0] & set(one.splits["attacker"].rows.tolist())  # type: ignore[attr-defined]


def test_load_task_of_texts_with_share_keeps_same_texts_for_all_seeds(root: Path) -> None:
    one, two = (load_task("imdb@0.5", data=root, seed=seed) for seed in (0, 1))
    assert one.name == "imdb@0.5" and one.size("test") == 10
    assert sum(one.size(part) for part in ("train", "validation", "attacker")) == 20
    a, b = (task.splits["test"].batch(torch.arange(10)) for task in (one, two))
    assert torch.equal(a.inputs, b.inputs) and a.targets.sum() == 5
    with pytest.raises(DataError, match="share"):
        load_task("imdb@2", data=root)


@pytest.mark.parametrize("name", ["imdb", "sst2", "sst5"])
def test_load_task_of_texts_without_glove_names_its_file(root: Path, name: str) -> None:
    (root / "glove.6B" / "glove.6B.50d.txt").unlink()
    with pytest.raises(DataError, match=rf"{name} is incomplete: glove.6B/glove.6B.50d.txt.*glove.6B.zip"):
        load_task(name, data=root, download=True)
