"""The whole of embedding: phase 1 → W0 → reference → the owner signs → key → phase 2 → marked W → artifacts.

`embed` does it in one process with a notebook's own objects. `run` does it for a job, in the places that a
`Runner` offers: `PlainRunner` is one process, `mtlsign.distributed.train.RayRunner` is Ray Train. What the
phases compute is in `phases.py`, their losses in `losses.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import mtlsign
from mtlsign import backbone, phases
from mtlsign.artifact import KITS, MODELS, Kit, model_digest, write_kit, write_model
from mtlsign.carriers import qr
from mtlsign.checkpoint import load_checkpoint, load_pretrained
from mtlsign.errors import KeyMaterialError, ModelError
from mtlsign.identity import default_identity_path
from mtlsign.key import Identity, KeyOpening, load_or_create_identity, make_spec, sign_spec
from mtlsign.progress import Alone, Rank
from mtlsign.reference import Reference, make_reference
from mtlsign.runs import Run
from mtlsign.sealing import Secret
from mtlsign.settings import EmbedSettings
from mtlsign.storage import Storage
from mtlsign.tasks import Task, from_loaders, load_task
from mtlsign.tensors import tensor_bytes
from mtlsign.verification import Probe, Verdict, scores_of_all, verify

Tensors = dict[str, Tensor]
Rows = list[dict[str, Any]]
Show = Callable[[Mapping[str, Any]], None]


@dataclass
class Embedded:
    """A marked model and its proof: `tensors` are public, `kit` is the owner's secret."""

    tensors: Tensors = field(repr=False)
    kit: Kit = field(repr=False)
    verdict: Verdict
    result: dict[str, Any]
    history: dict[str, Rows] = field(repr=False)
    scores: dict[str, list[float]] = field(repr=False)

    def save(self, storage: Storage, secret: Secret) -> None:
        """Write `models/<digest>/` and `kits/<id>/` below `storage`; `result` gets their places."""
        graph = self.kit.opening.parse().graph
        config = {
            "format": "mtlsign/model/v0",
            "graph": graph,
            "task": self.result["task"],
            "name": self.result["name"],
        }
        write_model(storage, self.tensors, config, _card(self.result, graph))
        kit_id = write_kit(storage, self.kit, secret)
        self.result["kit"] = storage.child(KITS).child(kit_id).uri
        self.result["model_path"] = storage.child(MODELS).child(self.result["model_digest"]).uri

    def report(self) -> str:
        """The run's page: one self-contained HTML file."""
        # Loaded here: matplotlib takes a second, and on a new machine says that it builds its font cache.
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        from mtlsign.report import render_report

        return render_report(self.result, self.history, self.scores)


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
    name = _own_arch(type(module))
    s = EmbedSettings.of({"task": "own", "model": str((graph or {}).get("arch", name)), **options}).resolved()
    if graph is not None:
        _check_is(module, graph)
    task = data if isinstance(data, Task) else from_loaders(data, loss=loss, metric=metric, seed=s.seed)
    fields: dict[str, object] = {"arch": name, "channels": task.channels, "classes": task.classes}
    fields = dict(graph) if graph is not None else fields
    owner = identity or load_or_create_identity(s.owner, s.passphrase_file)[0]
    rank, skeleton = Alone(device, show=show), copy.deepcopy(module).cpu()
    rows = [] if trained else phases.train_clean(module, task, s, rank)
    w0 = cpu_state(module)
    opening, reference = commit(skeleton, w0, fields, (task.channels, task.height, task.width), s, owner)
    factories = {str(fields["arch"])[4:]: lambda: copy.deepcopy(skeleton)}
    probe = Probe(opening, reference, device=device, factories=factories)
    marked_rows, measured = phases.watermark(module, task, probe, s, rank)
    marked = Marked(cpu_state(module), probe.head.to_bytes(), marked_rows, measured)
    return conclude(w0, rows, opening, reference, marked, s, factories=factories)


@dataclass(frozen=True)
class Marked:
    """What phase 2 gives: W, a trained head if it is free, its rows, accuracies of W0 and W."""

    tensors: Tensors = field(repr=False)
    head: bytes | None = field(repr=False)
    rows: Rows
    measured: dict[str, float]


@dataclass(frozen=True)
class TaskShape:
    """What the driver must know of a task before any worker starts."""

    channels: int
    height: int
    width: int
    classes: int


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
        skeleton = backbone.build(graph, factories=factories)
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
    model = backbone.build(graph, factories=owner_factories(graph))
    rows = phases.train_clean(model, _task(s), s, rank)
    return cpu_state(model), rows


def mark_phase(
    s: EmbedSettings, w0: Tensors, opening: KeyOpening, reference: Reference, rank: Rank
) -> Marked:
    """Phase 2 as one rank. The opening is the key; the identity's private half is not here."""
    graph = opening.parse().graph
    factories = owner_factories(graph)
    model = backbone.build(graph, factories=factories)
    model.load_state_dict(w0)
    probe = Probe(opening, reference, device=rank.device, factories=factories)
    rows, measured = phases.watermark(model, _task(s), probe, s, rank)
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
        else backbone.default_taps(skeleton, s.head)
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


def conclude(
    w0: Tensors, rows: Rows, opening: KeyOpening, reference: Reference, marked: Marked, s: EmbedSettings,
    *, factories: Mapping[str, backbone.Factory],
) -> Embedded:  # fmt: skip
    """Verify what came out, against W0 and wrong keys too, and gather the numbers."""
    probe = Probe(opening, reference, head=marked.head, factories=factories)
    tapped = {name: w0[name] for name in (*probe.graph.kernels, *probe.graph.gammas.values()) if name in w0}
    digest = model_digest(tensor_bytes(marked.tensors))
    verdict = verify(marked.tensors, probe, controls=5, w0=tapped, model_digest=digest)
    deltas = {
        name: float((tensor.double() - w0[name].double()).norm())
        for name, tensor in marked.tensors.items()
        if tensor.is_floating_point()
    }
    result: dict[str, Any] = {
        "task": s.task, "model": s.model, "name": s.name, "width": s.width, "head": s.head, "seed": s.seed,
        "lambda1": s.lambda1, "lambda2": s.lambda2, "snapshots": s.snapshots, "steps": s.steps,
        "n": probe.spec.n,
        **marked.measured,
        "wm_accuracy": verdict.accuracy,
        "wm_accuracy_on_clean": verdict.controls["w0"][0] if verdict.controls.get("w0") else None,
        "wm_accuracy_wrong_keys": verdict.controls.get("wrong_keys", []),
        "matches": verdict.matches, "status": verdict.status, "accepted": verdict.accepted,
        "p_value": verdict.p_value, "evidence_bits": verdict.evidence_bits,
        "deviation_l2": math.sqrt(sum(d * d for d in deltas.values())), "deviation_by_layer": deltas,
        "seconds_phase1": sum(r["seconds"] for r in rows),
        "seconds_phase2": sum(r["seconds"] for r in marked.rows),
        "model_digest": digest, "kit": None,
    }  # fmt: skip
    info = {
        "model_digest": digest, "task": s.task, "name": s.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"mtlsign": mtlsign.__version__, "torch": torch.__version__},
    }  # fmt: skip
    kit = Kit(opening, reference.data, tensor_bytes(tapped), marked.head, info)
    scores = dict(zip(("marked", "w0"), scores_of_all(probe, [marked.tensors, tapped]), strict=False))
    scores |= dict(zip(("wrong_key",), scores_of_all(probe.control(0), [marked.tensors]), strict=False))
    return Embedded(marked.tensors, kit, verdict, result, {"phase1": rows, "phase2": marked.rows}, scores)


def task_shape(s: EmbedSettings) -> TaskShape:
    """Load the task and say what its images are. Raises `DataError` where data are missing."""
    task = _task(s)
    return TaskShape(task.channels, task.height, task.width, task.classes)


def graph_of(s: EmbedSettings, shape: TaskShape) -> dict[str, object]:
    """The spec's `graph` of the settings' model on this task."""
    name = f"own/{s.model}" if ":" in s.model else s.model
    if len(name) > 128:
        raise ModelError(
            "is too long for a spec (124 characters); give the factory a shorter path", field="model"
        )
    return backbone.graph_for(
        name, channels=shape.channels, classes=shape.classes, width=s.width or 64, stem=s.stem or "stock"
    )


def owner_factories(graph: Mapping[str, object]) -> dict[str, backbone.Factory]:
    """The owner's own architecture, imported on the owner's side only (design decision 7)."""
    arch = str(graph["arch"])
    return {arch[4:]: backbone.load_factory(arch[4:])} if arch.startswith("own/") else {}


def _rehearse(
    s: EmbedSettings, graph: Mapping[str, object], shape: TaskShape, factories: Mapping[str, backbone.Factory]
) -> None:
    """Commit to random weights for nobody, so that taps, carrier and head are refused before phase 1."""
    skeleton = backbone.build(graph, factories=factories)
    geometry = (shape.channels, shape.height, shape.width)
    Probe(
        *commit(skeleton, cpu_state(skeleton), graph, geometry, s, Identity.generate()), factories=factories
    )


def initial(s: EmbedSettings, graph: Mapping[str, object]) -> Tensors:
    """W0 from a trained checkpoint, or timm's pretrained weights."""
    model = backbone.build(graph, factories=owner_factories(graph))
    if s.init == "pretrained":
        load_pretrained(model, graph)
    else:
        try:
            load_checkpoint(Path(str(s.init)), model)
        except ModelError as error:
            raise ModelError(str(error).removeprefix("checkpoint: "), field="init") from None
    return cpu_state(model)


def cpu_state(model: nn.Module) -> Tensors:
    """The state dict, detached, contiguous, on the CPU."""
    return {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}


def _task(s: EmbedSettings) -> Task:
    return load_task(s.task, data=s.data, download=s.download, seed=s.seed)


def _own_arch(kind: type[nn.Module]) -> str:
    """`own/package.module:Class` in the characters of a spec, also for `__main__` and classes inside
    functions.
    """
    home = ".".join(_identifier(part) for part in kind.__module__.split("."))[-60:].lstrip(".0123456789")
    return f"own/{home or '_'}:{_identifier(kind.__qualname__.replace('<locals>.', ''))}"


def _identifier(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", text)[-60:]
    return plain if plain[:1].isalpha() or plain.startswith("_") else f"_{plain}"


def _check_is(module: nn.Module, graph: Mapping[str, object]) -> None:
    """A stranger builds `graph`: what is marked must have its tensors."""
    if str(graph.get("arch", "")).startswith("own/"):
        return
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in backbone.build(graph).state_dict().items()}
    given = {name: t.shape for name, t in module.state_dict().items()}
    if wanted != given:
        differs = next(n for n in (*wanted, *given) if wanted.get(n) != given.get(n))
        raise ModelError(
            f"is another architecture than the module's, such as at {differs!r}; leave it out, or correct it",
            field="graph",
        )


def _refuse_inside(path: Path, storage: str) -> None:
    if "://" not in storage and path.resolve().is_relative_to(Path(storage).resolve()):
        raise KeyMaterialError(
            "lies inside --storage, which is meant to be shared; keep the identity elsewhere", field="owner"
        )


def _card(result: Mapping[str, Any], graph: Mapping[str, object]) -> str:
    return (
        f"# {result['name']}\n\nArchitecture `{json.dumps(dict(graph), sort_keys=True)}` "
        f"for the task `{result['task']}`; accuracy on the test part {result['primary_marked']:.4f}.\n\n"
        "Load `model.safetensors` with the safetensors library into that architecture.\n"
    )
