"""mtlsign.config.verify."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mtlsign.config.base import Settings


class VerifySettings(Settings):
    """What `jobs/verify.py` takes. `bits` and `gamma` are the verifier's policy, never the claimant's."""

    # fmt: off
    model: str = Field(min_length=1, max_length=65_536, description="model folder or .safetensors file, local or s3://; several with commas")
    kit: str = Field(min_length=1, max_length=4096, description="owner kit folder")
    kit_passphrase_file: Path | None = Field(None, description="file whose first line opens the kit, where it was sealed with a passphrase")
    bits: float = Field(120.0, ge=0, le=4096, description="evidence bits from which a claim is accepted")
    gamma: float = Field(0.7, gt=0.5, le=1, description="the paper's threshold, shown beside the exact tail")
    controls: int = Field(5, ge=0, le=1000, description="wrong keys tried on the same suspect")
    factory: str | None = Field(None, max_length=200, description="own architecture that you trust, package.module:function; imported only if named here")
    # fmt: on

    @property
    def models(self) -> list[str]:
        """The places to look at, in order."""
        return [place.strip() for place in self.model.split(",") if place.strip()]
