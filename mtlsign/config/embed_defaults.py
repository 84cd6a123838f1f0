"""Defaults of `mtlsign.config.embed` that depend on the preset, the head, the model or the task."""

from __future__ import annotations

from typing import Any

#: Built-in tasks of texts.
TEXT_TASKS = ("imdb", "sst2", "sst5", "lm")
#: Prefix of `--model` for a pretrained transformer, before its folder or .gguf file.
PRETRAINED = "hf:"
#: Defaults for pretrained transformers, which phase 1 fine-tunes.
PRETRAINED_DEFAULTS: dict[str, Any] = {
    "phase1.epochs": 1,
    "phase1.batch": 32,
    "phase1.optimizer": "adam",
    "phase1.lr": 5e-5,
    "phase1.weight_decay": 0.0,
    "phase2.steps": 150,
    "phase2.lr": 2e-4,
}
#: Peak learning rate of phase 1 with Adam, for every width.
PHASE1_ADAM_LR = 2e-3
#: Defaults that depend on the head.
FEATURE_DEFAULTS: dict[str, Any] = {
    "lambda2": 1.0,
    "r_func": "weights",
    "phase2.task_loss": 0.0,
    "perturbation.kinds": ("noise", "pruned", "decorrelated", "spoiled"),
    "perturbation.inner_steps": 8,
    "perturbation.refresh_steps": 8,
    "perturbation.tuning_optimizer": "sgd",
    "perturbation.tuning_distillation": 0.0,
}
SPREAD_DEFAULTS: dict[str, Any] = {
    "r_func": "responses",
    "lambda2": 0.0,
    "phase2.steps": 500,
    "phase2.task_loss": 1.0,
    "perturbation.kinds": ("fine_tuned",),
    "perturbation.inner_steps": 12,
    "perturbation.refresh_steps": 24,
    "perturbation.tuning_optimizer": "adam",
    "perturbation.tuning_distillation": 1.0,
}


#: Settings of each preset; flags, file and environment take precedence.
PRESETS: dict[str, dict[str, Any]] = {
    "spread": {"head": "spread"},
    "keyed": {"head": "keyed"},
    "paper": {
        "head": "free",
        "lambda1": 0.1,
        "lambda2": 0.1,
        "phase2.distillation": 0.0,
        "perturbation.kinds": ("fine_tuned",),
    },
}
#: Defaults of phase 1 for text tasks, whose networks are recurrent.
_TEXT_RECIPE: dict[str, Any] = {
    "model": "bilstm",
    "phase1.epochs": 6,
    "phase1.batch": 64,
    "phase1.optimizer": "adam",
    "phase1.weight_decay": 0.0,
}
#: Defaults of phase 1 for tasks of files as images.
_BYTE_IMAGE_RECIPE: dict[str, Any] = {"width": 16, "phase1.epochs": 10}
#: Defaults for tasks of instances.
_INSTANCE_RECIPE: dict[str, Any] = {
    "model": "cascade-resnet50",
    "phase1.epochs": 30,
    "phase1.batch": 8,
    "phase1.optimizer": "adam",
    "phase1.lr": 1e-3,
    "phase1.weight_decay": 0.0,
}
#: Defaults of phase 1 for tasks of generated images.
_GENERATION_RECIPE: dict[str, Any] = {
    "model": "dcgan",
    "width": 16,
    "phase1.batch": 64,
    "phase1.optimizer": "adam",
    "phase1.lr": 1e-3,
    "phase1.weight_decay": 0.0,
}
#: Settings of built-in tasks that replace defaults of all tasks.
TASK_OVERRIDES: dict[str, dict[str, Any]] = {
    "imdb": {"phase2.margin": 3.0},
    "camvid": {"phase2.batch": 8},
    "pennfudan": {"phase2.batch": 8},
    "voc": {"phase2.batch": 8},
}
#: Tasks of images whose networks bear a larger margin, see `spread_image_overrides`.
IMAGE_TASKS = ("mnist", "fashion-mnist", "cifar10", "cifar100")
#: The same for pretrained transformers. With so many marked numbers a large margin moves each little, and
#: the mark stays readable where an attacker shrinks the change from a public base.
PRETRAINED_OVERRIDES: dict[str, Any] = {"phase2.margin": 8.0}


def spread_image_overrides(width: int, bits: int) -> dict[str, Any]:
    """Return defaults of the spread head for the built-in tasks of images.

    A margin m moves the D responses of a network by about m·√(N/D) of their size, and D grows with the width.
    The margin therefore grows with the width, and falls with the root of the number of bits.
    The task has a larger weight against the mark than elsewhere, so that the larger margin costs less accuracy.
    Narrow networks have fewer responses for as many bits. They need an even larger weight and more steps
    (docs/results/2026-12-01-spread-margin-choices, 2026-12-01-spread-steps-choices).

    Args:
        width: channels of the first stage.
        bits: N, over all keys.
    """
    margin = 8.5 * (width / 16) * (1024 / bits) ** 0.5
    overrides = {"phase2.margin": round(min(16.0, max(4.0, margin)), 2)}
    if width < 32:
        return overrides | {"phase2.distillation": 40.0, "phase2.task_loss": 10.0, "phase2.steps": 1000}
    return overrides | {"phase2.distillation": 20.0, "phase2.task_loss": 5.0}


#: Defaults of the built-in tasks.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"width": 16, "phase1.epochs": 30, "phase2.steps": 600},
    "mnist": {"phase1.epochs": 4},
    "fashion-mnist": {"phase1.epochs": 10},
    "cifar10": {"phase1.epochs": 30, "stem": "cifar"},
    "cifar100": {"phase1.epochs": 40, "stem": "cifar"},
    "imdb": {**_TEXT_RECIPE, "phase1.epochs": 5},
    "sst2": _TEXT_RECIPE,
    "sst5": _TEXT_RECIPE,
    "virusshare": _BYTE_IMAGE_RECIPE,
    "files": _BYTE_IMAGE_RECIPE,
    "camvid": _INSTANCE_RECIPE,
    "pennfudan": _INSTANCE_RECIPE,
    "voc": _INSTANCE_RECIPE,
    "gan-digits": {**_GENERATION_RECIPE, "width": 32, "phase1.epochs": 60},
    "gan-mnist": {**_GENERATION_RECIPE, "phase1.epochs": 4},
    "gan-fashion-mnist": {**_GENERATION_RECIPE, "phase1.epochs": 4},
    "gan-cifar10": {**_GENERATION_RECIPE, "phase1.epochs": 8},
    "gan-cifar100": {**_GENERATION_RECIPE, "phase1.epochs": 8},
}
