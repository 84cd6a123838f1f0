"""One tree of errors: everything here is the caller's to mend, and each message says how.

A job prints such an error as one line and exits with 2; any other exception is a bug and exits with 1.
A claim that fails is not an error: it is a `Verdict`.
"""

from __future__ import annotations


class MTLSignError(Exception):
    """Root of the tree. `field` names the setting or input at fault; the message ends with the fix."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class SettingsError(MTLSignError):
    """A setting is unknown, of the wrong type, outside its limits, or contradicts another."""


class DataError(MTLSignError):
    """Primary data are missing, damaged or too few."""


class ModelError(MTLSignError):
    """A model, checkpoint, tap name or architecture cannot be used as asked."""


class CarrierError(MTLSignError):
    """A key set cannot be drawn in the data space asked for (for instance an image under 21 pixels)."""


class KeyMaterialError(MTLSignError):
    """An identity, passphrase, spec, signature or key opening is damaged, wrong or refused."""


class ArtifactError(MTLSignError):
    """A written artifact (model folder, kit, run folder) is incomplete, damaged or over a limit."""


class StorageError(MTLSignError):
    """A storage location is malformed, unreachable or not writable."""


class ClusterError(MTLSignError):
    """The Ray cluster cannot hold what was asked for, or training failed past its retries."""


class ClaimError(MTLSignError):
    """A statement, envelope, proof, bundle or claim is malformed, or not of the kind that is asked for."""


class LedgerError(MTLSignError):
    """A ledger is unreachable, refuses a write, or is not what it was: truncated, forked or rewritten."""
