"""Settings of `mtlsign trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mtlsign.config.base import Settings, Texts
from mtlsign.config.mixins import KIT_PASSPHRASE_FILE, MIN_EVIDENCE_BITS, POLICY_BITS, TRUSTED_FACTORY


class TraceSettings(Settings):
    """Settings of the search for the recipients whose copies a model was made from."""

    common: ClassVar[tuple[str, ...]] = ("model", "kits", "min_evidence_bits", "owner", "json")

    # fmt: off
    model: str = Field(min_length=1, max_length=4096, description="suspect: model folder or .safetensors file, local or s3://")
    kits: Annotated[Texts, Field(min_length=1, max_length=1000, description="owner kit folders, one for each recipient; repeat the flag for several")]
    kit_passphrase_file: Path | None = Field(None, description=KIT_PASSPHRASE_FILE)
    min_evidence_bits: float = Field(POLICY_BITS, ge=0, le=4096, description=MIN_EVIDENCE_BITS)
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    # fmt: on
