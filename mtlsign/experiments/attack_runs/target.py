"""Target of an attack run: the marked model with its kit and task, read and checked before any attack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import DataError, ModelError, SettingsError
from mtlsign.experiments.attack_runs.public_base import load_public_base
from mtlsign.models import architectures
from mtlsign.models.factories import trusted_factories
from mtlsign.models.families.custom import factory_path
from mtlsign.models.loading import load_tensors
from mtlsign.models.memory_format import memory_format_for
from mtlsign.schemes.base import WatermarkScheme
from mtlsign.schemes.mtlsign import MTLSignKey, MTLSignScheme
from mtlsign.storage.model_folder import LoadedModel, read_model
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.kit import OwnerKit, detector_for_kit, open_kit

_MAX_LEARNING_RATE = 100


@dataclass(frozen=True)
class AttackTarget:
    """Everything that a process needs to attack one model. It holds the key opening: SECRET, never shown.

    Attributes:
        tensors: the marked model as safetensors bytes.
        kit: the owner's kit; None if another scheme marked the model.
        architecture: the architecture's name and fields, as the spec stores them.
        trusted_factory: path of a custom architecture's factory that may be imported.
        task: name of the primary task.
        data: folder of the datasets.
        download: let torchvision download missing data.
        split_seed: seed of the data splits of the embedding.
        extra_data_fraction: fraction of the owner's training split that the attacker has, 0 to 1.
        learning_rate: the (peak) learning rate that the model was trained with.
        optimizer: the optimizer that the model was trained with.
        other_marked_models: safetensors bytes of other models marked from the same W0.
        min_evidence_bits: evidence in bits at which a claim is accepted.
        tokenizer: tokenizer.json of a pretrained model, for text tasks.
        public_base: safetensors bytes of a public base model that the attacker knows; None without one.
        transfer_task: name of another task whose data the attacker has; None without one.
    """

    tensors: bytes = field(repr=False)
    kit: OwnerKit | None = field(repr=False)
    architecture: Mapping[str, object]
    trusted_factory: str | None
    task: str
    data: Path | None
    download: bool
    split_seed: int
    extra_data_fraction: float
    learning_rate: float
    other_marked_models: tuple[bytes, ...] = field(repr=False)
    min_evidence_bits: float
    optimizer: Literal["sgd", "adam"] = "sgd"
    tokenizer: Path | None = None
    public_base: bytes | None = field(default=None, repr=False)
    transfer_task: str | None = None

    @property
    def digest(self) -> str:
        """Digest of everything that is attacked (64 hex), for stored rows. It does not reveal the key."""
        parts = [self.tensors, self.secret, *self.other_marked_models]
        parts += [] if self.public_base is None else [b"public base", self.public_base]
        fields: list[Any] = [self.task, self.split_seed, dict(self.architecture)]
        fields += [] if self.transfer_task is None else [self.transfer_task]
        parts.append(json.dumps(fields, sort_keys=True).encode())
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return hashlib.sha256(b"mtlsign/v1/attack target" + digests).hexdigest()

    @property
    def secret(self) -> bytes:
        """Bytes that identify the key: SECRET."""
        assert self.kit is not None
        return self.kit.opening.to_json().encode()

    @property
    def public_key(self) -> str | None:
        """Public key of the owner (hex); None if the scheme has no identities."""
        return None if self.kit is None else self.kit.opening.public_key.hex()

    def watermark(self, device: torch.device | str = "cpu") -> tuple[WatermarkScheme[Any], Any]:
        """Return the scheme and the owner's opened key."""
        assert self.kit is not None
        key = MTLSignKey(detector_for_kit(self.kit, self.trusted_factory, device=device))
        return MTLSignScheme(head=key.head_kind, min_evidence_bits=self.min_evidence_bits), key

    def network(self) -> nn.Module:
        """Build the network without its weights. Raises `ModelError` if its code is not trusted."""
        path = factory_path(str(self.architecture["arch"]))
        factories = trusted_factories(self.trusted_factory)
        if path is not None and path not in factories:
            raise ModelError(
                f"The model has a custom architecture. If you trust its code, pass --trusted-factory {path}",
                field="trusted-factory",
            )
        return architectures.build(self.architecture, factories=factories)

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """Build the marked network.

        Raises:
            ModelError: its code is not trusted, or its tensors do not match the architecture.
        """
        network = self.network()
        try:
            load_tensors(network, parse_safetensors(self.tensors))
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:200]
            raise ModelError(
                f"The model does not have the architecture that its config names ({detail}). "
                "Pass the marked model itself.",
                field="model",
            ) from None
        return network.to(device).to(memory_format=memory_format_for(network)).eval()

    def load_task(self) -> Task:
        """Load the primary task with the splits of the embedding.

        Raises:
            DataError: data are missing or do not match the model.
        """
        task = _cached_task(self.task, self.data, self.download, self.tokenizer, self.split_seed)
        for name, value in task.input_spec.architecture_fields.items():
            expected = self.architecture.get(name, value)
            # A pretrained model can have vectors of more ids than its tokenizer.
            of_tokens = name == "vocabulary" or getattr(task.input_spec, "outputs", "") == "tokens"
            is_smaller = of_tokens and isinstance(expected, int) and value < expected
            if expected != value and not is_smaller:
                raise DataError(
                    f"The task has {value} {name}, the model {expected}. Pass the task of the model.",
                    field="task",
                )
        return task

    def load_transfer_task(self) -> Task | None:
        """Load the attacker's other task; None without one. Raises `DataError` if its data are missing."""
        if self.transfer_task is None:
            return None
        return _cached_task(self.transfer_task, self.data, self.download, self.tokenizer, self.split_seed)

    def load_data(self) -> int:
        """Load all tasks; return the number of splits. Raises `DataError` if data are missing."""
        tasks = self.load_task(), self.load_transfer_task()
        return sum(len(task.splits) for task in tasks if task is not None)


@lru_cache(maxsize=2)  # a warm process runs many attacks on the same tasks
def _cached_task(name: str, data: Path | None, download: bool, tokenizer: Path | None, seed: int) -> Task:
    return load_task(name, data=data, download=download, tokenizer=tokenizer, seed=seed)


def load_target(settings: AttackSettings) -> AttackTarget:
    """Read the model, its kit, the other marked models and the public base; nothing is written.

    Raises:
        MTLSignError: an input is missing, damaged, not trusted, or does not match the others.
    """
    for name in ("model", "kit"):
        if getattr(settings, name) is None:
            raise SettingsError(
                "This setting is required, except with --scheme or --attacks list.", field=name
            )
    kit = open_kit(settings, str(settings.kit))
    model = read_model(str(settings.model), endpoint=settings.endpoint)
    stored = model.config.get("architecture")
    architecture = stored if isinstance(stored, dict) else kit.opening.parse().architecture
    task = settings.task or _task_name(model, kit)
    target = AttackTarget(
        tensors=serialize_safetensors(model.tensors),
        kit=kit,
        architecture=architecture,
        trusted_factory=settings.trusted_factory,
        task=task,
        data=settings.data,
        download=settings.download,
        split_seed=_split_seed(settings, kit),
        extra_data_fraction=settings.extra_data_fraction,
        learning_rate=settings.lr or _training_rate(kit, task, architecture),
        other_marked_models=tuple(
            serialize_safetensors(read_model(location, endpoint=settings.endpoint).tensors)
            for location in settings.other_marked_models
        ),
        min_evidence_bits=settings.min_evidence_bits,
        optimizer=_training_optimizer(kit, task),
        tokenizer=settings.tokenizer,
        transfer_task=settings.transfer_task,
    )
    if settings.public_base is None:
        return target
    base = load_public_base(settings.public_base, target.network())
    return replace(target, public_base=serialize_safetensors(base))


def _split_seed(settings: AttackSettings, kit: OwnerKit) -> int:
    if settings.split_seed is not None:
        return settings.split_seed
    seed = kit.info.get("seed")
    return seed if isinstance(seed, int) else 0


def _task_name(model: LoadedModel, kit: OwnerKit) -> str:
    """Return the task that the model or the kit names. A task that is code needs the caller's consent."""
    name = model.config.get("task", kit.info.get("task"))
    if not isinstance(name, str) or not 0 < len(name) <= 200 or name == "custom":
        raise DataError("The model does not name its task. Pass --task.", field="task")
    if ":" in name:
        raise DataError(f"The task is code. If you trust it, pass --task {name[:120]}", field="task")
    return name


def _training_optimizer(kit: OwnerKit, task: str) -> Literal["sgd", "adam"]:
    """Return the optimizer of phase 1 from the kit, otherwise the default for the task."""
    optimizer = kit.info.get("optimizer")
    if optimizer in ("sgd", "adam"):
        return "adam" if optimizer == "adam" else "sgd"
    return EmbedSettings.of({"task": task}).with_defaults().phase1.optimizer or "sgd"


def _training_rate(kit: OwnerKit, task: str, architecture: Mapping[str, object]) -> float:
    """Return the peak rate of phase 1 from the kit, otherwise the default for the task and width."""
    rate = kit.info.get("lr")
    if isinstance(rate, float) and 0 < rate <= _MAX_LEARNING_RATE:
        return rate
    width = architecture.get("width")
    values = {"task": task} | ({"width": width} if isinstance(width, int) else {})
    return EmbedSettings.of(values).with_defaults().phase1.lr or 0.1
