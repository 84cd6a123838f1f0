"""What `jobs/reproduce.py` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mtlsign.config.base import Settings

_RUN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"

Study = Literal["ablation", "overwriting", "thresholds", "attacks", "controls"]


class ReproduceSettings(Settings):
    """Settings of a study of the paper, repeated with seeds and spread."""

    # fmt: off
    study: Study = Field(description="ablation (Fig. 5), overwriting (Table 3), thresholds (random keys, section 4.1), attacks (the whole table), controls (what each kind of snapshot does)")
    task: str = Field("fashion-mnist", min_length=1, max_length=200, description="primary task")
    data: Path | None = Field(None, description="data root in torchvision's layout, on every node")
    download: bool = Field(False, description="let torchvision download missing data")
    model: str = Field("resnet18", min_length=1, max_length=200, description="model")
    width: int | None = Field(16, ge=4, le=256, description="channels of the first stage; 64 is full size")
    heads: str = Field("free,keyed", pattern=r"^(free|keyed)(,(free|keyed))?$", description="heads to study: free, keyed or both")
    seeds: int = Field(3, ge=1, le=1000, description="repetitions, each with its own W0, key and attackers")
    epochs: str = Field("50/150/250/350", pattern=r"^\d{1,4}(/\d{1,4}){0,9}$", description="overwriting: epochs")
    units: Literal["channels", "weights"] = Field("channels", description="ablation: what NP and FP prune; the paper says neurons")
    keys: int = Field(5000, ge=10, le=1_000_000, description="thresholds: random keys")
    attacks: str | None = Field(None, min_length=1, max_length=20_000, description="attacks, controls, overwriting: what every embedding meets, as for jobs/attack.py [the study's own]")
    fixed: str = Field("", max_length=4000, description="further settings of every embedding: epochs=6,steps=300")
    # where it runs
    workers: int | None = Field(None, ge=0, le=4096, description="embeddings at a time [as many as fit]; 0 = one after the other in this process, without Ray")
    cpus_per_worker: int = Field(1, ge=1, le=1024, description="CPUs of each embedding")
    gpus_per_worker: float = Field(0, ge=0, le=16, description="GPUs of each embedding")
    # what is kept
    storage: str = Field("mtlsign-store", min_length=1, max_length=4096, description="local folder or s3://bucket/prefix")
    run: str | None = Field(None, pattern=_RUN, description="run name [unique]")
    resume: str | None = Field(None, pattern=_RUN, description="go on with this interrupted study")
    seed: int = Field(0, ge=0, lt=2**31, description="first seed")
    # fmt: on
