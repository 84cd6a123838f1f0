"""Every option of the jobs: typed, limited, with defaults chosen on validation data (`docs/results.md`).

One door: `EmbedSettings(**mapping)` in Python, a YAML file through `--config`, or flags; flags win over the file.
A value of `None` means "the default of the task or head", which `resolved()` fills in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, field_validator

from mtlsign.config.base import Settings

SnapshotKind = Literal["noise", "tuned", "pruned"]


#: Snapshots of R_DA (`mtlsign.watermark.embedding.perturbations`).
KINDS = ("noise", "pruned", "tuned", "scrubbed", "spoiled")


class EmbedSettings(Settings):
    """What `jobs/embed.py` and `mtlsign.embed` take."""

    # fmt: off
    # what is marked
    task: str = Field("digits", min_length=1, max_length=200, description="digits, mnist, fashion-mnist, cifar10, cifar100 (NAME@0.1: a tenth of its data), or package.module:factory")
    data: Path | None = Field(None, description="data root in torchvision's layout, on every node")
    download: bool = Field(False, description="let torchvision download missing data")
    model: str = Field("resnet18", min_length=1, max_length=200, description="resnet18/34/50, timm/NAME, or package.module:factory")
    width: int | None = Field(None, ge=4, le=256, description="channels of the first stage; 64 is torchvision's own network")
    stem: Literal["stock", "cifar"] | None = Field(None, description="7x7 stride 2 with pooling, or 3x3 stride 1")
    init: str | None = Field(None, max_length=4096, description="trained checkpoint (.safetensors, .pt of tensors) or 'pretrained' (timm); skips phase 1")
    name: str | None = Field(None, min_length=1, max_length=128, description="the model's name in the spec")
    # the key set, the head, where it reads
    key_size: int | None = Field(None, ge=128, le=4096, description="N, key samples = bits of the mark [1024 keyed, 600 free]")
    head: Literal["keyed", "free"] = Field("keyed", description="keyed: derived from the key; free: the paper's trained perceptron")
    hidden: int = Field(64, ge=1, le=1024, description="hidden units of the free head")
    features: Literal["flat", "pooled"] = Field("flat", description="what the free head reads of each tap")
    taps: str | None = Field(None, max_length=2000, description="module names, comma-separated [first stage; free: first three]")
    carrier_size: int | None = Field(None, ge=21, le=1024, description="side of the key images in pixels [the task's, at most 64]")
    statistic: Literal["count", "weighted"] = Field("count", description="evidence from hits alone, or from score-weighted hits")
    # phase 1, eq. (6)
    epochs: int | None = Field(None, ge=1, le=10_000, description="epochs of phase 1")
    batch: int = Field(128, ge=1, le=65_536, description="primary images a step, over all workers")
    lr: float | None = Field(None, gt=0, le=100, description="peak learning rate of phase 1 (SGD, one-cycle) [0.1 at width 16, falling with its root]")
    weight_decay: float = Field(5e-4, ge=0, le=1, description="lambda0 of eq. (6), u = L2")
    # phase 2, eq. (10)
    lambda1: float = Field(0.001, ge=0, le=1e6, description="weight of R_func = summed |W-W0|^2, eq. (8)")
    lambda2: float = Field(1.0, ge=0, le=1e6, description="weight of R_DA over the snapshots, eq. (9); 0 turns it off at no cost")
    steps: int | None = Field(None, ge=1, le=1_000_000, description="key-batch steps of phase 2 [800; digits 600]")
    wm_lr: float | None = Field(None, gt=0, le=10, description="peak learning rate of phase 2 (Adam, one-cycle) [0.002 at width 16, falling with its root]")
    deep_lr: float = Field(0.3, ge=0, le=100, description="learning rate of the layers past the taps, as a multiple of wm-lr")
    snapshots: str = Field("noise,pruned,scrubbed,spoiled", max_length=200, description="kinds taken in turn: noise, pruned, tuned, scrubbed, spoiled")
    snapshots_per_step: int = Field(1, ge=1, le=64, description="perturbed copies a step")
    noise: float = Field(0.3, ge=0, le=10, description="noise snapshots: sigma in units of each tensor's sd")
    prune: float = Field(0.85, ge=0, lt=1, description="pruned snapshots: largest ratio, drawn from 0.1 up")
    inner_steps: int = Field(8, ge=1, le=10_000, description="tuned, scrubbed, spoiled snapshots: inner steps")
    inner_every: int = Field(8, ge=1, le=10_000, description="tuned, scrubbed, spoiled snapshots: steps after which they begin anew")
    inner_lr: float | None = Field(None, gt=0, le=100, description="tuned snapshots: learning rate [that of phase 1]")
    inner_rate: float = Field(0.03, gt=0, le=10, description="scrubbed, spoiled snapshots: Adam's rate in units of each tensor's sd")
    distillation: float = Field(4.0, ge=0, le=1e6, description="weight of KL(W0 || W) on primary data")
    temperature: float = Field(2.0, gt=0, le=1000, description="temperature of the distillation")
    primary_batch: int = Field(128, ge=1, le=65_536, description="primary images a step of phase 2, over all workers")
    # where it runs
    workers: int = Field(1, ge=0, le=4096, description="Ray Train workers; 0 = this process alone, without Ray")
    cpus_per_worker: int | None = Field(None, ge=1, le=1024, description="CPUs of each worker [an even share, on a local Ray]")
    gpus_per_worker: float = Field(0, ge=0, le=16, description="GPUs of each worker")
    cluster_wait: int = Field(0, ge=0, le=86_400, description="seconds to wait for an autoscaler to make room")
    amp: bool = Field(True, description="bf16 for the primary path on GPUs; verifier scores stay fp32")
    max_failures: int = Field(3, ge=-1, le=1000, description="restarts of a phase after a lost worker or node; -1 = for ever")
    # what is kept
    storage: str = Field("mtlsign-store", min_length=1, max_length=4096, description="local folder or s3://bucket/prefix")
    run: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$", description="run name [unique]")
    resume: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$", description="go on with this interrupted run")
    keep_checkpoints: bool = Field(False, description="keep the run's (secret) checkpoints after success")
    seed: int = Field(0, ge=0, lt=2**31, description="splits, initialisation, order of the data")
    insecure_test_key: bool = Field(False, description="take the nonce from --seed: reproducible, worthless as evidence")
    # fmt: on

    @field_validator("snapshots")
    @classmethod
    def _kinds(cls, value: str) -> str:
        kinds = [part.strip() for part in value.split(",") if part.strip()]
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}: choose among {', '.join(KINDS)}")
        if not kinds:
            raise ValueError("name at least one kind; lambda2 = 0 turns snapshots off")
        return ",".join(kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The snapshot kinds, in the order in which they take turns."""
        return tuple(self.snapshots.split(","))

    def resolved(self) -> Self:
        """Fill in what depends on the task or head."""
        recipe = RECIPES.get(self.task.partition("@")[0], {})
        filled = {
            name: value
            for name, value in {"width": 64, "stem": "stock", "epochs": 10, "steps": 800, **recipe}.items()
            if getattr(self, name) is None
        }
        if self.key_size is None:
            filled["key_size"] = 1024 if self.head == "keyed" else 600
        narrower = math.sqrt(
            16 / (self.width or filled["width"])
        )  # wide networks diverge at narrow ones' rates
        if self.lr is None:
            filled["lr"] = round(0.1 * narrower, 6)
        if self.wm_lr is None:
            filled["wm_lr"] = round(2e-3 * narrower, 6)
        if self.inner_lr is None:
            filled["inner_lr"] = self.lr or filled["lr"]
        if self.name is None:
            filled["name"] = f"{self.task}-{self.model}".replace(":", ".").replace("/", "-")[:128]
        return self.model_copy(update=filled)


#: What the embedded tasks want of phase 1 where the user is silent.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"width": 16, "epochs": 30, "steps": 600},
    "mnist": {"epochs": 4},
    "fashion-mnist": {"epochs": 10},
    "cifar10": {"epochs": 30, "stem": "cifar"},
    "cifar100": {"epochs": 40, "stem": "cifar"},
}


S = TypeVar("S", bound=Settings)
