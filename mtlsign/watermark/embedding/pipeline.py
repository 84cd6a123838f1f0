"""The whole of embedding: phase 1 → W0 → reference → the owner signs → key → phase 2 → marked W → artifacts.

`embed` does it in one process with a notebook's own objects. `run` does it for a job, in the places that a
`Runner` offers: `PlainRunner` is one process, `mtlsign.distributed.train.RayRunner` is Ray Train. What the
phases compute is in `phases.py`, their losses in `losses.py`.
"""

from __future__ import annotations

import copy
import hashlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import KeyMaterialError, ModelError
from mtlsign.models import architectures
from mtlsign.models.factories import Factory
from mtlsign.models.loading import (
    InputSpec,
    architecture_from_settings,
    cpu_state,
    custom_architecture_name,
    custom_factories,
    load_initial_weights,
    require_same_architecture,
)
from mtlsign.tasks import Task, from_loaders, load_task
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.embedding import training
from mtlsign.watermark.embedding.result import EmbeddingResult, Phase2Result, Rows, Tensors, build_result
from mtlsign.watermark.embedding.run_folder import EmbeddingRun
from mtlsign.watermark.embedding.worker import SingleProcessContext, WorkerContext
from mtlsign.watermark.keys.identity import Identity, default_identity_path, load_or_create_identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference, make_reference

ProgressCallback = Callable[[Mapping[str, Any]], None]


def embed(
    module: nn.Module,
    data: Task | Mapping[str, Any],
    *,
    trained: bool = False,
    identity: Identity | None = None,
    graph: Mapping[str, object] | None = None,
    loss: Callable[..., Tensor] | None = None,
    metric: Callable[..., Any] | None = None,
    device: torch.device | str = "cpu",
    show: ProgressCallback | None = None,
    **options: Any,
) -> EmbeddingResult:
    """Mark `module` in this process, with your own objects; also inside a running Ray.

    Args:
        module: any network; it is changed in place and holds the marked weights afterwards.
        data: a `Task`, or loaders {"train", "test"[, "validation", "attacker", "inner"]} of (x, y) batches.
        trained: the module is trained already: skip phase 1.
        identity: the owner; by default the one of this machine, made if there is none.
        graph: the module's architecture from the allow-list (`backbone.graph_for`), so that strangers can
            verify; by default only a verifier who registers `own/…` can.
        loss: mean loss of (out, y), with loaders; cross-entropy by default.
        metric: one number per sample of (out, y), with loaders; by default whether the largest logit is the
            label's.
        device: where to train.
        show: called with rows of progress.
        **options: any of `EmbedSettings`.

    Raises:
        MTLSignError: see the settings, the task and the model.
    """
    name = custom_architecture_name(type(module))
    settings = EmbedSettings.of(
        {"task": "own", "model": str((graph or {}).get("arch", name)), **options}
    ).resolved()
    if graph is not None:
        require_same_architecture(module, graph)
    task = (
        data if isinstance(data, Task) else from_loaders(data, loss=loss, metric=metric, seed=settings.seed)
    )
    fields: dict[str, object] = {"arch": name, "channels": task.channels, "classes": task.classes}
    fields = dict(graph) if graph is not None else fields
    owner = identity or load_or_create_identity(settings.owner, settings.passphrase_file)[0]
    rank, skeleton = SingleProcessContext(device, show=show), copy.deepcopy(module).cpu()
    rows = [] if trained else training.train_clean_model(module, task, settings, rank)
    base_weights = cpu_state(module)
    opening, reference = commit_key(
        skeleton, base_weights, fields, (task.channels, task.height, task.width), settings, owner
    )
    factories = {str(fields["arch"])[4:]: lambda: copy.deepcopy(skeleton)}
    detector = WatermarkDetector(opening, reference, device=device, factories=factories)
    marked_rows, measured = training.embed_watermark(module, task, detector, settings, rank)
    marked = Phase2Result(cpu_state(module), detector.head.to_bytes(), marked_rows, measured)
    return build_result(base_weights, rows, opening, reference, marked, settings, factories=factories)


class EmbeddingBackend(Protocol):
    """Where the two phases run."""

    def inspect_task(self, settings: EmbedSettings) -> InputSpec:
        """Check the data wherever they will be read, and say what they are."""

    def train_clean(
        self, settings: EmbedSettings, run: EmbeddingRun, graph: Mapping[str, object]
    ) -> tuple[Tensors, Rows]:
        """Phase 1, resumed if it was begun."""

    def embed_watermark(
        self,
        settings: EmbedSettings,
        run: EmbeddingRun,
        base_weights: Tensors,
        opening: KeyOpening,
        reference: Reference,
    ) -> Phase2Result:
        """Phase 2, resumed if it was begun."""


def run_embedding_job(
    settings: EmbedSettings, backend: EmbeddingBackend, *, say: Callable[[str], None] = lambda _: None
) -> EmbeddingResult:
    """The main job: settings in, artifacts in storage out; what a resumed run has is not done again."""
    kept, settings = EmbeddingRun.open(
        settings
    )  # up to kept.begin nothing is written: a run that cannot work leaves no trace
    path = settings.owner or default_identity_path()
    _require_identity_outside_storage(path, settings.storage)
    if settings.owner is not None or path.exists():
        load_or_create_identity(settings.owner, settings.passphrase_file)
    shape = backend.inspect_task(settings)
    graph = architecture_from_settings(settings, shape)
    factories = custom_factories(graph)
    done = kept.clean()
    begun = done is not None
    if done is None:
        _validate_before_training(settings, graph, shape, factories)
        if settings.init is not None:
            done = load_initial_weights(settings, graph), []
    identity, path, made = load_or_create_identity(settings.owner, settings.passphrase_file)
    secret = EncryptionSecret.from_kit_key(identity.kit_key)
    kept.begin(settings)
    say(f"{'made a new owner identity: back up' if made else 'owner identity'} {path}")
    say(f"run {kept.name}; if it is interrupted: --resume {kept.name}")
    if done is None:
        done = backend.train_clean(settings, kept, graph)
    if not begun:
        kept.keep_clean(*done)
    base_weights, rows = done
    committed = kept.commitment(secret)
    if committed is None:
        skeleton = architectures.build(graph, factories=factories)
        geometry = (shape.channels, shape.height, shape.width)
        opening, reference = commit_key(skeleton, base_weights, graph, geometry, settings, identity)
        kept.keep_commitment(opening, reference.data, secret)
    else:
        opening, reference = committed[0], Reference.from_bytes(committed[1])
    marked = backend.embed_watermark(settings, kept, base_weights, opening, reference)
    done_all = build_result(base_weights, rows, opening, reference, marked, settings, factories=factories)
    done_all.save(kept.storage, secret)
    places = {name: kept.folder.child(name).uri for name in ("report.html", "result.json")}
    done_all.result |= {"run": kept.name, "report": places["report.html"], "result": places["result.json"]}
    kept.finish(done_all.result, done_all.history, done_all.report(), keep=settings.keep_checkpoints)
    return done_all


class LocalEmbeddingBackend:
    """Both phases in this process, without Ray (`--workers 0`): where there is only torch."""

    def __init__(self, show: ProgressCallback | None = None) -> None:
        self._show = show
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _rank(self, run: EmbeddingRun, phase: str) -> SingleProcessContext:
        state = run.checkpoint(phase)
        return SingleProcessContext(
            self._device, show=self._show, keep=lambda kept: run.keep_checkpoint(phase, kept), state=state
        )

    def inspect_task(self, settings: EmbedSettings) -> InputSpec:
        """Load the task here."""
        return inspect_task(settings)

    def train_clean(
        self, settings: EmbedSettings, run: EmbeddingRun, graph: Mapping[str, object]
    ) -> tuple[Tensors, Rows]:
        """Phase 1 here."""
        return run_phase1(settings, graph, self._rank(run, "clean"))

    def embed_watermark(
        self,
        settings: EmbedSettings,
        run: EmbeddingRun,
        base_weights: Tensors,
        opening: KeyOpening,
        reference: Reference,
    ) -> Phase2Result:
        """Phase 2 here."""
        return run_phase2(settings, base_weights, opening, reference, self._rank(run, "mark"))


def run_phase1(
    settings: EmbedSettings, graph: Mapping[str, object], worker: WorkerContext
) -> tuple[Tensors, Rows]:
    """Phase 1 as one rank, from settings alone."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"init/{settings.seed}".encode()).digest()[:7]))
    model = architectures.build(graph, factories=custom_factories(graph))
    rows = training.train_clean_model(model, _task(settings), settings, worker)
    return cpu_state(model), rows


def run_phase2(
    settings: EmbedSettings,
    base_weights: Tensors,
    opening: KeyOpening,
    reference: Reference,
    worker: WorkerContext,
) -> Phase2Result:
    """Phase 2 as one rank. The opening is the key; the identity's private half is not here."""
    graph = opening.parse().graph
    factories = custom_factories(graph)
    model = architectures.build(graph, factories=factories)
    model.load_state_dict(base_weights)
    detector = WatermarkDetector(opening, reference, device=worker.device, factories=factories)
    rows, measured = training.embed_watermark(model, _task(settings), detector, settings, worker)
    return Phase2Result(cpu_state(model), detector.head.to_bytes(), rows, measured)


def commit_key(
    skeleton: nn.Module,
    base_weights: Tensors,
    graph: Mapping[str, object],
    geometry: tuple[int, int, int],
    settings: EmbedSettings,
    owner: Identity,
) -> tuple[KeyOpening, Reference]:
    """Between the phases: W0 → reference → spec → the owner's signature (design decision 2).

    `geometry` is (channels, height, width) of the task's images; the carrier keeps it up to 64 pixels.
    """
    skeleton.load_state_dict(base_weights)
    names = (
        tuple(t.strip() for t in settings.taps.split(",") if t.strip())
        if settings.taps
        else architectures.default_taps(skeleton, settings.head)
    )
    channels, height, width = geometry
    if settings.carrier_size is not None:
        height = width = settings.carrier_size
    elif max(height, width) > 64:
        height = width = 64
    n = settings.key_size or 1024
    carrier = qr.make_carrier(n, channels, height, width)
    sample = torch.zeros(2, channels, height, width)
    try:
        reference = make_reference(skeleton, names, sample)
    except RuntimeError as error:
        raise ModelError(
            f"cannot read {height}x{width} images ({str(error).splitlines()[0][:100]}); "
            "set --carrier-size to its input size",
            field="carrier-size",
        ) from None
    nonce = secrets.token_bytes(32)
    if settings.insecure_test_key:
        nonce = hashlib.sha256(f"mtlsign insecure test nonce {settings.seed}".encode()).digest()
    head = (
        {"kind": "keyed"}
        if settings.head == "keyed"
        else {"kind": "free", "hidden": settings.hidden, "features": settings.features}
    )
    spec = make_spec(
        name=settings.name, nonce=nonce.hex(), n=n, readouts=1, carrier=carrier, taps=list(names), head=head,
        statistic=settings.statistic, normalise="key-batch", graph=dict(graph), reference=reference.digest,
    )  # fmt: skip
    return sign_spec(owner, spec), reference


def inspect_task(settings: EmbedSettings) -> InputSpec:
    """Load the task and say what its images are. Raises `DataError` where data are missing."""
    task = _task(settings)
    return InputSpec(task.channels, task.height, task.width, task.classes)


def _validate_before_training(
    settings: EmbedSettings, graph: Mapping[str, object], shape: InputSpec, factories: Mapping[str, Factory]
) -> None:
    """Commit to random weights for nobody, so that taps, carrier and head are refused before phase 1."""
    skeleton = architectures.build(graph, factories=factories)
    geometry = (shape.channels, shape.height, shape.width)
    WatermarkDetector(
        *commit_key(skeleton, cpu_state(skeleton), graph, geometry, settings, Identity.generate()),
        factories=factories,
    )


def _task(settings: EmbedSettings) -> Task:
    return load_task(settings.task, data=settings.data, download=settings.download, seed=settings.seed)


def _require_identity_outside_storage(path: Path, storage: str) -> None:
    if "://" not in storage and path.resolve().is_relative_to(Path(storage).resolve()):
        raise KeyMaterialError(
            "lies inside --storage, which is meant to be shared; keep the identity elsewhere", field="owner"
        )
