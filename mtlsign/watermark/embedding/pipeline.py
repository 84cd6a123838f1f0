"""Embedding pipeline: phase 1 → W0 → reference → signed spec → key → phase 2 → marked W → artifacts.

`run_embedding_job` runs the job on an `EmbeddingBackend`: `LocalEmbeddingBackend` is one process, and
`mtlsign.distributed.train` has Ray Train. `mtlsign.watermark.embedding.module` marks a module of the caller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import KeyMaterialError
from mtlsign.models import architectures
from mtlsign.models.activation_checkpointing import checkpointed
from mtlsign.models.input_spec import InputSpec
from mtlsign.models.loading import (
    architecture_from_settings,
    cpu_state,
    custom_factories,
    initialize_pretrained,
    load_adapter,
    load_initial_weights,
    load_tensors,
)
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding.advice import chance_warning, key_size_warning, public_base_warning
from mtlsign.watermark.embedding.base_kit import load_base_weights
from mtlsign.watermark.embedding.commitment import (
    commit_keys,
    measure_response_bases,
    needs_response_bases,
    validate_before_training,
)
from mtlsign.watermark.embedding.loop import evaluate
from mtlsign.watermark.embedding.low_rank import LowRankTraining
from mtlsign.watermark.embedding.memory import check_memory
from mtlsign.watermark.embedding.phase1 import train_clean_model
from mtlsign.watermark.embedding.phase2 import embed_watermark
from mtlsign.watermark.embedding.result import EmbeddingResult, Phase2Result, Rows, Tensors, build_result
from mtlsign.watermark.embedding.run_folder import EmbeddingRun
from mtlsign.watermark.embedding.worker import SingleProcessContext, WorkerContext
from mtlsign.watermark.keys.identity import (
    Identity,
    default_identity_path,
    load_identity,
    load_or_create_identity,
)
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import require_kit_owner
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference

ProgressCallback = Callable[[Mapping[str, Any]], None]


class EmbeddingBackend(Protocol):
    """Execution of the two phases: in this process, or on a cluster."""

    def inspect_task(self, settings: EmbedSettings) -> InputSpec:
        """Check the data wherever they will be read, and return the task's inputs."""

    def train_clean(
        self, settings: EmbedSettings, run: EmbeddingRun, architecture: Mapping[str, object]
    ) -> tuple[Tensors, Rows]:
        """Run phase 1, or resume it from its last checkpoint.

        Args:
            settings: complete settings.
            run: the run folder, which stores checkpoints.
            architecture: fields of the spec's `architecture`.

        Returns:
            W0 and the rows of metrics.
        """

    def response_bases(
        self, settings: EmbedSettings, base_weights: Tensors, architecture: Mapping[str, object]
    ) -> dict[str, Tensor] | None:
        """Compute W0's response bases where the data are; None if no head needs them."""

    def embed_watermark(
        self,
        settings: EmbedSettings,
        run: EmbeddingRun,
        base_weights: Tensors,
        openings: Sequence[KeyOpening],
        reference: Reference,
    ) -> Phase2Result:
        """Run phase 2, or resume it from its last checkpoint.

        Args:
            settings: complete settings.
            run: the run folder, which stores checkpoints.
            base_weights: state dict of W0.
            openings: the opened keys.
            reference: W0's reference.
        """


def run_embedding_job(
    settings: EmbedSettings, backend: EmbeddingBackend, *, log: Callable[[str], None] = lambda _: None
) -> EmbeddingResult:
    """Run the embedding job and write its artifacts. A resumed run continues after its last checkpoint.

    Args:
        settings: settings of the job.
        backend: execution of the two phases.
        log: called with lines for the terminal.

    Returns:
        The marked model, the owner kit, the verdict and the metrics.

    Raises:
        MTLSignError: an input is invalid, or the storage is unreachable.
    """
    # Nothing is written before `reserve_name`, so that a run with invalid settings leaves no files.
    run, settings = EmbeddingRun.open(settings)
    _check_identity(settings)
    input_spec = backend.inspect_task(settings)
    architecture = architecture_from_settings(settings, input_spec)
    factories = custom_factories(architecture)
    phase1 = stored = run.load_clean_model()
    if phase1 is None:
        validate_before_training(settings, architecture, input_spec, factories, log=log)
        if settings.weights is not None or settings.adapter is not None:
            phase1 = load_initial_weights(settings, architecture, log=log), []
    identity, path, created = _load_identity(settings)
    secret = EncryptionSecret.from_kit_key(identity.kit_key)
    if phase1 is None and settings.base_kit is not None:
        require_kit_owner(settings.base_kit, identity.public_key, endpoint=settings.endpoint)
        phase1 = load_base_weights(settings, architecture, secret), []
    run.reserve_name(settings)
    _logged(log, key_size_warning((settings.key_size or 0) * (1 + len(settings.readouts))))
    log(f"{'new owner identity, back it up:' if created else 'owner identity'} {path}")
    log(f"run {run.name}; if it is interrupted: {settings.resume_flags(run.name)}")
    phase1 = phase1 or backend.train_clean(settings, run, architecture)
    if stored is None:
        run.save_clean_model(*phase1)
    base_weights, rows = phase1
    warning = _logged(log, public_base_warning(base_weights, settings))
    commitment = run.load_commitment(secret)
    if commitment is None:
        bases = backend.response_bases(settings, base_weights, architecture)
        template_model = architectures.build(architecture, factories=factories)
        openings, reference = commit_keys(
            template_model, base_weights, architecture, input_spec, settings, identity, bases=bases
        )
        run.save_commitment(openings, reference.raw_bytes, secret)
    else:
        openings, reference = commitment[0], Reference.from_bytes(commitment[1])
    phase2 = backend.embed_watermark(settings, run, base_weights, openings, reference)
    result = build_result(
        base_weights, rows, openings, reference, phase2, settings, factories=factories, warning=warning
    )
    result.save(run.storage, secret)
    report, result_path = run.location("report.html"), run.location("result.json")
    result.result |= {"run": run.name, "report": report, "result": result_path}
    run.finish(result.result, result.history, result.report(), settings)
    return result


def _logged(log: Callable[[str], None], warning: str | None) -> str | None:
    """Log a warning if there is one, and return it."""
    if warning is not None:
        log(f"warning: {warning}")
    return warning


def _load_identity(settings: EmbedSettings) -> tuple[Identity, Path, bool]:
    """Return the identity, its file and whether it was created. A run or kit that exists has an identity."""
    if settings.resume is None and settings.base_kit is None:
        return load_or_create_identity(settings.owner, settings.passphrase_file)
    return *load_identity(settings.owner, settings.passphrase_file), False


def _check_identity(settings: EmbedSettings) -> None:
    """Check the owner's identity file, if it exists, before any work."""
    path = settings.owner or default_identity_path()
    if "://" not in settings.storage and path.resolve().is_relative_to(Path(settings.storage).resolve()):
        raise KeyMaterialError(
            "The identity file is inside --storage, which is meant to be shared. Move it elsewhere.",
            field="owner",
        )
    if settings.owner is not None or path.exists():
        load_or_create_identity(settings.owner, settings.passphrase_file)


class LocalEmbeddingBackend:
    """Embedding backend that runs both phases in this process, without Ray (`--workers 0`)."""

    def __init__(self, on_progress: ProgressCallback | None = None) -> None:
        self._on_progress = on_progress
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def inspect_task(self, settings: EmbedSettings) -> InputSpec:
        """Load the task and return its inputs."""
        return inspect_task(settings)

    def train_clean(
        self, settings: EmbedSettings, run: EmbeddingRun, architecture: Mapping[str, object]
    ) -> tuple[Tensors, Rows]:
        """Run phase 1; see `EmbeddingBackend.train_clean`."""
        return run_phase1(settings, architecture, self._worker(run, "clean"))

    def response_bases(
        self, settings: EmbedSettings, base_weights: Tensors, architecture: Mapping[str, object]
    ) -> dict[str, Tensor] | None:
        """Compute W0's response bases; see `EmbeddingBackend.response_bases`."""
        return run_response_bases(settings, base_weights, architecture)

    def embed_watermark(
        self,
        settings: EmbedSettings,
        run: EmbeddingRun,
        base_weights: Tensors,
        openings: Sequence[KeyOpening],
        reference: Reference,
    ) -> Phase2Result:
        """Run phase 2; see `EmbeddingBackend.embed_watermark`."""
        return run_phase2(settings, base_weights, openings, reference, self._worker(run, "mark"))

    def _worker(self, run: EmbeddingRun, phase: str) -> SingleProcessContext:
        return SingleProcessContext(
            self._device,
            on_progress=self._on_progress,
            on_checkpoint=lambda state: run.save_checkpoint(phase, state),
            state=run.load_checkpoint(phase),
        )


def run_phase1(
    settings: EmbedSettings, architecture: Mapping[str, object], worker: WorkerContext
) -> tuple[Tensors, Rows]:
    """Run phase 1 as one rank, from settings alone.

    Args:
        settings: complete settings.
        architecture: fields of the spec's `architecture`.
        worker: this process of the phase.

    Returns:
        W0 and the rows of metrics.
    """
    task = _load_task(settings)
    checkpointing = check_memory(settings, architecture, task.input_spec, worker, phase=1)
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"init/{settings.seed}".encode()).digest()[:7]))
    model = architectures.build(architecture, factories=custom_factories(architecture))
    initialize_pretrained(model, settings)
    with checkpointed(model, enabled=checkpointing):
        rows = train_clean_model(model, task, settings, worker)
    return cpu_state(model), rows


def run_response_bases(
    settings: EmbedSettings, base_weights: Tensors, architecture: Mapping[str, object]
) -> dict[str, Tensor] | None:
    """Compute W0's response bases, from settings alone; None if no head needs them.

    Args:
        settings: complete settings.
        base_weights: state dict of W0.
        architecture: fields of the spec's `architecture`.
    """
    if not needs_response_bases(settings):
        return None
    model = architectures.build(architecture, factories=custom_factories(architecture))
    return measure_response_bases(model, base_weights, _load_task(settings), settings)


def run_phase2(
    settings: EmbedSettings,
    base_weights: Tensors,
    openings: Sequence[KeyOpening],
    reference: Reference,
    worker: WorkerContext,
) -> Phase2Result:
    """Run phase 2 as one rank. The openings are the keys; the identity's private key is not needed.

    Args:
        settings: complete settings.
        base_weights: state dict of W0.
        openings: the opened keys.
        reference: W0's reference.
        worker: this process of the phase.
    """
    architecture = openings[0].parse().architecture
    factories, task = custom_factories(architecture), _load_task(settings)
    checkpointing = check_memory(settings, architecture, task.input_spec, worker, phase=2)
    model = architectures.build(architecture, factories=factories)
    load_tensors(model, base_weights)
    detector = WatermarkDetector.joined(openings, reference, device=worker.device, factories=factories)
    with checkpointed(model, enabled=checkpointing):
        return phase2_result(model, task, detector, settings, worker)


def phase2_result(
    model: nn.Module, task: Task, detector: WatermarkDetector, settings: EmbedSettings, worker: WorkerContext
) -> Phase2Result:
    """Run phase 2 on a network that holds W0. A clean model at chance is reported before the first step.

    Args:
        model: the network; it holds W afterwards.
        task: the primary task.
        detector: the owner's detector.
        settings: complete settings.
        worker: this process of the phase.
    """
    if task.targets == "labels" and worker.load_checkpoint() is None:
        accuracy = evaluate(model, task, "validation", settings, worker)
        if warning := chance_warning(accuracy, task.classes, task.size("validation")):
            row = {"phase": "mark", "step": 0, "of": settings.phase2.steps, "warning": warning}
            worker.show_progress(row)
    adapter = load_adapter(settings, model.state_dict())
    low_rank = None if adapter is None else LowRankTraining(adapter)
    rows, measured = embed_watermark(model, task, detector, settings, worker, low_rank)
    files = {} if low_rank is None else low_rank.files()
    return Phase2Result(
        cpu_state(model), detector.head_bytes(), rows, measured, task.model_files, task.data_digest, files
    )


def inspect_task(settings: EmbedSettings) -> InputSpec:
    """Load the task and return its inputs. Raises `DataError` if data are missing."""
    return _load_task(settings).input_spec


def _load_task(settings: EmbedSettings) -> Task:
    return load_task(
        settings.task,
        data=settings.data,
        download=settings.download,
        tokenizer=settings.tokenizer,
        seed=settings.seed,
    )
