"""Settings of `mtlsign verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mtlsign.config import renamed
from mtlsign.config.base import Settings, Texts
from mtlsign.config.mixins import KIT_PASSPHRASE_FILE, MIN_EVIDENCE_BITS, TRUSTED_FACTORY


class VerifySettings(Settings):
    """Settings of a verification. `min_evidence_bits` and `gamma` are the policy of the verifier."""

    renamed: ClassVar[Mapping[str, str]] = renamed.VERIFY
    common: ClassVar[tuple[str, ...]] = (
        "model",
        "kit",
        "kit_passphrase_file",
        "min_evidence_bits",
        "trusted_factory",
        "owner",
        "json",
    )

    # fmt: off
    models: Annotated[Texts, Field(alias="model", min_length=1, max_length=1000, description="model folder or .safetensors file, local or s3://; repeat the flag for several")]
    kit: str = Field(min_length=1, max_length=4096, description="owner kit folder")
    kit_passphrase_file: Path | None = Field(None, description=KIT_PASSPHRASE_FILE)
    min_evidence_bits: float = Field(120.0, ge=0, le=4096, description=MIN_EVIDENCE_BITS)
    gamma: float = Field(0.7, gt=0.5, le=1, description="threshold of the paper, shown with the exact tail probability")
    control_keys: int = Field(5, ge=0, le=1000, description="random keys tried on the same model for comparison")
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    # fmt: on


class VerdictSettings(Settings):
    """Settings of `mtlsign verify --verdict`."""

    renamed: ClassVar[Mapping[str, str]] = renamed.VERIFY
    common: ClassVar[tuple[str, ...]] = ("verdict", "key", "model", "json")

    # fmt: off
    verdict: Path = Field(description="signed verdict of a verification service, as downloaded")
    key: Texts = Field((), max_length=100, description="public key (64 hex digits) of a service that you trust, from its /v1/keys; repeat the flag for several")
    model: str | None = Field(None, max_length=4096, description="model folder or .safetensors file that the verdict must be about")
    # fmt: on
