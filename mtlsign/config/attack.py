"""What `jobs/attack.py` takes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mtlsign.config.base import Settings

_RUN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"

#: What `--resume` may change: where and how the rest runs, not what is attacked and how.
CHANGEABLE = frozenset(
    (
        *("owner", "passphrase_file", "kit_passphrase_file", "endpoint", "storage", "data", "download"),
        *("workers", "cpus_per_worker", "gpus_per_worker", "cluster_wait"),
        *("resume", "keep_models", "json_output", "quiet"),
    )
)


class AttackSettings(Settings):
    """Settings of an attack run. `bits` is the verifier's policy."""

    # fmt: off
    model: str | None = Field(None, min_length=1, max_length=4096, description="marked model: folder or .safetensors file, local or s3://")
    kit: str | None = Field(None, min_length=1, max_length=4096, description="owner kit folder")
    kit_passphrase_file: Path | None = Field(None, description="file whose first line opens the kit, where it was sealed with a passphrase")
    attacks: str = Field("fast", min_length=1, max_length=20_000, description="list (prints them), all, fast, standard, or names with settings: ftal:lr=quarter/full,epochs=3,prune:ratio=0.5+ftal")
    task: str | None = Field(None, min_length=1, max_length=200, description="primary task [the model's]; must be given where it is code, package.module:factory")
    data: Path | None = Field(None, description="data root in torchvision's layout, on every node")
    download: bool = Field(False, description="let torchvision download missing data")
    split_seed: int | None = Field(None, ge=0, lt=2**31, description="seed of the data's splits when the mark was embedded [the kit's, else 0]")
    budget: float = Field(0.0, ge=0, le=1, description="share of the owner's training part that attackers have beside their tenth")
    lr: float | None = Field(None, gt=0, le=100, description="peak rate that the model was trained with [the kit's, else by task and width]")
    copies: str | None = Field(None, max_length=65_536, description="average: other models marked from the same W0, with commas")
    factory: str | None = Field(None, max_length=200, description="own architecture that you trust, package.module:function; imported only if named here")
    bits: float = Field(120.0, ge=0, le=4096, description="evidence bits from which a claim is accepted")
    # where it runs
    workers: int = Field(1, ge=0, le=4096, description="attacks at a time, each a Ray task; 0 = this process alone, without Ray")
    cpus_per_worker: int | None = Field(None, ge=1, le=1024, description="CPUs of each attack [an even share, on a local Ray]")
    gpus_per_worker: float = Field(0, ge=0, le=16, description="GPUs of each attack")
    cluster_wait: int = Field(0, ge=0, le=86_400, description="seconds to wait for an autoscaler to make room")
    # what is kept
    storage: str = Field("mtlsign-store", min_length=1, max_length=4096, description="local folder or s3://bucket/prefix")
    run: str | None = Field(None, pattern=_RUN, description="run name [unique]")
    resume: str | None = Field(None, pattern=_RUN, description="go on with this interrupted run; finished attacks stay")
    keep_models: bool = Field(True, description="write each attacked model to the run's models/DIGEST, as jobs/verify.py reads them")
    seed: int = Field(0, ge=0, lt=2**31, description="the attackers' random choices")
    # fmt: on
