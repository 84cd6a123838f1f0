"""Settings of `mtlsign sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mtlsign.config import renamed
from mtlsign.config.base import Settings, Texts
from mtlsign.config.embed import MAX_WIDTH
from mtlsign.config.mixins import (
    MIN_EVIDENCE_BITS,
    POLICY_BITS,
    RESUMABLE,
    RunPlacement,
    RunStorage,
    TaskData,
)


class SweepSettings(RunStorage, RunPlacement, TaskData, Settings):
    """Settings of a sweep: a space of `EmbedSettings`, the attacks on every cell, and the resources."""

    renamed: ClassVar[Mapping[str, str]] = renamed.SWEEP
    common: ClassVar[tuple[str, ...]] = (
        "space",
        "task",
        "data",
        "set",
        "attacks",
        "num_samples",
        "workers",
        "storage",
        "resume",
        "seed",
    )
    resumable: ClassVar[frozenset[str]] = (
        Settings.resumable | RESUMABLE | {"keep_checkpoints", "max_concurrent", "force"}
    )

    # fmt: off
    space: str = Field("smoke", min_length=1, max_length=200, description="smoke, paper_grid, or package.module:function")
    task: str | None = Field(None, min_length=1, max_length=200, description="primary task, instead of that of the space")
    model: str | None = Field(None, min_length=1, max_length=200, description="model, instead of that of the space")
    width: int | None = Field(None, ge=4, le=MAX_WIDTH, description="channels of the first stage, instead of those of the space")
    overrides: Texts = Field((), alias="set", max_length=200, description="further setting of every cell, NAME=VALUE such as phase1.epochs=6; repeat the flag")
    attacks: str = Field("ftal:lr=quarter,epochs=3,prune:ratio=0.6", min_length=1, max_length=20_000, description="attacks on the model of every cell, as for jobs/attack.py")
    min_evidence_bits: float = Field(POLICY_BITS, ge=0, le=4096, description=MIN_EVIDENCE_BITS)
    max_accuracy_drop: float = Field(0.3, ge=0, le=100, description="percentage points of validation accuracy that a recommended cell may lose")
    num_samples: int = Field(1, ge=1, le=10_000, description="repetitions: each has its own seed, or its own random values where the space draws them")
    scheduler: Literal["fifo", "asha", "median"] = Field("fifo", description="asha, median: stop weak cells early; fifo: finish all")
    # resources
    workers: int | None = Field(None, ge=0, le=4096, description="concurrent cells, each in its own process [as many as the resources allow]; 0: this process alone, without Ray")
    max_concurrent: int | None = Field(None, ge=1, le=4096, description="upper limit of concurrent cells")
    cpus_per_worker: int = Field(1, ge=1, le=1024, description="CPUs of each cell")
    max_failures: int = Field(3, ge=0, le=1000, description="restarts of a cell after a lost worker or node")
    # outputs
    force: bool = Field(False, description="recommend a combination although no marked model is accepted")
    keep_checkpoints: bool = Field(False, description="keep W0 and the (secret) checkpoints of the cells after success")
    # fmt: on
