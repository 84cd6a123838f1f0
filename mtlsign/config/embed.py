"""Settings of `mtlsign embed` and `mtlsign.embed`, with defaults chosen on validation data.

A value of `None` means "the default of the task or head". `EmbedSettings.with_defaults` fills it in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from mtlsign.config import renamed
from mtlsign.config.base import Settings, SettingsGroup, as_tuple
from mtlsign.config.embed_defaults import (
    FEATURE_DEFAULTS,
    IMAGE_TASKS,
    PHASE1_ADAM_LR,
    PRESETS,
    PRETRAINED,
    PRETRAINED_DEFAULTS,
    PRETRAINED_OVERRIDES,
    RECIPES,
    SPREAD_DEFAULTS,
    TASK_OVERRIDES,
    TEXT_TASKS,
    spread_image_overrides,
)
from mtlsign.config.mixins import RESOURCE_TIMEOUT_S, RESUMABLE, RunPlacement, RunStorage, TaskData
from mtlsign.errors import SettingsError

PerturbationKind = Literal["noise", "pruned", "fine_tuned", "decorrelated", "spoiled"]
#: Kinds of perturbed copies for R_DA, eq. (9) of the paper (`mtlsign.watermark.embedding.perturbations`).
PERTURBATION_KINDS: tuple[str, ...] = get_args(PerturbationKind)
#: Score that phase 2 demands of every bit of a spread head.
DEFAULT_MARGIN = 4.0
#: Largest width of a ResNet (`mtlsign.models.families.resnet`).
MAX_WIDTH = 128


class Phase1Settings(SettingsGroup):
    """Training of the clean network, eq. (6) of the paper."""

    # fmt: off
    initial_weights: str | None = Field(None, min_length=1, max_length=4096, description="checkpoint of a pretrained network, or of a detector's body, from which phase 1 starts, on every node [random weights]")
    epochs: int | None = Field(None, ge=1, le=10_000, description="epochs of phase 1")
    batch: int | None = Field(None, ge=1, le=65_536, description="primary samples in a step, over all workers [128, texts 64, instances 8]")
    optimizer: Literal["sgd", "adam"] | None = Field(None, description="optimizer of phase 1; sgd has Nesterov momentum 0.9 [texts adam, otherwise sgd]")
    lr: float | None = Field(None, gt=0, le=100, description="peak learning rate (one-cycle) [sgd 0.1 at width 16, divided by the root of the width ratio; adam 0.002]")
    weight_decay: float | None = Field(None, ge=0, le=1, description="lambda0 of eq. (6), with u = L2 [0.0005, texts 0]")
    # fmt: on


class Phase2Settings(SettingsGroup):
    """Embedding of the watermark, eq. (10) of the paper."""

    # fmt: off
    steps: int | None = Field(None, ge=1, le=1_000_000, description="optimiser steps [spread 500, of image tasks below width 32 1000; otherwise 800, digits 600]")
    lr: float | None = Field(None, gt=0, le=10, description="peak learning rate (Adam, one-cycle) [spread 0.0005, otherwise 0.002 at width 16, divided by the root of the width ratio]")
    margin: float = Field(DEFAULT_MARGIN, gt=0, le=1000, description="spread head: score that the loss demands, in standard deviations of an unmarked network's scores; 3 for imdb, 8 for hf:, 4 to 16 by width for the image tasks but digits and files")
    task_loss: float | None = Field(None, ge=0, le=1e6, description="weight of the primary loss with labels [spread 1, of image tasks but digits and files 10 below width 32, otherwise 5; other heads 0]")
    other_layers_lr_scale: float = Field(0.3, ge=0, le=100, description="learning rate of the layers after the taps, as a multiple of phase2.lr")
    distillation: float = Field(4.0, ge=0, le=1e6, description="weight of KL(W0 || W) on primary data; spread head, for the image tasks but digits and files: 40 below width 32, otherwise 20")
    temperature: float = Field(2.0, gt=0, le=1000, description="temperature of the distillation")
    batch: int = Field(128, ge=1, le=65_536, description="primary samples in a step, over all workers; 8 for tasks of instances")
    # fmt: on


class PerturbationSettings(SettingsGroup):
    """Perturbed copies of the network that R_DA requires to keep the watermark, eq. (9) of the paper."""

    # fmt: off
    kinds: Annotated[tuple[PerturbationKind, ...] | None, NoDecode] = Field(None, description="kinds in the order of their turns: noise, pruned, fine_tuned, decorrelated, spoiled [spread fine_tuned; otherwise all but fine_tuned]")
    per_step: int = Field(1, ge=1, le=64, description="perturbed copies in each step")
    noise_sigma: float = Field(0.3, ge=0, le=10, description="noise: standard deviation in units of that of each tensor")
    max_prune_ratio: float = Field(0.85, ge=0, lt=1, description="pruned: largest ratio; ratios are drawn from 0.1 upwards")
    inner_steps: int | None = Field(None, ge=1, le=10_000, description="fine_tuned, decorrelated, spoiled: steps of the inner attack [spread 12, otherwise 8]")
    refresh_steps: int | None = Field(None, ge=1, le=10_000, description="fine_tuned, decorrelated, spoiled: steps after which the inner attack restarts from the current network [spread 24, otherwise 8]")
    tuning_optimizer: Literal["sgd", "adam"] | None = Field(None, description="fine_tuned: optimizer [spread adam, otherwise sgd]")
    tuning_lr: float | None = Field(None, gt=0, le=100, description="fine_tuned: learning rate [adam 0.01, sgd that of phase 1 with sgd]")
    tuning_distillation: float | None = Field(None, ge=0, le=1e6, description="fine_tuned: weight of KL(W0 || W) besides the primary loss [spread 1, otherwise 0]")
    attack_lr: float = Field(0.03, gt=0, le=10, description="decorrelated, spoiled: learning rate of Adam in units of the standard deviation of each tensor")
    # fmt: on

    @field_validator("kinds", mode="before")
    @classmethod
    def _known_kinds(cls, value: Any) -> Any:
        """Accept comma-separated text and check every kind."""
        if value is None:
            return None
        texts = as_tuple(value)
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError("give kinds separated by commas")
        kinds = [part.strip() for text in texts for part in text.split(",") if part.strip()]
        for kind in kinds:
            if kind in renamed.PERTURBATION_KINDS:
                raise ValueError(f"{kind!r} was renamed: use {renamed.PERTURBATION_KINDS[kind]!r}")
            if kind not in PERTURBATION_KINDS:
                raise ValueError(f"unknown kind {kind!r}: choose among {', '.join(PERTURBATION_KINDS)}")
        if not kinds:
            raise ValueError("name at least one kind; lambda2 = 0 disables the perturbations")
        return tuple(kinds)


class EmbedSettings(RunStorage, RunPlacement, TaskData, Settings):
    """Settings of one embedding."""

    renamed: ClassVar[Mapping[str, str]] = renamed.EMBED
    common: ClassVar[tuple[str, ...]] = (
        "task",
        "data",
        "model",
        "weights",
        "lambda1",
        "lambda2",
        "key_size",
        "workers",
        "storage",
        "resume",
    )
    resumable: ClassVar[frozenset[str]] = (
        Settings.resumable | RESUMABLE | {"keep_checkpoints", "activation_checkpointing", "sharding"}
    )

    # fmt: off
    # network and task
    task: str = Field("digits", min_length=1, max_length=200, description="digits, mnist, fashion-mnist, cifar10, cifar100, imdb, sst2, sst5, virusshare, files, camvid, pennfudan, voc, gan-digits and gan-NAME of other images (NAME@0.1: a tenth of the data), or package.module:factory")
    model: str | None = Field(None, min_length=1, max_length=200, description="resnet18/34/50, cascade-resnet18/34/50 and cascade-timm/NAME (instances), bilstm, lstm, bigru, gru, transformer, dcgan (generated images), timm/NAME, hf:FOLDER, or package.module:factory [resnet18, texts bilstm, instances cascade-resnet50, generated images dcgan]")
    width: int | None = Field(None, ge=4, le=MAX_WIDTH, description="channels of the first stage; 64 is torchvision's own network")
    stem: Literal["stock", "cifar"] | None = Field(None, description="7x7 stride 2 with pooling, or 3x3 stride 1")
    weights: str | None = Field(None, max_length=4096, description="trained checkpoint (.safetensors, Hugging Face folder, .pt or .ckpt of tensors) or 'pretrained' (timm); skips phase 1")
    weights_key: str | None = Field(None, min_length=1, max_length=200, description="entry of the checkpoint with the weights, such as state_dict_ema, or the prefix of their names [the weights as trained]")
    adapter: str | None = Field(None, min_length=1, max_length=4096, description="LoRA of the library peft (folder) for the model of --weights or of hf:FOLDER; skips phase 1, and phase 2 trains its factors alone")
    base_kit: str | None = Field(None, max_length=4096, description="owner kit with a spread head whose W0 is marked again, for another recipient; skips phase 1")
    name: str | None = Field(None, min_length=1, max_length=128, description="name of the model in the spec")
    # key set, head, taps
    preset: Literal["spread", "keyed", "paper"] = Field("spread", description="spread, keyed: the head of this name with its defaults; paper: the scheme as published (free head, N 600, R_DA by inner tuning on D', no distillation)")
    keys: int = Field(1, ge=1, le=16, description="independent keys to embed at once, one kit each; open one of them per dispute")
    recipient: str | None = Field(None, min_length=1, max_length=128, description="recipient of this copy, noted in its kit for jobs/trace.py")
    key_size: int | None = Field(None, ge=128, le=4096, description="N, key samples = bits of the watermark [1024; free 600]")
    head: Literal["spread", "keyed", "free"] = Field("spread", description="spread: responses of every layer, keyed: features on key images, both derived from the key; free: the paper's trained perceptron on these features")
    readouts: Annotated[tuple[Literal["spread", "keyed"], ...], NoDecode] = Field((), max_length=3, description="further heads of the same key, whose bits are added")
    layers: str | None = Field(None, max_length=8000, description="spread head: marked convolutions and linear layers, comma-separated [all before the taps]")
    hidden: int = Field(64, ge=1, le=1024, description="hidden units of the free head")
    features: Literal["flat", "pooled"] = Field("flat", description="input of the free head from each tap")
    taps: str | None = Field(None, max_length=2000, description="module names, comma-separated [keyed: first stage; free: first three; spread: last stage]")
    carrier_size: int | None = Field(None, ge=21, le=1024, description="side of the key images in pixels [that of the task, at most 64]")
    statistic: Literal["count", "weighted"] = Field("count", description="evidence from the number of matching bits, or weighted by their scores")
    # training
    phase1: Phase1Settings = Field(Phase1Settings.model_validate({}), description="training of the clean network")
    lambda1: float | None = Field(None, ge=0, le=1e6, description="weight of R_func, eq. (8) [responses 3, weights 0.001]")
    r_func: Literal["weights", "responses"] | None = Field(None, description="R_func: sum |W-W0|^2 as in the paper, or the relative squared change of the marked layers' responses [spread responses, otherwise weights]")
    lambda2: float | None = Field(None, ge=0, le=1e6, description="weight of R_DA over the perturbed copies, eq. (9); 0 disables it at no cost [spread 0, otherwise 1]")
    phase2: Phase2Settings = Field(Phase2Settings.model_validate({}), description="embedding of the watermark")
    perturbation: PerturbationSettings = Field(PerturbationSettings.model_validate({}), description="perturbed copies of R_DA")
    # resources
    workers: int = Field(1, ge=0, le=4096, description="Ray Train workers; 0: this process alone, without Ray")
    resource_timeout_s: int = Field(0, ge=0, le=86_400, description=RESOURCE_TIMEOUT_S)
    amp: bool = Field(True, description="bf16 for the primary path on GPUs; scores of the verifier remain fp32")
    activation_checkpointing: Literal["auto", "always", "never"] = Field("auto", description="compute activations of blocks again in the backward pass, with equal results; auto: where memory is short")
    sharding: Literal["none", "fsdp"] = Field("none", description="fsdp: parameters, gradients and moments of the optimizer are divided among the workers (PyTorch's fully_shard), with lambda2 0")
    max_failures: int = Field(3, ge=-1, le=1000, description="restarts of a phase after a lost worker or node; -1: unlimited")
    # outputs
    keep_checkpoints: bool = Field(False, description="keep the (secret) checkpoints of the run after success")
    insecure_test_key: bool = Field(False, description="derive the nonce from --seed: reproducible, worthless as evidence")
    # fmt: on

    @field_validator("readouts", mode="before")
    @classmethod
    def _split_readouts(cls, value: Any) -> Any:
        """Accept comma-separated text."""
        texts = as_tuple(value)
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError("give heads separated by commas")
        return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())

    def with_defaults(self) -> Self:
        """Fill in the preset, then the settings that depend on the task or head."""
        explicit = self.given_values()
        overrides = PRESETS[self.preset] | TASK_OVERRIDES.get(self.task.partition("@")[0], {})
        if (self.model or "").startswith(PRETRAINED):
            overrides |= PRETRAINED_OVERRIDES
        if self._is_spread_resnet(overrides.get("head", "spread")):
            bits = self.keys * (self.key_size or 1024)
            overrides |= spread_image_overrides(self.width or 64, bits)
        preset = {name: value for name, value in overrides.items() if name not in explicit}
        complete = self.updated(preset)._with_task_defaults()
        complete._check_heads()
        complete._check_tokenizer()
        return complete

    def _is_spread_resnet(self, preset_head: str) -> bool:
        """Return whether a built-in task of images marks a ResNet with a spread head."""
        head = self.head if "head" in self.given_values() else preset_head
        is_resnet = (self.model or "resnet18").startswith("resnet")
        return head == "spread" and is_resnet and self.task.partition("@")[0] in IMAGE_TASKS

    def _check_heads(self) -> None:
        """Raise `SettingsError` for settings that the chosen heads do not support."""
        heads = {self.head, *self.readouts}
        if self.r_func == "responses" and self.lambda1 and "spread" not in heads:
            raise SettingsError(
                "Only a spread head has responses. Choose r-func weights, or add --readouts spread.",
                field="r-func",
            )
        if self.layers is not None and "spread" not in heads:
            raise SettingsError(
                "Only a spread head marks chosen layers. Name modules with --taps, or add --readouts spread.",
                field="layers",
            )
        if self.lambda2 and "decorrelated" in (self.perturbation.kinds or ()) and heads == {"spread"}:
            raise SettingsError(
                "Only a head that reads key images has the kind decorrelated. Choose other kinds.",
                field="perturbation.kinds",
            )
        if self.keys > 1 and self.head == "free":
            raise SettingsError("A free head has one key. Choose --head spread or keyed.", field="keys")
        if self.base_kit is not None and self.adapter is not None:
            raise SettingsError("Give either an adapter or a kit with W0, not both.", field="adapter")
        if self.base_kit is not None and self.weights is not None:
            raise SettingsError("Give either a checkpoint or a kit with W0, not both.", field="base-kit")
        if self.phase1.initial_weights and (self.weights or self.base_kit):
            raise SettingsError(
                "--weights and --base-kit replace phase 1. Omit them, or the weights from which it starts.",
                field="phase1.initial-weights",
            )

    def _check_tokenizer(self) -> None:
        """Raise `SettingsError` for a pretrained transformer without the tokenizer of its words."""
        is_pretrained = (self.model or "").startswith(PRETRAINED)
        if is_pretrained and self.tokenizer is None and self.task.partition("@")[0] in TEXT_TASKS:
            raise SettingsError("A pretrained transformer needs its tokenizer.json.", field="tokenizer")

    def _with_task_defaults(self) -> Self:
        """Fill in the settings that depend on the task or head."""
        recipe = RECIPES.get(self.task.partition("@")[0], {})
        defaults: dict[str, Any] = {
            "width": 64,
            "stem": "stock",
            "phase1.epochs": 10,
            "phase1.batch": 128,
            "phase1.optimizer": "sgd",
            "phase1.weight_decay": 5e-4,
            "phase2.steps": 800,
            "key_size": 600 if self.head == "free" else 1024,
            "model": "resnet18",
            **recipe,
            **(SPREAD_DEFAULTS if self.head == "spread" else FEATURE_DEFAULTS),
        }
        model = self.model or defaults["model"]
        if model.startswith(PRETRAINED):
            defaults |= PRETRAINED_DEFAULTS
        defaults["name"] = f"{self.task}-{public_model_name(model)}".replace(":", ".").replace("/", "-")[:128]
        width = self.width or defaults["width"]
        sgd_lr, phase2_lr = learning_rates(width, self.head)
        defaults.setdefault("phase2.lr", phase2_lr)
        phase1_optimizer = self.phase1.optimizer or defaults["phase1.optimizer"]
        defaults.setdefault("phase1.lr", PHASE1_ADAM_LR if phase1_optimizer == "adam" else sgd_lr)
        optimizer = self.perturbation.tuning_optimizer or defaults["perturbation.tuning_optimizer"]
        if phase1_optimizer == "sgd" and self.phase1.lr is not None:
            sgd_lr = self.phase1.lr
        defaults["perturbation.tuning_lr"] = 0.01 if optimizer == "adam" else sgd_lr
        r_func = self.r_func or defaults["r_func"]
        defaults["lambda1"] = 3.0 if r_func == "responses" else 0.001
        return self.updated({name: value for name, value in defaults.items() if self.value_of(name) is None})


def learning_rates(width: int, head: str = "spread") -> tuple[float, float]:
    """Return the default peak learning rates of phase 1 and phase 2 for a network's width.

    Wide networks diverge at the learning rates of narrow ones.
    """
    factor = math.sqrt(16 / width)
    phase2 = 5e-4 if head == "spread" else 2e-3
    return round(0.1 * factor, 6), round(phase2 * factor, 6)


def public_model_name(model: str) -> str:
    """Return a model's name without the folders of a pretrained one."""
    if not model.startswith(PRETRAINED):
        return model
    return PRETRAINED + model.removeprefix(PRETRAINED).rstrip("/").rpartition("/")[2]
