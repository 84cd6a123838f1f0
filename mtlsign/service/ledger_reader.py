"""Reading of the ledger for clients: checkpoint, entries, inclusion proofs and the state of a claim."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mtlsign.claims.commands.settings import checkpoint_json
from mtlsign.claims.judging import admissibility, council
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.view import IncrementalReader, LedgerView
from mtlsign.claims.owner import Owner
from mtlsign.claims.statements.types import Claim, Publish, Register
from mtlsign.errors import MTLSignError
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.service.verifier.claim_bundle import key_id
from mtlsign.watermark.keys.identity import Identity

T = TypeVar("T")
KEY_NAME = "service signing key"


class LedgerReader:
    """Reader of one ledger, used by one thread at a time. Methods block and raise Problem."""

    def __init__(self, uri: str) -> None:
        self._uri, self._lock = uri, threading.Lock()
        self._pool = ThreadPoolExecutor(1, "ledger")
        self._ledger: Ledger | None = None
        self._reader: IncrementalReader | None = None

    async def run(self, method: Callable[..., T], *args: Any) -> T:
        """Run a blocking method in the thread of the ledger, so that a hanging ledger blocks nothing else."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, method, *args)

    def _view(self) -> tuple[Ledger, LedgerView]:
        try:
            if self._ledger is None or self._reader is None:
                self._ledger = open_ledger(self._uri)
                self._reader = IncrementalReader(self._ledger)
            return self._ledger, self._reader.view()
        except (MTLSignError, OSError, sqlite3.Error) as error:
            self._ledger = self._reader = None
            raise problem_from_error(error, about="ledger") from None

    def head(self) -> dict[str, Any]:
        """Return the newest confirmed checkpoint, in the form of `jobs/ledger.py head --json`."""
        with self._lock:
            ledger, view = self._view()
            return checkpoint_json(ledger, view)

    def entry(self, index: int) -> dict[str, Any]:
        """Return one entry: its envelope (base64 of the exact bytes), kind, signers and time."""
        with self._lock:
            ledger, view = self._view()
            entry = view.entries.get(index)
            if entry is None:
                raise Problem("not-found", f"The ledger has {len(view.entries)} entries. Use a lower index.")
            return {
                "index": index,
                "leaf": entry.leaf.hex(),
                "kind": entry.statement.kind if entry.statement else None,
                "problem": entry.problem,
                "signers": [signer.hex() for signer in entry.signers],
                "time": view.time(index),
                "envelope": base64.b64encode(ledger.get(index)).decode(),
            }

    def proof(self, index: int, size: int | None = None) -> dict[str, Any]:
        """Return the inclusion proof of an entry in the tree of `size` (default: the newest confirmed)."""
        with self._lock:
            ledger, view = self._view()
            newest = view.confirmed[-1].checkpoint.size if view.confirmed else len(view.entries)
            tree_size = newest if size is None else size
            if not 0 <= index < tree_size <= len(view.entries):
                detail = f"The ledger has no entry {index} in a tree of {tree_size} entries."
                raise Problem("not-found", f"{detail} Choose an existing entry and tree.")
            try:
                path = ledger.prove(index, tree_size)
                root = ledger.checkpoint(tree_size).root
            except MTLSignError as error:
                raise problem_from_error(error, about="ledger") from None
            return {
                "index": index, "size": tree_size, "leaf": view.entries[index].leaf.hex(),
                "root": root.hex(), "path": [step.hex() for step in path],
            }  # fmt: skip

    def recent(self, count: int = 50) -> list[dict[str, Any]]:
        """Return the newest entries without their envelopes, the newest first."""
        with self._lock:
            _, view = self._view()
            newest = sorted(view.entries.values(), key=lambda entry: -entry.index)[:count]
            return [
                {
                    "index": entry.index,
                    "leaf": entry.leaf.hex(),
                    "kind": entry.statement.kind if entry.statement else "unreadable",
                    "time": view.time(entry.index),
                }
                for entry in newest
            ]

    def claim(self, name: str) -> dict[str, Any]:
        """Return the state of a claim in the ledger: times, reasons for inadmissibility, votes and rivals."""
        with self._lock:
            _, view = self._view()
            try:
                entry, claim = admissibility.find_claim(view, name)
            except MTLSignError:
                raise Problem("not-found", "The ledger has no claim of that id. Correct the id.") from None
            try:
                key = key_id(claim.opening.key())
            except MTLSignError:
                key = ""
            tally = council.tally_votes(view, entry, claim)
            published = view.at(claim.publish, Publish)
            reasons = admissibility.inadmissibility_reasons(view, entry, claim)
            return {
                "claim": name,
                "key": key,
                "entry": entry.index,
                "claimed": view.time(entry.index),
                "publication": claim.publish.index if published else None,
                "committed": view.time(claim.publish.index) if published else None,
                "suspect": claim.suspect.hex(),
                "reasons": [reason.sentence for reason in reasons],
                "votes": tally.counts,
                "outcome": tally.outcome,
                "threshold": tally.threshold,
                "members": tally.members,
                **self._rivals(view, claim),
            }

    def _rivals(self, view: LedgerView, claim: Claim) -> dict[str, Any]:
        """Return the entries of claims of other publications on the same model, and how many are earlier.

        The order of publications is all that a ledger shows of a lineage.
        """
        rivals = {
            entry.index: other.publish.index
            for entry, other in view.all(Claim)
            if other.suspect == claim.suspect and other.publish != claim.publish
        }
        earlier = sum(publication < claim.publish.index for publication in rivals.values())
        return {"rivals": sorted(rivals), "earlier_rivals": earlier}

    def first_entry_of_key(self, public_keys: Sequence[bytes]) -> dict[bytes, int]:
        """Return, for each key in the ledger, the first entry that it signed or that lists it as a member."""
        first_entries: dict[bytes, int] = {}
        with self._lock:
            _, view = self._view()
            for entry in view.entries.values():
                for key in (*entry.signers, *getattr(entry.statement, "members", ())):
                    if key in public_keys:
                        first_entries.setdefault(key, entry.index)
        return first_entries

    def publish_key(self, identity: Identity) -> int:
        """Append the public key of an identity unless the ledger has it; return the index of its entry."""
        index = self.first_entry_of_key([identity.public_key]).get(identity.public_key)
        if index is not None:
            return index
        with self._lock:
            ledger, view = self._view()
            owner = Owner(identity, ledger)
            digest = hashlib.sha256(identity.public_key).digest()
            try:
                return owner.append(
                    Register(
                        signer=identity.public_key,
                        ledger=view.origin,
                        time=owner.now(),
                        models=((KEY_NAME, digest),),
                    )
                ).index
            except MTLSignError as error:
                raise problem_from_error(error, about="ledger") from None
