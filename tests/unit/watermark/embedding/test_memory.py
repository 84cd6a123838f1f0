from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import SettingsError
from mtlsign.models.architectures import architecture_for
from mtlsign.models.input_spec import ImageSpec, InputSpec, TextSpec
from mtlsign.models.loading import architecture_from_settings
from mtlsign.watermark.embedding import memory
from mtlsign.watermark.embedding.pipeline import LocalEmbeddingBackend, run_embedding_job
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.keys.identity import Identity

IMAGES = ImageSpec(3, 32, 32, 10)
TEXTS = TextSpec(vocabulary=2000, embedding=50, length=56, classes=2)
MIB = 2**20


def estimate(
    name: str, spec: InputSpec, width: int, *, checkpointing: bool = False, **options: Any
) -> memory.MemoryEstimate:
    settings = EmbedSettings.of({"task": "custom", "model": name, "width": width, **options}).with_defaults()
    architecture = architecture_for(name, **spec.architecture_fields, width=width)
    result = memory.estimate_memory(settings, architecture, spec, checkpointing=checkpointing)
    assert result is not None
    return result


def test_estimate_grows_with_batch_width_and_workers() -> None:
    small, wide = estimate("resnet18", IMAGES, 16), estimate("resnet18", IMAGES, 64)
    assert small.phase1 < wide.phase1 and small.bases < wide.bases and small.phase2 < wide.phase2
    large = estimate("resnet18", IMAGES, 16, **{"phase1.batch": 1024, "phase2.batch": 64})
    assert large.phase1 > 2 * small.phase1 - 90 * MIB and large.phase2 < small.phase2
    assert wide.peak == max(wide.phase1, wide.bases, wide.phase2)


def test_estimate_of_wide_networks_has_their_covariances() -> None:
    keyed, spread = (estimate("resnet18", IMAGES, 64, head=head) for head in ("keyed", "spread"))
    largest = 8 * 4608**2  # 512 channels of 3x3
    assert spread.bases - keyed.bases > 5 * largest


def test_estimate_of_checkpointed_resnet_is_about_half() -> None:
    photos = ImageSpec(3, 224, 224, 1000)
    plain = estimate("resnet50", photos, 64)
    reduced = estimate("resnet50", photos, 64, checkpointing=True)
    assert 9 * 2**30 < plain.phase2 < 16 * 2**30
    assert reduced.phase2 < 12 * 2**30 and reduced.phase2 < 0.6 * plain.phase2
    assert (
        estimate("transformer", TEXTS, 64, checkpointing=True).phase2
        <= estimate("transformer", TEXTS, 64).phase2
    )


def test_estimate_of_detectors_grows_with_batch_and_image_size() -> None:
    scenes = ImageSpec(3, 96, 128, 3, outputs="instances")

    def detector(spec: ImageSpec, batch: int) -> memory.MemoryEstimate:
        options = {"task": "custom", "model": "cascade-resnet18", "width": 16, "phase2.batch": batch}
        settings = EmbedSettings.of(options).with_defaults()
        result = memory.estimate_memory(settings, architecture_from_settings(settings, spec), spec)
        assert result is not None
        return result

    one, four = detector(scenes, 1), detector(scenes, 4)
    assert four.phase2 - one.phase2 > 3 * 20 * MIB
    larger = detector(ImageSpec(3, 192, 256, 3, outputs="instances"), 4)
    assert larger.phase2 > 1.05 * four.phase2 and larger.verification == four.verification


def test_estimate_of_head_that_reads_key_images_grows_with_their_number_and_size() -> None:
    sizes = [
        estimate("resnet18", ImageSpec(3, 64, 64, 10), 64, head="keyed", **options).phase2
        for options in ({"key_size": 256}, {"key_size": 4096}, {"key_size": 4096, "carrier_size": 128})
    ]
    assert sizes[0] < sizes[1] < sizes[2] / 2


@pytest.mark.parametrize("name", ["bilstm", "transformer", "gru"])
def test_estimate_of_networks_of_texts_has_their_activations(name: str) -> None:
    one, many = (estimate(name, TEXTS, 64, **{"phase2.batch": batch}) for batch in (64, 640))
    assert many.phase2 - one.phase2 > 576 * 56 * 64 * 4


def test_estimate_of_network_that_needs_values_is_none() -> None:
    architecture = architecture_for("resnet18", channels=1, classes=4, width=8)
    settings = EmbedSettings.of({"task": "custom", "model": "resnet18"}).with_defaults()
    assert memory.estimate_memory(settings, architecture, ImageSpec(7, 8, 8, 4)) is None


def test_available_memory_is_that_of_this_machine() -> None:
    available = memory.available_memory(torch.device("cpu"))
    assert available is None or 2**26 < available < 2**50


def test_job_without_enough_memory_is_refused_before_training(
    tmp_path: Path, owner: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.save(tmp_path / "identity.json", None)
    monkeypatch.setattr(memory, "available_memory", lambda device: 100 * MIB)
    settings = EmbedSettings.of({
        "storage": str(tmp_path / "store"), "owner": str(tmp_path / "identity.json"), "workers": 0,
        "width": 64, "insecure_test_key": True,
    })  # fmt: skip
    with pytest.raises(SettingsError, match=r"1\.[0-9] GiB .* 0\.1 GiB are free") as raised:
        run_embedding_job(settings, LocalEmbeddingBackend())
    assert raised.value.field == "phase2.batch"


def test_job_with_too_little_memory_for_all_activations_checkpoints_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    architecture = architecture_for("resnet18", **IMAGES.architecture_fields, width=64)
    options = {"task": "custom", "model": "resnet18", "width": 64, "head": "keyed", "key_size": 128}
    settings = EmbedSettings.of(options).with_defaults()
    plain = memory.estimate_memory(settings, architecture, IMAGES)
    reduced = memory.estimate_memory(settings, architecture, IMAGES, checkpointing=True)
    assert plain is not None and reduced is not None
    rows: list[Any] = []
    worker = SingleProcessContext(on_progress=rows.append)

    def inside(available: int, mode: str) -> bool:
        monkeypatch.setattr(memory, "available_memory", lambda device: available)
        chosen = settings.updated({"activation_checkpointing": mode})
        return memory.check_memory(chosen, architecture, IMAGES, worker, phase=1)

    middle = (plain.peak + reduced.peak) // 2
    assert not inside(plain.peak + MIB, "auto") and not rows
    assert inside(middle, "auto") and "computed again in the backward pass" in rows[0]["warning"]
    assert inside(plain.peak + MIB, "always") and not inside(plain.peak + MIB, "never")
    for mode, available in (("auto", reduced.peak - MIB), ("never", middle)):
        with pytest.raises(SettingsError, match="--activation-checkpointing always"):
            inside(available, mode)
