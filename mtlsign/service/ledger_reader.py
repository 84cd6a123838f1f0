"""Reading the ledger for those who ask the service: head, entries, proofs, and what it says of a claim."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mtlsign.claims.commands.owner import checkpoint_json
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
    """One ledger, read by one thread at a time. Methods block, and raise Problem."""

    def __init__(self, uri: str) -> None:
        self._uri, self._lock = uri, threading.Lock()
        self._pool = ThreadPoolExecutor(1, "ledger")
        self._ledger: Ledger | None = None
        self._reader: IncrementalReader | None = None

    async def ask(self, method: Callable[..., T], *args: Any) -> T:
        """Call what reads the ledger in a thread of its own: where that hangs, nothing else does."""
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
        """The newest head that counts, as `jobs/ledger.py head --json` gives it."""
        with self._lock:
            ledger, view = self._view()
            return checkpoint_json(ledger, view)

    def entry(self, index: int) -> dict[str, Any]:
        """One entry: its envelope (base64, the exact bytes), kind, signers, time."""
        with self._lock:
            ledger, view = self._view()
            found = view.entries.get(index)
            if found is None:
                raise Problem("not-found", f"the ledger has {len(view.entries)} entries")
            return {
                "index": index,
                "leaf": found.leaf.hex(),
                "kind": found.statement.kind if found.statement else None,
                "problem": found.problem,
                "signers": [signer.hex() for signer in found.signers],
                "time": view.time(index),
                "envelope": base64.b64encode(ledger.get(index)).decode(),
            }

    def proof(self, index: int, size: int | None = None) -> dict[str, Any]:
        """Inclusion proof of an entry in the tree of `size` (default: the newest head that counts)."""
        with self._lock:
            ledger, view = self._view()
            newest = view.heads[-1].head.size if view.heads else len(view.entries)
            within = newest if size is None else size
            if not 0 <= index < within <= len(view.entries):
                raise Problem("not-found", f"entry {index} is in no tree of {within} entries here")
            try:
                path = ledger.prove(index, within)
                root = ledger.head(within).root
            except MTLSignError as error:
                raise problem_from_error(error, about="ledger") from None
            return {
                "index": index, "size": within, "leaf": view.entries[index].leaf.hex(), "root": root.hex(),
                "path": [step.hex() for step in path],
            }  # fmt: skip

    def recent(self, count: int = 50) -> list[dict[str, Any]]:
        """The newest entries, newest first, without their envelopes."""
        with self._lock:
            _, view = self._view()
            newest = sorted(view.entries.values(), key=lambda entry: -entry.index)[:count]
            return [
                {
                    "index": e.index,
                    "leaf": e.leaf.hex(),
                    "kind": e.statement.kind if e.statement else "unreadable",
                    "time": view.time(e.index),
                }
                for e in newest
            ]

    def claim(self, name: str) -> dict[str, Any]:
        """What the ledger says of a claim: when its key was committed, when it was made, faults, votes."""
        with self._lock:
            _, view = self._view()
            try:
                entry, claim = admissibility.find_claim(view, name)
            except MTLSignError:
                raise Problem("not-found", "the ledger has no such claim") from None
            try:
                key = key_id(claim.opening.key())
            except MTLSignError:
                key = ""
            tally = council.tally_votes(view, entry, claim)
            published = view.at(claim.publish, Publish)
            return {
                "claim": name,
                "key": key,
                "entry": entry.index,
                "claimed": view.time(entry.index),
                "publication": claim.publish.index if published else None,
                "committed": view.time(claim.publish.index) if published else None,
                "suspect": claim.suspect.hex(),
                "faults": [
                    fault.sentence for fault in admissibility.inadmissibility_reasons(view, entry, claim)
                ],
                "votes": tally.counts,
                "outcome": tally.outcome,
                "threshold": tally.threshold,
                "members": tally.members,
                "rivals": self._rivals(view, claim),
            }

    def _rivals(self, view: LedgerView, claim: Claim) -> int:
        """Claims of other publications on the same model: what `jobs/dispute.py` would compare."""
        return sum(
            other.suspect == claim.suspect and other.publish != claim.publish for _, other in view.all(Claim)
        )

    def first_of(self, public_keys: Sequence[bytes]) -> dict[bytes, int]:
        """The first entry that each key signed or that names it as a member, where there is one."""
        found: dict[bytes, int] = {}
        with self._lock:
            _, view = self._view()
            for entry in view.entries.values():
                for key in (*entry.signers, *getattr(entry.statement, "members", ())):
                    if key in public_keys:
                        found.setdefault(key, entry.index)
        return found

    def announce(self, identity: Identity) -> int:
        """Put the public half of a signing key into the ledger, once; returns the entry."""
        known = self.first_of([identity.public_key]).get(identity.public_key)
        if known is not None:
            return known
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
