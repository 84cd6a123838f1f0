"""Settings of the jobs around the ledger: publish, claim, council, dispute, ledger, and of bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from mtlsign.config import renamed
from mtlsign.config.base import Settings, Texts
from mtlsign.config.mixins import KIT_PASSPHRASE_FILE, TRUSTED_FACTORY

_MIN_EVIDENCE_BITS = "least evidence in bits that you accept, whatever the council of the ledger requires"


class LedgerSettings(Settings):
    """Settings of every job at a ledger."""

    renamed: ClassVar[Mapping[str, str]] = renamed.CLAIMS

    # fmt: off
    ledger: str = Field(min_length=1, max_length=4096, description="sqlite:///PATH or etcd://HOST:PORT[,HOST:PORT]")
    archive: Texts = Field((), max_length=100, description="store of the files behind claims: folder or s3://; repeat the flag for several [PATH.archive next to an SQLite ledger]")
    witness_state: Path | None = Field(None, description="file with everything that this witness co-signed [next to the default identity]")
    origin: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="refuse any other ledger: hash of its entry 0, as `ledger.py head` shows it")
    etcd_ca: Path | None = Field(None, description="etcd: certificate of the authority [ETCDCTL_CACERT]")
    etcd_cert: Path | None = Field(None, description="etcd: client certificate [ETCDCTL_CERT]")
    etcd_key: Path | None = Field(None, description="etcd: client private key [ETCDCTL_KEY]")
    # fmt: on


class KitSettings(LedgerSettings):
    """Settings of the jobs that read kits of the owner."""

    # fmt: off
    kit: Annotated[Texts, Field(min_length=1, max_length=100, description="owner kit folder; repeat the flag for several, in the order in which their keys will be opened")]
    kit_passphrase_file: Path | None = Field(None, description=KIT_PASSPHRASE_FILE)
    # fmt: on


class PublishSettings(KitSettings):
    """Settings of `mtlsign publish`."""

    common: ClassVar[tuple[str, ...]] = (
        "kit",
        "model",
        "ledger",
        "archive",
        "licence",
        "recipient",
        "card",
        "owner",
        "allow_public",
    )

    # fmt: off
    model: str = Field(min_length=1, max_length=4096, description="marked model that is not yet released: folder or .safetensors file")
    licence: str = Field("", max_length=128, description="free text, public: licence of this release")
    recipient: str = Field("", max_length=128, description="free text, public: recipient of this release")
    card: Path | None = Field(None, description="write a provenance block into this model card")
    allow_public: bool = Field(False, description="publish although the model seems to be public already")
    force: bool = Field(False, description="publish although the model failed its own verification after embedding")
    # fmt: on


class ClaimSettings(KitSettings):
    """Settings of `mtlsign claim`."""

    common: ClassVar[tuple[str, ...]] = (
        "kit",
        "model",
        "ledger",
        "archive",
        "own_model",
        "suspect_name",
        "bundle",
        "confirmation_timeout",
        "trace",
        "owner",
        "dry_run",
        "force",
    )

    # fmt: off
    model: str = Field(min_length=1, max_length=4096, description="accused model: folder or .safetensors file")
    own_model: str | None = Field(None, max_length=4096, description="the owner's marked model, for the lineage [from the archive, else next to the kit]")
    suspect_name: str = Field("suspect", min_length=1, max_length=128, description="public: name of the accused model in the registration")
    bundle: Path | None = Field(None, description="also write the claim as one file for an offline check")
    force: bool = Field(False, description="open a key even if the accused model contains none of them")
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    confirmation_timeout: float = Field(300, ge=0, le=86_400, description="seconds to wait until the council has co-signed the registration; without that no key is opened, and a later run opens it")
    open_unconfirmed: bool = Field(False, description="open the key although the registration is not confirmed; a party that can rewrite the ledger's store could then remove the registration")
    trace: bool = Field(False, description="the kits are of several recipients' copies, each published on its own; claim with the copy that the accused model was made from")
    dry_run: bool = Field(False, description="verify the accused model and show which key would be opened; write nothing")
    # fmt: on


class CouncilSettings(LedgerSettings):
    """Settings of `mtlsign council`."""

    common: ClassVar[tuple[str, ...]] = (
        "identity",
        "passphrase_file",
        "ledger",
        "archive",
        "once",
        "interval",
        "witness_state",
        "trusted_factory",
    )

    # fmt: off
    identity: Path = Field(description="identity file of this council member; --passphrase-file decrypts it")
    once: bool = Field(False, description="run one round and exit")
    interval: float = Field(30, gt=0, le=86_400, description="seconds between rounds")
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    # fmt: on


class DisputeSettings(LedgerSettings):
    """Settings of `mtlsign dispute`."""

    common: ClassVar[tuple[str, ...]] = (
        "claims",
        "ledger",
        "archive",
        "min_evidence_bits",
        "trusted_factory",
        "json",
    )

    # fmt: off
    claims: Annotated[Texts, Field(min_length=1, max_length=1000, description="claim id or entry number; repeat the flag for several")]
    min_evidence_bits: int = Field(120, ge=1, le=4096, description=_MIN_EVIDENCE_BITS)
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    # fmt: on


class LedgerJobSettings(LedgerSettings):
    """Settings of `mtlsign ledger ACTION`."""

    common: ClassVar[tuple[str, ...]] = (
        "ledger",
        "index",
        "head",
        "members",
        "threshold",
        "claim",
        "statement",
        "model",
        "output",
        "owner",
    )

    # fmt: off
    action: str | None = Field(None, max_length=20, description="create, head, prove, check, list, members, exhibit, bundle; usually the first argument, without the flag")
    index: int | None = Field(None, ge=0, le=2**40, description="prove: number of the entry")
    size: int | None = Field(None, ge=0, le=2**40, description="prove: size of the tree [that of the newest confirmed checkpoint]")
    head: Path | None = Field(None, description="check, prove: stored checkpoint that the ledger must still contain")
    members: Texts = Field((), max_length=64, description="create, members: public key (hex) or identity file; repeat the flag [the owner alone]")
    threshold: int | None = Field(None, ge=1, le=64, description="create, members: number of members that decide [more than half]")
    min_evidence_bits: int = Field(120, ge=1, le=4096, description="create, members: evidence in bits at which the council accepts")
    voting_window: int = Field(14 * 86_400, ge=1, le=316_224_000, description="create, members: seconds in which votes count")
    statement: Path | None = Field(None, description="members: proposed change to sign; it is appended once enough members have signed")
    claim: str | None = Field(None, max_length=64, description="exhibit: the claim that it answers; bundle: the claim to export")
    model: str | None = Field(None, max_length=4096, description="exhibit: the owner's model with the earlier timestamp")
    output: Path | None = Field(None, description="members, bundle, head: file to write")
    # fmt: on


class BundleSettings(Settings):
    """Settings of `mtlsign verify --bundle`."""

    renamed: ClassVar[Mapping[str, str]] = renamed.CLAIMS
    common: ClassVar[tuple[str, ...]] = (
        "bundle",
        "head",
        "min_evidence_bits",
        "card",
        "report",
        "trusted_factory",
        "json",
    )

    # fmt: off
    bundle: Path = Field(description="bundle of a claim, checked without any network")
    head: Path | None = Field(None, description="checkpoint (signed note) that you hold and trust; without it the bundle only confirms itself, and the claim is at most self_attested")
    min_evidence_bits: int = Field(120, ge=1, le=4096, description=_MIN_EVIDENCE_BITS)
    card: Path | None = Field(None, description="write the result into this model card, as a separate block")
    report: Path | None = Field(None, description="write the result as one HTML page")
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    # fmt: on
