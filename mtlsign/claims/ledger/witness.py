"""A witness: co-signs a ledger's heads, and only those that extend everything it has seen.

It recomputes the tree from the entries themselves, compares it with its own memory, with the ledger's stored
tree and with the other members' co-signatures, and remembers the new head *before* it publishes its
signature, so it never signs two trees of one size, whatever dies. Another ledger in the place of the one it
watched, truncation, reordering, rewriting and forks raise LedgerError, also when they were made with the
store's own credentials. Its own co-signatures it keeps, and puts them back where somebody deleted them.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mtlsign.claims import merkle
from mtlsign.claims.ledger import checkpoints, witness_state
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.ledger.rebuild import TreeRebuilder
from mtlsign.claims.ledger.witness_state import WitnessState
from mtlsign.claims.statements.parsing import open_statement
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError
from mtlsign.watermark.keys.identity import Identity

CLOCK_TOLERANCE_S = 900
MAX_CATCH_UP = 256
"""Most heads co-signed in one step."""

Signed = Sequence[tuple[Checkpoint, Cosignature]]


@dataclass(frozen=True)
class WitnessRound:
    """What one step did: the newest head, which sizes got our co-signature, what a person should know."""

    head: Checkpoint
    cosigned: tuple[int, ...]
    remarks: tuple[str, ...]


class Witness:
    """One member's witness of one ledger; its memory is a small file that must outlive the process.

    Args:
        identity: who co-signs.
        ledger: what it watches.
        path: its memory. Without one it lies beside the default identity, and the origin of the ledger at
            this place is pinned there at first use.
        clock: POSIX seconds.
    """

    def __init__(
        self,
        identity: Identity,
        ledger: Ledger,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.identity, self.ledger, self.clock = identity, ledger, clock
        self._place = ledger.place if path is None else None
        if ledger.size() == 0:
            witness_state.refuse_known_store(identity, ledger.place, path)
        self.origin = ledger.origin()
        self.path = path or witness_state.default_path(identity, self.origin)

    def step(self) -> WitnessRound:
        """Look at the ledger once; co-sign its new heads, smallest first.

        Raises:
            LedgerError: the ledger is not an extension of what this witness saw, or contradicts itself.
            KeyMaterialError: the memory file is damaged.
        """
        with self._locked():
            old = witness_state.load(self.identity, self.path)
            self._know(old)
            others = self.ledger.cosignatures(self.origin)
            state = self.ledger.state()
            size = state.size
            if old is not None and size < old.tree.size:
                raise self._alarm(f"is cut short: {size} entries, {old.tree.size} were co-signed")
            ours = witness_state.remembered_lines(self.path)
            proposed = {head.size for head, _ in others if head.size <= size} | {size}
            proposed |= {at for at, _ in ours}
            trees, remarks = self._recompute(old, state, proposed)
            roots = {at: tree.root() for at, tree in trees.items()}
            if old is not None and old.tree.size and roots[old.tree.size] != old.tree.root():
                raise self._alarm(f"is rewritten: its first {old.tree.size} entries are others")
            remarks += self._compare(others, roots, size)
            if not self.ledger.freshness().current:
                raise self._alarm("is not read from a majority of its servers")
            have, back = self._put_back(others, ours, roots)
            if back:
                named = ", ".join(map(str, back[:8]))
                remarks.append(f"our co-signatures of {named} entries were gone; they are back")
            done = self._sign(old, have, trees, size, remarks)
            return replace(done, cosigned=(*back, *done.cosigned))

    def _know(self, old: WitnessState | None) -> None:
        """Refuse another ledger than the one that the memory, or the pin of this place, is about."""
        known = old.origin if old is not None else None
        if self._place is not None:
            known = witness_state.pinned_origin(self.identity, self._place) or known
        if known is not None and known != self.origin:
            where = witness_state.pin_path(self.identity, self._place) if self._place else self.path
            raise self._alarm(
                f"is another ledger (origin {self.origin.hex()[:16]}…) than the one this witness watches "
                f"here ({known.hex()[:16]}…, {where})"
            )
        if self._place is not None and known is None:
            witness_state.pin_origin(self.identity, self._place, self.origin)

    def _recompute(
        self, old: WitnessState | None, state: merkle.CompactRange, wanted: set[int]
    ) -> tuple[dict[int, merkle.CompactRange], list[str]]:
        """The trees of the wanted sizes, from the entries alone; every stored node is compared on the way."""
        again, trees = TreeRebuilder(self.ledger), {0: merkle.CompactRange()}
        seen: set[bytes] = set()
        remarks: list[str] = []
        start = 0 if old is None else old.tree.size
        now = int(self.clock())
        try:
            for index, envelope in enumerate(self.ledger.scan(0, state.size)):
                leaf = again.add(envelope)
                if leaf in seen:
                    remarks.append(f"entry {index} repeats an earlier one")
                seen.add(leaf)
                tree = again.tree
                if tree.size in wanted or tree.size == start:
                    trees[tree.size] = merkle.CompactRange(tree.size, tree.hashes)
                if index >= start:
                    remarks += _clock_remark(index, envelope, old, now)
            again.finish(state)
        except LedgerError as error:
            raise self._alarm(error.detail) from None
        return trees, remarks

    def _compare(self, others: Signed, roots: dict[int, bytes], size: int) -> list[str]:
        """Remarks for each valid co-signature of another tree. Our own on another tree is an alarm."""
        remarks = []
        for head, line in others:
            if head.size <= size and roots.get(head.size) == head.root:
                continue
            member = _member(line)
            if member is None or not line.holds(head.body(), member):
                continue
            if member == self.identity.public_key:
                raise self._alarm(f"shows our own co-signature of another tree of {head.size} entries")
            what = "more entries than there are" if head.size > size else "another tree"
            remarks.append(f"FORK: {member.hex()[:16]} co-signed {what} at size {head.size}")
        return remarks

    def _put_back(
        self, others: Signed, ours: list[tuple[int, str]], roots: dict[int, bytes]
    ) -> tuple[set[int], list[int]]:
        """The sizes that we co-signed; and those whose lines were gone from the store (or never got there)
        and are stored again: without them entries would lose their time.
        """
        me, back = self.identity.public_key, []
        stored = {(head.size, head.root, line.line()) for head, line in others}
        have = {head.size for head, line in others if line.holds(head.body(), me)}
        for size, text in ours:
            if size not in roots or (size, roots[size], text) in stored:
                continue
            head = Checkpoint(self.origin, size, roots[size])
            try:
                line = checkpoints.parse_line(text)
            except ClaimError:
                continue
            if line.holds(head.body(), me):
                self.ledger.cosign(head, line)
                have.add(size)
                back.append(size)
        return have, back

    def _sign(
        self, old: WitnessState | None, have: set[int], trees: dict[int, merkle.CompactRange], size: int,
        remarks: list[str],
    ) -> WitnessRound:  # fmt: skip
        seen = 0 if old is None else old.tree.size
        sizes = sorted(s for s in trees if s >= max(seen, 1) and s not in have)[-MAX_CATCH_UP:]
        now = int(self.clock())
        if old is not None and now < old.time:
            remarks.append(f"our own clock went back by {old.time - now} s; {old.time} is signed instead")
            now = old.time
        for each in sizes:
            witness_state.save(self.identity, self.path, WitnessState(self.origin, trees[each], now))
            head = Checkpoint(self.origin, each, trees[each].root())
            line = checkpoints.cosign(self.identity, head, now)
            witness_state.append_own_line(self.path, each, line.line())
            self.ledger.cosign(head, line)
        return WitnessRound(Checkpoint(self.origin, size, trees[size].root()), tuple(sizes), tuple(remarks))

    def _alarm(self, what: str) -> LedgerError:
        fresh = self.ledger.freshness()
        if not fresh.current:  # an old copy looks like a truncated ledger and is none
            return LedgerError(f"{fresh.note}; nothing was signed: try again later", field="ledger")
        fix = f"nothing was signed: keep {self.path} and ask the other members"
        return LedgerError(f"{what}; {fix}", field="ledger")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise KeyMaterialError(
                f"{self.path}: {error.strerror}; name another file", field="memory"
            ) from None


def _member(line: Cosignature) -> bytes | None:
    try:
        found = bytes.fromhex(line.name.removeprefix(checkpoints.MEMBER))
    except ValueError:
        return None
    return found if len(found) == 32 and line.name == checkpoints.MEMBER + found.hex() else None


def _clock_remark(index: int, envelope: bytes, old: WitnessState | None, now: int) -> list[str]:
    try:
        said = open_statement(envelope)[0].time
    except ClaimError:
        return [f"entry {index} is no statement"]
    if said > now + CLOCK_TOLERANCE_S:
        return [f"entry {index} says that it comes from {said - now} s ahead"]
    if old is not None and said < old.time - CLOCK_TOLERANCE_S:
        return [f"entry {index} is back-dated: it says {said}, but was not there at {old.time}"]
    return []
