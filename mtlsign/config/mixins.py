"""Settings that several jobs share: data of the primary task, resources of the workers, storage of the run."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from mtlsign.config.base import RUN_NAME, Settings

#: Settings of the mixins that may change when a run is resumed: they do not affect the results.
RESUMABLE = frozenset(
    (
        *("data", "download", "storage", "resume", "workers", "cpus_per_worker"),
        *("gpus_per_worker", "resource_timeout_s", "max_failures"),
    )
)

#: Evidence in bits at which a claim is accepted by default (docs/decisions/0006).
POLICY_BITS = 120.0
TRUSTED_FACTORY = (
    "factory of a custom architecture whose code you trust, package.module:function, or "
    "NAME=package.module:function if the spec has another NAME; imported only if named here"
)
MIN_EVIDENCE_BITS = "evidence in bits at which a claim is accepted"
RESOURCE_TIMEOUT_S = "seconds to wait until an autoscaler provides the resources"
KIT_PASSPHRASE_FILE = "file whose first line decrypts a kit that was encrypted with a passphrase"


class TaskData(BaseModel):
    """Data of the primary task."""

    # fmt: off
    data: Path | None = Field(None, description="folder of the datasets in the layouts of torchvision, of the official text archives, of CamVid, Penn-Fudan and Pascal VOC, or virusshare/CLASS/FILE, on every node")
    tokenizer: Path | None = Field(None, description="tokenizer.json of a pretrained model, for text tasks [the words of GloVe]")
    download: bool = Field(False, description="let torchvision download missing data")
    # fmt: on


class RunPlacement(BaseModel):
    """Resources of each worker."""

    # fmt: off
    cpus_per_worker: int | None = Field(None, ge=1, le=1024, description="CPUs of each worker [an equal share of a local Ray]")
    gpus_per_worker: float = Field(0, ge=0, le=16, description="GPUs of each worker")
    # fmt: on


class RunStorage(Settings):
    """Storage of a run, its name and its seed."""

    # fmt: off
    storage: str = Field("mtlsign-store", min_length=1, max_length=4096, description="local folder or s3://bucket/prefix")
    run: str | None = Field(None, pattern=RUN_NAME, description="name of the run [unique]")
    resume: str | None = Field(None, pattern=RUN_NAME, description="continue this interrupted run; finished parts are not repeated")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of all random choices")
    # fmt: on
