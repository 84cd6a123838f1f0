"""What `jobs/sweep.py` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mtlsign.config.base import Settings

_RUN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"

#: What `--resume` may change: where and how the rest runs, not what is computed.
CHANGEABLE = frozenset(
    (
        *("owner", "passphrase_file", "endpoint", "storage", "data", "download"),
        *("workers", "max_concurrent", "cpus_per_worker", "gpus_per_worker", "max_failures"),
        *("resume", "keep_checkpoints", "json_output", "quiet"),
    )
)


class SweepSettings(Settings):
    """Settings of a sweep: a space of `EmbedSettings`, what attacks every cell, and where cells run."""

    # fmt: off
    space: str = Field("smoke", min_length=1, max_length=200, description="smoke, paper_grid, or package.module:function")
    task: str | None = Field(None, min_length=1, max_length=200, description="primary task, over the space's")
    data: Path | None = Field(None, description="data root in torchvision's layout, on every node")
    download: bool = Field(False, description="let torchvision download missing data")
    model: str | None = Field(None, min_length=1, max_length=200, description="model, over the space's")
    width: int | None = Field(None, ge=4, le=256, description="channels of the first stage, over the space's")
    fixed: str = Field("", max_length=4000, description="further settings of every cell: epochs=6,steps=300")
    attacks: str = Field("ftal:lr=quarter,epochs=3,prune:ratio=0.6", min_length=1, max_length=20_000, description="what every cell's model meets, as for jobs/attack.py")
    bits: float = Field(120.0, ge=0, le=4096, description="evidence bits from which a claim is accepted")
    max_drop: float = Field(0.3, ge=0, le=100, description="points of validation accuracy that a recommended cell may lose")
    num_samples: int = Field(1, ge=1, le=10_000, description="repetitions: each with its own seed, or its own draw where the space draws")
    scheduler: Literal["fifo", "asha", "median"] = Field("fifo", description="stop weak cells early: asha, median; fifo finishes all")
    # where it runs
    workers: int | None = Field(None, ge=0, le=4096, description="cells at a time, each in a process of its own [as many as fit]; 0 = one after the other in this process, without Ray")
    max_concurrent: int | None = Field(None, ge=1, le=4096, description="at most so many cells at a time, of the workers")
    cpus_per_worker: int = Field(1, ge=1, le=1024, description="CPUs of each cell")
    gpus_per_worker: float = Field(0, ge=0, le=16, description="GPUs of each cell")
    max_failures: int = Field(3, ge=0, le=1000, description="restarts of a cell after a lost worker or node")
    # what is kept
    storage: str = Field("mtlsign-store", min_length=1, max_length=4096, description="local folder or s3://bucket/prefix")
    run: str | None = Field(None, pattern=_RUN, description="run name [unique]")
    resume: str | None = Field(None, pattern=_RUN, description="go on with this interrupted sweep; finished cells stay")
    keep_checkpoints: bool = Field(False, description="keep W0 and the cells' (secret) checkpoints after success")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the first repetition: splits, initialisation, key, attackers")
    # fmt: on
