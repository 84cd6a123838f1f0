"""Exception hierarchy. Every exception here reports a problem that the caller can fix; its message states the
fix.

A job prints such an error on a single line and exits with its `exit_code`. Any other exception is a bug and
exits with 1.
A failed claim is not an exception; it is a `Verdict`.
"""

from __future__ import annotations

from typing import ClassVar


class MTLSignError(Exception):
    """Base class. `field` names the invalid setting or input; `detail` is the message without the field."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.detail = field, message

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling, by which Ray returns errors, for subclasses with other constructors as well."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[MTLSignError], args: tuple[object, ...], state: dict[str, object]) -> MTLSignError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class SettingsError(MTLSignError):
    """A setting is unknown, of the wrong type, outside its limits, or contradicts another."""


class DataError(MTLSignError):
    """Primary data are missing, damaged or too few."""


class ModelError(MTLSignError):
    """A model, checkpoint, tap name or architecture cannot be used as requested."""


class DivergedError(ModelError):
    """Training produced a loss or weight that is not finite."""


class CarrierError(MTLSignError):
    """Key samples cannot be drawn in the requested data space (for example an image under 21 pixels)."""


class KeyMaterialError(MTLSignError):
    """An identity, passphrase, spec, signature or key opening is damaged, wrong or refused."""


class FormatError(KeyMaterialError):
    """A signed or hashed document does not follow its format.

    `problem` is the message without the fix: a sentence without its full stop.
    """

    def __init__(self, problem: str, fix: str, *, field: str) -> None:
        super().__init__(f"{problem}. {fix}", field=field)
        self.problem = problem


class OldVersionError(FormatError):
    """A document has version 0 of its format."""


class ArtifactError(MTLSignError):
    """A written artifact (model folder, kit, run folder) is incomplete, damaged or over a limit."""


class MissingArtifactError(ArtifactError):
    """There is nothing at the location of an artifact."""


class OldArtifactError(ArtifactError):
    """A written artifact has version 0 of its format."""


class TooLargeError(ArtifactError):
    """A file has more bytes than the caller allows."""


class StorageError(MTLSignError):
    """A storage location is malformed, unreachable or not writable."""


class RejectedResultError(MTLSignError):
    """A job ran to its end and wrote its result, but the result does not reach the policy."""

    exit_code = 3


class ClusterError(MTLSignError):
    """The Ray cluster cannot provide the requested resources, or training failed after all its retries."""


class ClaimError(MTLSignError):
    """A statement, envelope, proof, bundle or claim is malformed or of another kind than expected."""


class LedgerError(MTLSignError):
    """A ledger is unreachable, refuses a write, or was truncated, forked or rewritten."""
