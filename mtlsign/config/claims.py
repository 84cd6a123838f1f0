"""Options of the jobs around the ledger: publish, claim, council, dispute, ledger."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mtlsign.config.base import Settings

LIST = "several with commas"


class LedgerSettings(Settings):
    """What every job at a ledger shares."""

    # fmt: off
    ledger: str = Field(min_length=1, max_length=4096, description="sqlite:///PATH or etcd://HOST:PORT[,HOST:PORT]")
    archive: str | None = Field(None, max_length=65_536, description=f"where the bytes behind claims lie: folder or s3://, {LIST} [PATH.archive beside an SQLite ledger]")
    memory: Path | None = Field(None, description="file in which this witness remembers what it co-signed [beside the default identity]")
    origin: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="refuse any other ledger: hash of its entry 0, as `ledger.py head` shows it")
    etcd_ca: Path | None = Field(None, description="etcd: certificate of the authority [ETCDCTL_CACERT]")
    etcd_cert: Path | None = Field(None, description="etcd: our certificate [ETCDCTL_CERT]")
    etcd_key: Path | None = Field(None, description="etcd: our private key [ETCDCTL_KEY]")
    # fmt: on


class KitSettings(LedgerSettings):
    """What both sides of a claim share: the owner's kits."""

    # fmt: off
    kit: str = Field(min_length=1, max_length=65_536, description=f"owner kit folder; {LIST}, in the order in which their keys will open")
    kit_passphrase_file: Path | None = Field(None, description="file whose first line opens the kit, where it was sealed with a passphrase")
    # fmt: on


class PublishSettings(KitSettings):
    """What `jobs/publish.py` takes."""

    # fmt: off
    model: str = Field(min_length=1, max_length=4096, description="the marked model, not yet given away: folder or .safetensors file")
    licence: str = Field("", max_length=128, description="free text, public: the licence of this release")
    recipient: str = Field("", max_length=128, description="free text, public: who gets this release")
    card: Path | None = Field(None, description="write a provenance block into this model card")
    already_public: bool = Field(False, description="publish though the model seems to be out already")
    # fmt: on


class ClaimSettings(KitSettings):
    """What `jobs/claim.py` takes."""

    # fmt: off
    model: str = Field(min_length=1, max_length=4096, description="the accused model: folder or .safetensors file")
    marked: str | None = Field(None, max_length=4096, description="our marked model, for the lineage [looked up in the archive, else beside the kit]")
    name: str = Field("suspect", min_length=1, max_length=128, description="public: how the registration calls the accused model")
    bundle: Path | None = Field(None, description="also write the claim as one file for an offline check")
    anyway: bool = Field(False, description="open a key even if none of them is found in the accused model")
    factory: str | None = Field(None, max_length=200, description="own architecture that you trust, package.module:function")
    wait: float = Field(0, ge=0, le=86_400, description="seconds to wait, before the key is opened, until the council co-signed the registration")
    # fmt: on


class CouncilSettings(LedgerSettings):
    """What `jobs/council.py` takes."""

    # fmt: off
    identity: Path = Field(description="this member's identity file; --passphrase-file opens it")
    once: bool = Field(False, description="one round, then end")
    every: float = Field(30, gt=0, le=86_400, description="seconds between rounds")
    factory: str | None = Field(None, max_length=200, description="own architecture that you trust, package.module:function")
    # fmt: on


class DisputeSettings(LedgerSettings):
    """What `jobs/dispute.py` takes."""

    # fmt: off
    claims: str = Field(min_length=1, max_length=65_536, description=f"claim ids or entry numbers, {LIST}")
    bits: int = Field(120, ge=1, le=4096, description="least evidence that you accept, whatever the ledger's council asks for")
    factory: str | None = Field(None, max_length=200, description="own architecture that you trust, package.module:function")
    # fmt: on


class LedgerJobSettings(LedgerSettings):
    """What `jobs/ledger.py` takes beside its action."""

    # fmt: off
    index: int | None = Field(None, ge=0, le=2**40, description="prove: the entry")
    size: int | None = Field(None, ge=0, le=2**40, description="prove: size of the tree [newest head that counts]")
    head: Path | None = Field(None, description="check, prove: a head that you kept, which the ledger must still contain")
    members: str | None = Field(None, max_length=65_536, description=f"found, members: public keys (hex) or identity files, {LIST} [the owner alone]")
    threshold: int | None = Field(None, ge=1, le=64, description="found, members: how many of them decide [more than half]")
    bits: int = Field(120, ge=1, le=4096, description="found, members: evidence from which the council accepts")
    window: int = Field(14 * 86_400, ge=1, le=316_224_000, description="found, members: seconds in which votes count")
    statement: Path | None = Field(None, description="members: a proposed change to sign; it is appended once enough have signed")
    claim: str | None = Field(None, max_length=64, description="exhibit: the claim that it answers; bundle: the claim to pack")
    model: str | None = Field(None, max_length=4096, description="exhibit: our earlier-stamped model")
    out: Path | None = Field(None, description="members, bundle, head: file to write")
    # fmt: on


class BundleSettings(Settings):
    """What `jobs/verify.py` takes with `--bundle`."""

    # fmt: off
    bundle: Path = Field(description="a claim's bundle, checked without any network")
    head: Path | None = Field(None, description="the head (signed note) that you hold and trust; without it the bundle vouches for itself")
    bits: int = Field(120, ge=1, le=4096, description="least evidence that you accept, whatever the ledger's council asks for")
    card: Path | None = Field(None, description="write the result into this model card, as a block of its own")
    factory: str | None = Field(None, max_length=200, description="own architecture that you trust, package.module:function")
    # fmt: on
