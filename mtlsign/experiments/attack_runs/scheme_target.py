"""Target that a run makes itself: an unmarked network is trained, then marked with a registered scheme."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import SettingsError
from mtlsign.experiments.attack_runs.run_folder import BASE_FILE, CHECKPOINT_FILE
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.models import architectures
from mtlsign.models.loading import (
    architecture_from_settings,
    cpu_state,
    custom_factories,
    load_initial_weights,
    load_tensors,
)
from mtlsign.schemes import SchemeSettings, WatermarkScheme, default_scheme
from mtlsign.schemes.base import Detection
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.schemes.options import scheme_from_texts
from mtlsign.schemes.training import Optimizer, train_watermark
from mtlsign.storage.base import Storage
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.embedding.run_folder import load_state, state_bytes
from mtlsign.watermark.embedding.worker import SingleProcessContext, State

_MODEL_LIMIT, _CHECKPOINT_LIMIT = 2**32, 2**34
#: Seed of the second key, which no model carries.
_OTHER_KEY = 7_919


@dataclass(frozen=True)
class SchemeTarget(AttackTarget):
    """Target that carries the watermark of a registered scheme.

    Attributes:
        scheme: the scheme.
        key: its key: SECRET.
    """

    scheme: WatermarkScheme[Any] | None = None
    key: Any = field(default=None, repr=False)

    @property
    def secret(self) -> bytes:
        """Settings of scheme and key, which determine the key."""
        return repr((self.scheme, self.split_seed)).encode()

    def watermark(self, device: torch.device | str = "cpu") -> tuple[WatermarkScheme[Any], Any]:
        """Return the scheme and the key."""
        assert self.scheme is not None
        return self.scheme, self.key

    def network(self) -> nn.Module:
        """Build the network with the layers of the scheme."""
        assert self.scheme is not None
        network = super().network()
        self.scheme.prepare_model(network, self.load_task())
        return network


@dataclass(frozen=True)
class BasePlan:
    """Checked inputs of the marking.

    Attributes:
        scheme: the scheme.
        settings: settings of the network's training.
        task: the primary task.
        architecture: the network.
    """

    scheme: WatermarkScheme[Any]
    settings: EmbedSettings
    task: Task = field(repr=False)
    architecture: Mapping[str, object]


def prepare_base(settings: AttackSettings) -> BasePlan:
    """Check scheme, task and network; nothing is written.

    Raises:
        SettingsError: the scheme is unknown, or contradicts other settings.
        MTLSignError: the task or the network cannot be loaded, or the scheme does not support them.
    """
    for name in ("model", "kit"):
        if getattr(settings, name) is not None:
            raise SettingsError("A run with --scheme marks its own model. Omit this setting.", field=name)
    if settings.task is None:
        raise SettingsError("A run with --scheme needs a task. Give one, such as digits.", field="task")
    scheme = scheme_from_texts(
        str(settings.scheme), settings.scheme_options, min_evidence_bits=settings.min_evidence_bits
    )
    mark: dict[str, Any] = {}
    if isinstance(scheme, MTLSignScheme):
        mark = {"preset": scheme.preset, "head": scheme.head, "key_size": scheme.key_size}
    named = {
        "model": settings.network, "width": settings.width, "weights": settings.weights,
        "data": settings.data, "tokenizer": settings.tokenizer, "phase1.lr": settings.lr, **mark,
    }  # fmt: skip
    training = EmbedSettings.of(
        {
            "task": settings.task, "seed": settings.seed, "download": settings.download,
            **{name: value for name, value in named.items() if value is not None}, **settings.training,
        }
    ).with_defaults()  # fmt: skip
    split_seed = settings.seed if settings.split_seed is None else settings.split_seed
    task = load_task(
        training.task, data=training.data, download=training.download, tokenizer=training.tokenizer,
        seed=split_seed,
    )  # fmt: skip
    architecture = architecture_from_settings(training, task.input_spec)
    network = architectures.build(architecture, factories=custom_factories(architecture))
    scheme.prepare_model(network, task)
    reason = scheme.unsupported_reason(network, task)
    if reason is not None:
        raise SettingsError(f"The scheme cannot mark this network: {reason}", field="scheme")
    if settings.transfer_task is not None:
        load_task(
            settings.transfer_task, data=training.data, download=training.download,
            tokenizer=training.tokenizer, seed=split_seed,
        )  # fmt: skip
    return BasePlan(scheme, training, task, architecture)


def mark_base(
    plan: BasePlan, settings: AttackSettings, folder: Storage, log: Callable[[str], None]
) -> tuple[SchemeTarget, dict[str, Any]]:
    """Train the network, or read it from the run's folder, and mark it.

    A resumed run repeats the embedding, which is deterministic on equal hardware.

    Args:
        plan: result of `prepare_base`.
        settings: settings of the run.
        folder: the run's folder.
        log: called with lines for the terminal.

    Returns:
        The target, and the record of the embedding for `result.json`.
    """
    model, task, device = _base_model(plan, folder)
    log("the unmarked network is trained")
    scheme = plan.scheme
    key = scheme.generate_key(model, task, settings.seed)
    unmarked = copy.deepcopy(model)
    is_own, phase2 = isinstance(scheme, MTLSignScheme), plan.settings.phase2
    default_steps = (phase2.steps if is_own else None) or scheme.default_steps
    options = SchemeSettings(
        steps=settings.embed_steps or default_steps,
        batch=settings.embed_batch,
        training_lr=plan.settings.phase1.lr or 0.1,
        seed=settings.seed,
        options=_phase2_options(plan) if is_own else {},
    )
    started = time.monotonic()
    result = scheme.embed(model, task, key, options, SingleProcessContext(device))
    seconds = round(time.monotonic() - started, 3)
    other = scheme.generate_key(unmarked, task, settings.seed + _OTHER_KEY)
    record = {
        "scheme": scheme.name, "access": scheme.access, "needs_commitment": scheme.needs_commitment,
        "options": repr(scheme), "steps": result.steps, "images": result.images, "seconds": seconds,
        **result.measured,
        "deviation": _relative_deviation(unmarked, model),
        "marked": _counts(scheme.verify(model, key)), "unmarked": _counts(scheme.verify(unmarked, key)),
        "other_key": _counts(scheme.verify(model, other)),
    }  # fmt: skip
    log(f"marked with {scheme.name}")
    return _target(plan, settings, model, key), record


def base_tensors(plan: BasePlan, folder: Storage) -> State:
    """Return the weights of the unmarked network: name -> tensor on the CPU.

    Args:
        plan: result of `prepare_base`.
        folder: folder of the network, which is trained if it is not stored there.
    """
    return cpu_state(_base_model(plan, folder)[0])


def tune_base(plan: BasePlan, settings: SchemeSettings, folder: Storage, optimizer: Optimizer) -> State:
    """Return the weights of the unmarked network after training like an embedding, without a watermark.

    Args:
        plan: result of `prepare_base`.
        settings: steps, batch and seed.
        folder: folder of the network.
        optimizer: optimiser of the embedding.

    Raises:
        DivergedError: training diverged.
    """
    model, task, device = _base_model(plan, folder)
    train_watermark(
        model, task, settings, SingleProcessContext(device), optimizer=optimizer,
        objective=lambda step, batch: task.loss(task.training_outputs(model, batch), batch.targets),
    )  # fmt: skip
    return cpu_state(model)


def train_base_without_mark(plan: BasePlan, settings: SchemeSettings, folder: Storage) -> State:
    """Return the weights of the unmarked network after phase 2 without the losses of the key's bits.

    Args:
        plan: result of `prepare_base`.
        settings: steps, batch and seed.
        folder: folder of the network.

    Raises:
        ModelError: the spread head cannot mark the network, or training diverged.
    """
    model, task, device = _base_model(plan, folder)
    scheme = default_scheme()
    key = scheme.generate_key(model, task, settings.seed)
    settings = replace(settings, options=_phase2_options(plan))
    scheme.train_without_mark(model, task, key, settings, SingleProcessContext(device))
    return cpu_state(model)


def forge_on_base(plan: BasePlan, seed: int, folder: Storage) -> dict[str, Any] | None:
    """Make the scheme's false claim on the unmarked network.

    Args:
        plan: result of `prepare_base`.
        seed: seed of the claim.
        folder: folder of the network.

    Returns:
        The claim as a record; None if no way is known.
    """
    model, task, _ = _base_model(plan, folder)
    forgery = plan.scheme.forge(model, task, seed)
    if forgery is None:
        return None
    record = {"method": forgery.method, "tries": forgery.tries, "seconds": round(forgery.seconds, 3)}
    return record | _counts(forgery.detection)


def untrained_base(plan: BasePlan) -> tuple[nn.Module, Task, torch.device]:
    """Return the network with random weights and the scheme's layers, the task on its device, and the device.

    The random weights follow the seed of the plan.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.settings.seed)
        return _base_model(plan, None)


def _base_model(plan: BasePlan, folder: Storage | None) -> tuple[nn.Module, Task, torch.device]:
    """Return the unmarked network with the scheme's layers, the task on its device, and the device.

    Without a folder the network is not trained.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = architectures.build(plan.architecture, factories=custom_factories(plan.architecture))
    if folder is not None:
        load_tensors(model, _base_weights(plan, folder, device))
    task = plan.task.to(device)
    plan.scheme.prepare_model(model, task)
    return model.to(device).eval(), task, device


def _phase2_options(plan: BasePlan) -> dict[str, Any]:
    """Return phase 2 of `jobs/embed.py` for the plan's task and network, without its steps and batch."""
    phase2 = plan.settings.phase2
    names = type(phase2).model_fields.keys() - {"steps", "batch"}
    return {f"phase2.{name}": getattr(phase2, name) for name in sorted(names)}


def _relative_deviation(base: nn.Module, model: nn.Module) -> float:
    """Return ‖W − W0‖ / ‖W0‖ over the parameters that both networks have."""
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    shared = [name for name, p in before.items() if name in after and after[name].shape == p.shape]
    with torch.no_grad():
        change = sum(float((after[name] - before[name]).double().square().sum()) for name in shared)
        size = sum(float(before[name].double().square().sum()) for name in shared)
    return (change / size) ** 0.5 if size else 0.0


def _target(plan: BasePlan, settings: AttackSettings, model: nn.Module, key: Any) -> SchemeTarget:
    return SchemeTarget(
        tensors=serialize_safetensors(cpu_state(model)),
        kit=None,
        architecture=plan.architecture,
        trusted_factory=settings.trusted_factory or next(iter(custom_factories(plan.architecture)), None),
        task=plan.settings.task,
        data=settings.data,
        download=settings.download,
        split_seed=settings.seed if settings.split_seed is None else settings.split_seed,
        extra_data_fraction=settings.extra_data_fraction,
        learning_rate=plan.settings.phase1.lr or 0.1,
        other_marked_models=(),
        min_evidence_bits=settings.min_evidence_bits,
        optimizer=plan.settings.phase1.optimizer or "sgd",
        tokenizer=settings.tokenizer,
        transfer_task=settings.transfer_task,
        scheme=plan.scheme,
        key=key,
    )


def _counts(detection: Detection) -> dict[str, Any]:
    return {
        "matched": detection.matched, "n": detection.n, "null_rate": detection.null_rate,
        "evidence_bits": detection.evidence_bits, "accepted": detection.accepted,
    }  # fmt: skip


def _base_weights(plan: BasePlan, folder: Storage, device: torch.device) -> Mapping[str, torch.Tensor]:
    """Return the weights of the unmarked network, from a checkpoint, the run's folder or phase 1."""
    if plan.settings.weights is not None:
        return load_initial_weights(plan.settings, plan.architecture)
    if folder.exists(BASE_FILE):
        return parse_safetensors(folder.read(BASE_FILE, _MODEL_LIMIT))
    stored = folder.read(CHECKPOINT_FILE, _CHECKPOINT_LIMIT) if folder.exists(CHECKPOINT_FILE) else None

    def save(state: State) -> None:
        folder.write(CHECKPOINT_FILE, state_bytes(state))

    context = SingleProcessContext(
        device, on_checkpoint=save, state=None if stored is None else load_state(stored)
    )
    tensors, _ = pipeline.run_phase1(plan.settings, plan.architecture, context)
    folder.write(BASE_FILE, serialize_safetensors(tensors))
    folder.delete(CHECKPOINT_FILE)
    return tensors
