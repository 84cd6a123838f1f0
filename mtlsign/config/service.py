"""Settings of the verification service and of batch verification.

All of them belong to the operator: they limit what a request may ask for, and no request changes them. The signing
key comes from the environment alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, SecretStr

from mtlsign.config import renamed
from mtlsign.config.base import Settings, Texts, refuse_secrets
from mtlsign.config.mixins import MIN_EVIDENCE_BITS, TRUSTED_FACTORY
from mtlsign.config.sources import environment
from mtlsign.config.yaml_file import read_config

MIB = 2**20
#: Settings that a process of the service reads from its own environment only, because they name or hold a secret.
_LOCAL = ("signing_key", "identity")


class ServiceSettings(Settings):
    """Settings of `mtlsign serve`; `jobs/serve.yaml` passes the same ones."""

    renamed: ClassVar[Mapping[str, str]] = renamed.SERVICE
    common: ClassVar[tuple[str, ...]] = (
        "host",
        "port",
        "tls_cert",
        "tls_key",
        "state_dir",
        "identity",
        "allowed_locations",
        "trusted_factory",
        "ledger",
        "min_replicas",
        "max_replicas",
    )

    # fmt: off
    # address and state
    host: str = Field("127.0.0.1", min_length=1, max_length=253, description="address of the HTTP proxy")
    port: int = Field(8000, ge=1, le=65_535, description="port of the HTTP proxy")
    tls_cert: Path | None = Field(None, description="certificate chain (PEM), for https by Ray's proxy itself; jobs/serve.py only, jobs/serve.yaml has http_options")
    tls_key: Path | None = Field(None, description="private key of the certificate (PEM)")
    public_url: str = Field("", max_length=512, description="public address, https://NAME; sets Secure and the prefix __Host- on cookies")
    state_dir: Path = Field(Path("mtlsign-service"), description="folder of the SQLite file, uploads and fetched models; owned by the service, mode 0700")
    retention_days: float = Field(30, gt=0, le=3650, description="days for which results are kept")
    # identity
    identity: Path | None = Field(None, description="identity file of the service: signs verdicts, encrypts opened keys at rest [created in the state folder]")
    signing_key: SecretStr | None = Field(None, min_length=128, max_length=128, description="instead of a file, only as MTLSIGN_SIGNING_KEY: 128 hex digits, seed and kit key; an identity file takes precedence")
    previous_identities: Texts = Field((), max_length=100, description="identity file of an earlier key: still listed, still decrypts what it encrypted; repeat the flag")
    # access
    token_ttl_hours: float = Field(24 * 90, gt=0, le=24 * 3650, description="default life of a new token")
    # locations of models
    allowed_locations: Texts = Field((), max_length=1000, description="prefix of the locations of models: file:///DIR, s3://BUCKET/PREFIX, https://HOST[:PORT]/PATH; repeat the flag")
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    factory_parameters: Texts = Field((), max_length=100, description="whole number that a claim may pass to the trusted factory, NAME=LOW:HIGH; channels, classes and size are always allowed; repeat the flag")
    # limits of one request
    max_claims: int = Field(256, ge=1, le=4096, description="claims in one request")
    max_body_mb: int = Field(32, ge=1, le=1024, description="JSON body, MiB")
    body_timeout_s: float = Field(30, gt=0, le=3600, description="seconds in which a JSON body must be complete")
    upload_timeout_s: float = Field(900, gt=0, le=86_400, description="seconds in which an upload must be complete")
    upload_rate_mb_s: float = Field(64, gt=0, le=10_000, description="MiB a second of one upload, which bounds the memory of the proxy")
    max_wait_s: float = Field(30, ge=0, le=300, description="longest synchronous wait; then 202")
    # limits of one model and one claim
    max_model_mb: int = Field(2048, ge=1, le=65_536, description="model file, MiB")
    max_bundle_mb: int = Field(96, ge=1, le=1024, description="bundle at a location, MiB")
    max_tensors: int = Field(10_000, ge=1, le=1_000_000, description="tensors in a model file")
    max_activation_elements: int = Field(2**28, ge=2**16, le=2**34, description="elements in one feature map of a whole key set; bounds memory")
    max_gflop: float = Field(3_000, gt=0, le=1e9, description="operations of one claim, in units of 10^9; bounds time")
    fetch_timeout_s: float = Field(120, gt=0, le=3600, description="seconds to fetch one model or bundle")
    claim_timeout_s: float = Field(60, gt=0, le=3600, description="seconds for one claim; a verifier that does not react to the end of them is replaced")
    location_cache_ttl_s: float = Field(60, ge=0, le=86_400, description="seconds in which a location is not fetched again")
    # limits over requests
    max_queued_claims: int = Field(4096, ge=1, le=1_000_000, description="queued claims of all tokens; beyond: 503")
    max_queued_claims_per_token: int = Field(2048, ge=1, le=1_000_000, description="queued claims of one token; beyond: 429")
    max_queued_mb: int = Field(1024, ge=1, le=1_000_000, description="queued claims in the file, MiB, of all tokens; beyond: 503")
    max_queued_mb_per_token: int = Field(256, ge=1, le=1_000_000, description="queued claims in the file, MiB, of one token; beyond: 429")
    max_stored_claims_per_token: int = Field(100_000, ge=1, le=100_000_000, description="claims of one token whose results are kept; beyond: its oldest answered requests are deleted")
    upload_quota_mb: int = Field(4096, ge=1, le=10_000_000, description="uploads of one token, MiB")
    upload_ttl_hours: float = Field(24, gt=0, le=24 * 365, description="hours after which an upload is deleted")
    cache_mb: int = Field(8192, ge=1, le=100_000_000, description="fetched models on disk, MiB")
    cache_models: int = Field(16, ge=1, le=10_000, description="models whose tapped tensors a verifier keeps in memory")
    cache_tensors_mb: int = Field(512, ge=1, le=1_000_000, description="tapped tensors that a verifier keeps in memory, MiB")
    # policy of the verifier
    min_evidence_bits: float = Field(120.0, ge=0, le=4096, description=MIN_EVIDENCE_BITS)
    gamma: float = Field(0.7, gt=0.5, le=1, description="threshold of the paper, shown with the exact tail probability")
    control_keys: int = Field(0, ge=0, le=100, description="random keys tried on each model; each costs as much as a claim")
    # verifiers
    min_replicas: int = Field(1, ge=1, le=4096, description="smallest number of verifier replicas")
    max_replicas: int = Field(0, ge=0, le=4096, description="largest number of verifier replicas; 0: no autoscaling")
    threads_per_replica: int = Field(1, ge=1, le=1024, description="CPU threads of each replica; it reserves as many CPUs")
    gpus_per_replica: float = Field(0, ge=0, le=16, description="GPUs of each replica")
    memory_mb: int = Field(4096, ge=512, le=4_000_000, description="memory that a replica may use in addition to that at its start, MiB")
    max_attempts: int = Field(3, ge=1, le=100, description="attempts for a claim whose replica crashed")
    # the ledger: read only, except for one entry that names the signing key
    ledger: str | None = Field(None, max_length=4096, description="sqlite:///PATH or etcd://HOST:PORT[,…]; empty: no ledger endpoints")
    publish_signing_key: bool = Field(False, description="append the public signing key to the ledger at start")
    # fmt: on

    @classmethod
    def load(cls, config: Path | None = None, *, base: Mapping[str, Any] | None = None) -> Self:
        """Return the settings of the environment, with defaults from a file and a mapping.

        Args:
            config: YAML file; the environment takes precedence.
            base: defaults below the file, such as the `args` of `jobs/serve.yaml`.

        Raises:
            SettingsError: a setting is unknown or invalid, or the file holds the signing key.
        """
        defaults = {**(base or {}), **(read_config(config) if config else {})}
        refuse_secrets(cls, defaults)
        return cls.of({**defaults, **environment(cls)})

    @classmethod
    def received(cls, values: Mapping[str, Any]) -> Self:
        """Return settings that another process sent; the signing identity comes from this environment."""
        local = {name: value for name, value in environment(cls).items() if name in _LOCAL}
        return cls.of({**local, **values})

    @property
    def body_limit(self) -> int:
        """Bytes of a JSON body."""
        return self.max_body_mb * MIB

    @property
    def model_limit(self) -> int:
        """Bytes of a model file."""
        return self.max_model_mb * MIB


class BatchSettings(ServiceSettings):
    """Settings of `mtlsign verify-batch`."""

    common: ClassVar[tuple[str, ...]] = (
        "claims",
        "output",
        "allowed_locations",
        "state_dir",
        "identity",
        "trusted_factory",
        "min_replicas",
        "min_evidence_bits",
        "json",
    )

    # fmt: off
    claims: Path = Field(description="file with one claim in each line (JSON)")
    output: Path = Field(Path("results.jsonl"), description="file for the results, one in each line, in the order of the claims")
    # fmt: on
