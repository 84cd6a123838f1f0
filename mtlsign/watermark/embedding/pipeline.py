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
    TaskShape,
    check_is,
    cpu_state,
    graph_of,
    initial,
    own_arch,
    owner_factories,
)
from mtlsign.tasks import Task, from_loaders, load_task
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.embedding import training
from mtlsign.watermark.embedding.result import Embedded, Marked, Rows, Tensors, conclude
from mtlsign.watermark.embedding.run_folder import Run
from mtlsign.watermark.embedding.worker import Alone, Rank
from mtlsign.watermark.keys.identity import Identity, default_identity_path, load_or_create_identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.sealing import Secret
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.detector import Probe
from mtlsign.watermark.verification.reference import Reference, make_reference

Show = Callable[[Mapping[str, Any]], None]


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
    show: Show | None = None,
    **options: Any,
) -> Embedded:
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
    name = own_arch(type(module))
    s = EmbedSettings.of({"task": "own", "model": str((graph or {}).get("arch", name)), **options}).resolved()
    if graph is not None:
        check_is(module, graph)
    task = data if isinstance(data, Task) else from_loaders(data, loss=loss, metric=metric, seed=s.seed)
    fields: dict[str, object] = {"arch": name, "channels": task.channels, "classes": task.classes}
    fields = dict(graph) if graph is not None else fields
    owner = identity or load_or_create_identity(s.owner, s.passphrase_file)[0]
    rank, skeleton = Alone(device, show=show), copy.deepcopy(module).cpu()
    rows = [] if trained else training.train_clean(module, task, s, rank)
    w0 = cpu_state(module)
    opening, reference = commit(skeleton, w0, fields, (task.channels, task.height, task.width), s, owner)
    factories = {str(fields["arch"])[4:]: lambda: copy.deepcopy(skeleton)}
    probe = Probe(opening, reference, device=device, factories=factories)
    marked_rows, measured = training.watermark(module, task, probe, s, rank)
    marked = Marked(cpu_state(module), probe.head.to_bytes(), marked_rows, measured)
    return conclude(w0, rows, opening, reference, marked, s, factories=factories)


class Runner(Protocol):
    """Where the two phases run."""

    def shape(self, s: EmbedSettings) -> TaskShape:
        """Check the data wherever they will be read, and say what they are."""

    def clean(self, s: EmbedSettings, run: Run, graph: Mapping[str, object]) -> tuple[Tensors, Rows]:
        """Phase 1, resumed if it was begun."""

    def mark(
        self, s: EmbedSettings, run: Run, w0: Tensors, opening: KeyOpening, reference: Reference
    ) -> Marked:
        """Phase 2, resumed if it was begun."""


def run(s: EmbedSettings, runner: Runner, *, say: Callable[[str], None] = lambda _: None) -> Embedded:
    """The main job: settings in, artifacts in storage out; what a resumed run has is not done again."""
    kept, s = Run.open(s)  # up to kept.begin nothing is written: a run that cannot work leaves no trace
    path = s.owner or default_identity_path()
    _refuse_inside(path, s.storage)
    if s.owner is not None or path.exists():
        load_or_create_identity(s.owner, s.passphrase_file)
    shape = runner.shape(s)
    graph = graph_of(s, shape)
    factories = owner_factories(graph)
    done = kept.clean()
    begun = done is not None
    if done is None:
        _rehearse(s, graph, shape, factories)
        if s.init is not None:
            done = initial(s, graph), []
    identity, path, made = load_or_create_identity(s.owner, s.passphrase_file)
    secret = Secret.from_kit_key(identity.kit_key)
    kept.begin(s)
    say(f"{'made a new owner identity: back up' if made else 'owner identity'} {path}")
    say(f"run {kept.name}; if it is interrupted: --resume {kept.name}")
    if done is None:
        done = runner.clean(s, kept, graph)
    if not begun:
        kept.keep_clean(*done)
    w0, rows = done
    committed = kept.commitment(secret)
    if committed is None:
        skeleton = architectures.build(graph, factories=factories)
        geometry = (shape.channels, shape.height, shape.width)
        opening, reference = commit(skeleton, w0, graph, geometry, s, identity)
        kept.keep_commitment(opening, reference.data, secret)
    else:
        opening, reference = committed[0], Reference.from_bytes(committed[1])
    marked = runner.mark(s, kept, w0, opening, reference)
    done_all = conclude(w0, rows, opening, reference, marked, s, factories=factories)
    done_all.save(kept.storage, secret)
    places = {name: kept.folder.child(name).uri for name in ("report.html", "result.json")}
    done_all.result |= {"run": kept.name, "report": places["report.html"], "result": places["result.json"]}
    kept.finish(done_all.result, done_all.history, done_all.report(), keep=s.keep_checkpoints)
    return done_all


class PlainRunner:
    """Both phases in this process, without Ray (`--workers 0`): where there is only torch."""

    def __init__(self, show: Show | None = None) -> None:
        self._show = show
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _rank(self, run: Run, phase: str) -> Alone:
        state = run.checkpoint(phase)
        return Alone(
            self._device, show=self._show, keep=lambda kept: run.keep_checkpoint(phase, kept), state=state
        )

    def shape(self, s: EmbedSettings) -> TaskShape:
        """Load the task here."""
        return task_shape(s)

    def clean(self, s: EmbedSettings, run: Run, graph: Mapping[str, object]) -> tuple[Tensors, Rows]:
        """Phase 1 here."""
        return clean_phase(s, graph, self._rank(run, "clean"))

    def mark(
        self, s: EmbedSettings, run: Run, w0: Tensors, opening: KeyOpening, reference: Reference
    ) -> Marked:
        """Phase 2 here."""
        return mark_phase(s, w0, opening, reference, self._rank(run, "mark"))


def clean_phase(s: EmbedSettings, graph: Mapping[str, object], rank: Rank) -> tuple[Tensors, Rows]:
    """Phase 1 as one rank, from settings alone."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"init/{s.seed}".encode()).digest()[:7]))
    model = architectures.build(graph, factories=owner_factories(graph))
    rows = training.train_clean(model, _task(s), s, rank)
    return cpu_state(model), rows


def mark_phase(
    s: EmbedSettings, w0: Tensors, opening: KeyOpening, reference: Reference, rank: Rank
) -> Marked:
    """Phase 2 as one rank. The opening is the key; the identity's private half is not here."""
    graph = opening.parse().graph
    factories = owner_factories(graph)
    model = architectures.build(graph, factories=factories)
    model.load_state_dict(w0)
    probe = Probe(opening, reference, device=rank.device, factories=factories)
    rows, measured = training.watermark(model, _task(s), probe, s, rank)
    return Marked(cpu_state(model), probe.head.to_bytes(), rows, measured)


def commit(
    skeleton: nn.Module,
    w0: Tensors,
    graph: Mapping[str, object],
    geometry: tuple[int, int, int],
    s: EmbedSettings,
    owner: Identity,
) -> tuple[KeyOpening, Reference]:
    """Between the phases: W0 → reference → spec → the owner's signature (design decision 2).

    `geometry` is (channels, height, width) of the task's images; the carrier keeps it up to 64 pixels.
    """
    skeleton.load_state_dict(w0)
    names = (
        tuple(t.strip() for t in s.taps.split(",") if t.strip())
        if s.taps
        else architectures.default_taps(skeleton, s.head)
    )
    channels, height, width = geometry
    if s.carrier_size is not None:
        height = width = s.carrier_size
    elif max(height, width) > 64:
        height = width = 64
    n = s.key_size or 1024
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
    if s.insecure_test_key:
        nonce = hashlib.sha256(f"mtlsign insecure test nonce {s.seed}".encode()).digest()
    head = (
        {"kind": "keyed"}
        if s.head == "keyed"
        else {"kind": "free", "hidden": s.hidden, "features": s.features}
    )
    spec = make_spec(
        name=s.name, nonce=nonce.hex(), n=n, readouts=1, carrier=carrier, taps=list(names), head=head,
        statistic=s.statistic, normalise="key-batch", graph=dict(graph), reference=reference.digest,
    )  # fmt: skip
    return sign_spec(owner, spec), reference


def task_shape(s: EmbedSettings) -> TaskShape:
    """Load the task and say what its images are. Raises `DataError` where data are missing."""
    task = _task(s)
    return TaskShape(task.channels, task.height, task.width, task.classes)


def _rehearse(
    s: EmbedSettings, graph: Mapping[str, object], shape: TaskShape, factories: Mapping[str, Factory]
) -> None:
    """Commit to random weights for nobody, so that taps, carrier and head are refused before phase 1."""
    skeleton = architectures.build(graph, factories=factories)
    geometry = (shape.channels, shape.height, shape.width)
    Probe(
        *commit(skeleton, cpu_state(skeleton), graph, geometry, s, Identity.generate()), factories=factories
    )


def _task(s: EmbedSettings) -> Task:
    return load_task(s.task, data=s.data, download=s.download, seed=s.seed)


def _refuse_inside(path: Path, storage: str) -> None:
    if "://" not in storage and path.resolve().is_relative_to(Path(storage).resolve()):
        raise KeyMaterialError(
            "lies inside --storage, which is meant to be shared; keep the identity elsewhere", field="owner"
        )
