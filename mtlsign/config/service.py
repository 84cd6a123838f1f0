"""Options of the verification service: flags, a YAML file, and `MTLSIGN_*` in the environment.

A job's flags win over its `--config FILE`, and both over the environment; the `args` of `jobs/serve.yaml` are
defaults, over which the environment of the cluster wins. The signing key comes from the environment alone.
Everything here is the operator's. What a claim may ask for is limited by it, never the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, SecretStr

from mtlsign.config.base import Settings, read_config
from mtlsign.errors import SettingsError

PREFIX = "MTLSIGN_"
MIB = 2**20


class ServiceSettings(Settings):
    """What `jobs/serve.yaml` hands to the service."""

    # fmt: off
    # where it listens and what it keeps
    host: str = Field("127.0.0.1", min_length=1, max_length=253, description="address of the HTTP proxy")
    port: int = Field(8000, ge=1, le=65_535, description="port of the HTTP proxy")
    tls_cert: Path | None = Field(None, description="certificate chain (PEM): Ray's proxy itself speaks https; jobs/serve.py only, jobs/serve.yaml has http_options")
    tls_key: Path | None = Field(None, description="its private key (PEM)")
    public_url: str = Field("", max_length=512, description="how the world reaches it, https://NAME; sets Secure on cookies")
    state: Path = Field(Path("mtlsign-service"), description="folder of the SQLite file, uploads and fetched models; the service's own, mode 0700")
    keep_days: float = Field(30, gt=0, le=3650, description="days for which results are kept")
    # who signs
    identity: Path | None = Field(None, description="identity file of the service: signs verdicts, seals opened keys at rest [made in the state folder]")
    signing_key: SecretStr | None = Field(None, min_length=128, max_length=128, description="instead of a file, only as MTLSIGN_SIGNING_KEY: 128 hex digits, seed and kit key; an identity file wins")
    former: str = Field("", max_length=65_536, description="identity files of earlier keys, commas: still listed, still open what they sealed")
    # who may ask
    token_hours: float = Field(24 * 90, gt=0, le=24 * 3650, description="how long a new token lives unless said otherwise")
    # where models may come from
    allow: str = Field("", max_length=65_536, description="prefixes of pointers, commas: file:///DIR, s3://BUCKET/PREFIX, https://HOST[:PORT]/PATH")
    factory: str | None = Field(None, max_length=200, description="own architecture that you trust, package.module:function")
    # limits of one request
    max_claims: int = Field(256, ge=1, le=4096, description="claims in one request")
    max_body_mb: int = Field(32, ge=1, le=1024, description="JSON body, MiB")
    body_s: float = Field(30, gt=0, le=3600, description="seconds in which a JSON body must have come")
    upload_s: float = Field(900, gt=0, le=86_400, description="seconds in which an upload must have come")
    upload_mb_s: float = Field(64, gt=0, le=10_000, description="MiB a second that one upload may send, which bounds what a proxy has to hold")
    max_wait_s: float = Field(30, ge=0, le=300, description="longest synchronous wait; then 202")
    # limits of one model and one claim
    max_model_mb: int = Field(2048, ge=1, le=65_536, description="model file, MiB")
    max_bundle_mb: int = Field(96, ge=1, le=1024, description="bundle behind a pointer, MiB")
    max_tensors: int = Field(10_000, ge=1, le=1_000_000, description="tensors in a model file")
    max_numbers: int = Field(2**28, ge=2**16, le=2**34, description="numbers in one feature map of a whole key set; bounds memory")
    max_gflop: float = Field(3_000, gt=0, le=1e9, description="work of one claim, 10^9 operations; bounds time")
    fetch_s: float = Field(120, gt=0, le=3600, description="seconds to fetch one model or bundle")
    claim_s: float = Field(60, gt=0, le=3600, description="seconds for one claim, which then ends; a verifier stuck in one operation is replaced")
    pointer_s: float = Field(60, ge=0, le=86_400, description="seconds in which a pointer is not fetched again")
    # limits over requests
    queue_claims: int = Field(4096, ge=1, le=1_000_000, description="claims waiting, all tokens together; beyond: 503")
    token_claims: int = Field(2048, ge=1, le=1_000_000, description="claims waiting of one token; beyond: 429")
    queue_mb: int = Field(1024, ge=1, le=1_000_000, description="claims waiting in the file, MiB, all tokens together; beyond: 503")
    token_mb: int = Field(256, ge=1, le=1_000_000, description="claims waiting in the file, MiB, of one token; beyond: 429")
    upload_quota_mb: int = Field(4096, ge=1, le=10_000_000, description="uploads of one token, MiB")
    upload_hours: float = Field(24, gt=0, le=24 * 365, description="an upload is deleted after this")
    cache_mb: int = Field(8192, ge=1, le=100_000_000, description="fetched models on disk, MiB")
    cache_models: int = Field(16, ge=1, le=10_000, description="models whose tapped tensors a verifier keeps in memory")
    cache_tensors_mb: int = Field(512, ge=1, le=1_000_000, description="tapped tensors a verifier keeps in memory, MiB")
    # the verifier's policy
    bits: float = Field(120.0, ge=0, le=4096, description="evidence bits from which a claim is accepted")
    gamma: float = Field(0.7, gt=0.5, le=1, description="the paper's threshold, shown beside the exact tail")
    controls: int = Field(0, ge=0, le=100, description="wrong keys tried on each suspect; each costs as much as a claim")
    # verifiers
    verifiers: int = Field(1, ge=1, le=4096, description="verifying replicas, at least")
    max_verifiers: int = Field(0, ge=0, le=4096, description="verifying replicas, at most; 0 = no autoscaling")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of each verifying replica; it reserves as many CPUs")
    gpus: float = Field(0, ge=0, le=16, description="GPUs of each verifying replica")
    memory_mb: int = Field(4096, ge=512, le=4_000_000, description="memory that a verifying replica may take beyond its start, MiB")
    attempts: int = Field(3, ge=1, le=100, description="how often a claim is tried on another replica after one died")
    # the ledger, read only but for one entry that names the signing key
    ledger: str | None = Field(None, max_length=4096, description="sqlite:///PATH or etcd://HOST:PORT[,…]; empty: no ledger endpoints")
    announce: bool = Field(False, description="put the public half of the signing key into the ledger at start")
    # fmt: on

    @classmethod
    def load(cls, config: Path | None = None, *, base: Mapping[str, Any] | None = None) -> Self:
        """`base`, over it the file, over it `MTLSIGN_*` of the environment. Raises SettingsError."""
        given = {**(base or {}), **(read_config(config) if config else {})}
        return cls.of({**_public(given), **_environment(cls)})

    @classmethod
    def merged(cls, given: Self) -> Self:
        """What was given, and `MTLSIGN_*` for the rest: a job's flags and file win over the environment.

        Raises: SettingsError.
        """
        return cls.of({**_environment(cls), **_public(given.model_dump(exclude_unset=True, by_alias=True))})

    @classmethod
    def received(cls, sent: Mapping[str, Any]) -> Self:
        """Settings that were resolved elsewhere, and who signs from the environment of this process."""
        own = _environment(cls)
        return cls.of({**{name: own[name] for name in ("signing_key", "identity") if name in own}, **sent})

    @property
    def body_limit(self) -> int:
        """Bytes of a JSON body."""
        return self.max_body_mb * MIB

    @property
    def model_limit(self) -> int:
        """Bytes of a model file."""
        return self.max_model_mb * MIB


def _public(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if given.get("signing_key") is not None:
        raise SettingsError(
            "is a secret: pass it as MTLSIGN_SIGNING_KEY in the environment, never as a flag or in a file",
            field="signing-key",
        )
    return given


def _environment(kind: type[ServiceSettings]) -> dict[str, str]:
    names = sorted((f.alias or name) for name, f in kind.model_fields.items())
    return {name: os.environ[PREFIX + name.upper()] for name in names if PREFIX + name.upper() in os.environ}


class BatchSettings(ServiceSettings):
    """What `jobs/verify_batch.py` takes."""

    # fmt: off
    claims: Path = Field(description="file with one claim on each line (JSON)")
    out: Path = Field(Path("results.jsonl"), description="file for one result on each line, in order")
    # fmt: on
