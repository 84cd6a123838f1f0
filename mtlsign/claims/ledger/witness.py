"""Witness: co-signs only those checkpoints of a ledger that extend the tree it co-signed before.

It recomputes the tree from the entries and compares it with its persistent state, with the stored tree and
with the other members' co-signatures. It persists the new checkpoint *before* publishing its signature. A
crash therefore cannot make it sign two different trees of the same size. Truncation, reordering, rewriting,
forks and a replaced ledger raise LedgerError, even if they were made with valid credentials of the store. The
witness also stores its co-signatures locally and restores lines that were deleted from the store.
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
from mtlsign.claims.ledger.confirmation import (
    Councils,
    Times,
    confirm_checkpoints,
    member_times,
    named_sizes,
)
from mtlsign.claims.ledger.rebuild import TreeRebuilder
from mtlsign.claims.ledger.view import EntryLog, IncrementalReader
from mtlsign.claims.ledger.witness_state import WitnessState
from mtlsign.claims.statements.types import Statement
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError
from mtlsign.watermark.keys.identity import Identity

CLOCK_TOLERANCE_S = 900
MAX_CATCH_UP = 256
"""Most checkpoints co-signed in one round."""

CosignedTrees = Sequence[tuple[Checkpoint, Cosignature]]


@dataclass(frozen=True)
class WitnessRound:
    """Result of one round.

    Attributes:
        checkpoint: the newest checkpoint.
        cosigned: sizes of the trees that this round co-signed or restored the co-signature of.
        warnings: sentences for display.
    """

    checkpoint: Checkpoint
    cosigned: tuple[int, ...]
    warnings: tuple[str, ...]


class Witness:
    """Witness of one member for one ledger. Its state is a small file that must survive the process.

    Args:
        identity: the co-signer.
        ledger: the observed ledger.
        path: the state file. Default: next to the default identity; the origin of the ledger in this store
            is then pinned there at first use.
        clock: returns POSIX seconds.
        reader: reader of the ledger, whose results of signature checks are used.
    """

    def __init__(
        self,
        identity: Identity,
        ledger: Ledger,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
        reader: IncrementalReader | None = None,
    ) -> None:
        self.identity, self.ledger, self.clock = identity, ledger, clock
        reader = reader or IncrementalReader(ledger)
        self._statements, self._cache = reader.statements, reader.cache
        self._pinned_store = ledger.store_id if path is None else None
        if ledger.size() == 0:
            witness_state.refuse_known_store(identity, ledger.store_id, path)
        self.origin = ledger.origin()
        self.path = path or witness_state.default_path(identity, self.origin)

    def run_once(self) -> WitnessRound:
        """Check the ledger once and co-sign its new checkpoints, smallest first.

        Raises:
            LedgerError: the ledger does not extend the tree that this witness co-signed, or is inconsistent.
            KeyMaterialError: the state file is damaged.
        """
        with self._locked():
            state = witness_state.load(self.identity, self.path)
            self._check_origin(state)
            cosignatures = self.ledger.cosignatures(self.origin)
            stored_tree = self.ledger.tree_state()
            size = stored_tree.size
            if state is not None and size < state.tree.size:
                raise self._inconsistency_error(
                    f"The ledger is truncated, or restored from an older copy: it has {size} entries, "
                    f"{state.tree.size} were co-signed"
                )
            own_lines = witness_state.load_own_lines(self.path)
            nodes, councils, warnings = self._recompute(state, stored_tree)
            times = member_times(councils, cosignatures, self._cache)
            sizes = {checkpoint.size for checkpoint in times if checkpoint.size <= size} | {size}
            sizes |= {own_size for own_size, _ in own_lines if own_size <= size}
            sizes |= {state.tree.size} if state is not None else set()
            trees = {count: merkle.compact_range(nodes, count) for count in sizes}
            roots = {tree_size: tree.root() for tree_size, tree in trees.items()}
            if state is not None and state.tree.size and roots[state.tree.size] != state.tree.root():
                raise self._inconsistency_error(
                    f"The ledger is rewritten: its first {state.tree.size} entries differ from the co-signed "
                    "ones"
                )
            warnings += self._check_cosignatures(cosignatures, councils, roots, size)
            warnings += self._check_past(councils, times, roots)
            if not self.ledger.staleness().current:
                raise self._inconsistency_error("The ledger is not read from a majority of its servers")
            own_sizes, restored = self._restore_missing_lines(cosignatures, own_lines, roots)
            signable = {tree.size for tree in times if roots.get(tree.size) == tree.root} | {size}
            signable |= {state.tree.size} if state is not None else set()
            if restored:
                names = ", ".join(map(str, restored[:8]))
                warnings.append(f"Own co-signatures of {names} entries were missing and are restored.")
            result = self._sign(state, signable - own_sizes, trees, size, warnings)
            return replace(result, cosigned=(*restored, *result.cosigned))

    def _check_origin(self, state: WitnessState | None) -> None:
        """Raise LedgerError for another ledger than that of the state, or of the pin of this store."""
        expected = state.origin if state is not None else None
        if self._pinned_store is not None:
            expected = witness_state.pinned_origin(self.identity, self._pinned_store) or expected
        if expected is not None and expected != self.origin:
            file = self.path
            if self._pinned_store is not None:
                file = witness_state.pin_path(self.identity, self._pinned_store)
            raise self._inconsistency_error(
                f"This is another ledger (origin {self.origin.hex()[:16]}…) than the one that this witness "
                f"observes here ({expected.hex()[:16]}…, {file})"
            )
        if self._pinned_store is not None and expected is None:
            witness_state.pin_origin(self.identity, self._pinned_store, self.origin)

    def _recompute(
        self, state: WitnessState | None, stored_tree: merkle.CompactRange
    ) -> tuple[dict[tuple[int, int], bytes], Councils, list[str]]:
        """Return the subtrees recomputed from the entries, the councils, and warnings about entries.

        Every stored node is compared with the recomputed one.
        """
        nodes, leaves = dict[tuple[int, int], bytes](), set[bytes]()
        rebuilder, log = TreeRebuilder(self.ledger, nodes=nodes), EntryLog(self._statements)
        warnings: list[str] = []
        start = 0 if state is None else state.tree.size
        now = int(self.clock())
        try:
            for index, envelope in enumerate(self.ledger.scan(0, stored_tree.size)):
                leaf = rebuilder.add(envelope)
                if leaf in leaves:
                    warnings.append(f"Entry {index} repeats an earlier one.")
                leaves.add(leaf)
                log.add(index, envelope)
                if index >= start:
                    warnings += _entry_warnings(index, self._statements[leaf][0], state, now)
            rebuilder.finish(stored_tree)
        except LedgerError as error:
            raise self._inconsistency_error(error.detail.rstrip(".")) from None
        return nodes, log.councils, warnings

    def _check_cosignatures(
        self, cosignatures: CosignedTrees, councils: Councils, roots: dict[int, bytes], size: int
    ) -> list[str]:
        """Return a warning for each member's co-signature of another tree; raise if it is the own one."""
        members = {member for _, council in councils for member in council.members}
        members.add(self.identity.public_key)
        warnings = []
        for checkpoint, line in cosignatures:
            if checkpoint.size <= size and roots.get(checkpoint.size) == checkpoint.root:
                continue
            member = line.member
            if member is None or member not in members or not self._cache.is_valid(checkpoint, line):
                continue
            if member == self.identity.public_key:
                raise self._inconsistency_error(
                    f"The ledger has an own co-signature of another tree of {checkpoint.size} entries"
                )
            tree = "more entries than the ledger has" if checkpoint.size > size else "another tree"
            warnings.append(f"FORK: {member.hex()[:16]} co-signed {tree} at size {checkpoint.size}.")
        return warnings

    def _check_past(
        self, councils: Councils, times: dict[Checkpoint, Times], roots: dict[int, bytes]
    ) -> list[str]:
        """Return a warning if times under former councils differ from those that this witness saw before."""
        confirmed, _ = confirm_checkpoints(councils, times, roots)
        start = councils[-1][0]
        past = {item.checkpoint.size: item.time for item in confirmed if item.checkpoint.size <= start}
        if all(item.checkpoint.size <= start for item in confirmed):
            return []  # the council in force has confirmed nothing yet
        seen = witness_state.load_past(self.path, start)
        if seen == past:
            return []
        witness_state.save_past(self.path, start, past)
        if seen is None:
            return []
        changed = {count for count in past.keys() | seen.keys() if past.get(count) != seen.get(count)}
        return [
            f"Co-signatures of former members arrived late: they change the times of checkpoints of "
            f"{named_sizes(changed)} entries. Ask these members."
        ]

    def _restore_missing_lines(
        self, cosignatures: CosignedTrees, own_lines: list[tuple[int, str]], roots: dict[int, bytes]
    ) -> tuple[set[int], list[int]]:
        """Store own lines again that the ledger lacks; otherwise entries would lose their time.

        Returns:
            The sizes that this witness co-signed, and those whose lines were restored.
        """
        public_key, restored = self.identity.public_key, []
        stored = {(checkpoint.size, checkpoint.root, line.to_line()) for checkpoint, line in cosignatures}
        own_sizes = {
            checkpoint.size
            for checkpoint, line in cosignatures
            if line.is_valid_for(checkpoint.body(), public_key)
        }
        for size, text in own_lines:
            if size not in roots or (size, roots[size], text) in stored:
                continue
            checkpoint = Checkpoint(self.origin, size, roots[size])
            try:
                line = checkpoints.parse_line(text)
            except ClaimError:
                continue
            if line.is_valid_for(checkpoint.body(), public_key):
                self.ledger.store_cosignature(checkpoint, line)
                own_sizes.add(size)
                restored.append(size)
        return own_sizes, restored

    def _sign(
        self, state: WitnessState | None, signable: set[int], trees: dict[int, merkle.CompactRange],
        size: int, warnings: list[str],
    ) -> WitnessRound:  # fmt: skip
        last_size = 0 if state is None else state.tree.size
        sizes = sorted(count for count in signable if count >= max(last_size, 1))[-MAX_CATCH_UP:]
        now = int(self.clock())
        if state is not None and now < state.time:
            warnings.append(f"Own clock went back by {state.time - now} s; {state.time} is signed instead.")
            now = state.time
        for tree_size in sizes:
            tree = trees[tree_size]
            witness_state.save(self.identity, self.path, WitnessState(self.origin, tree, now))
            checkpoint = Checkpoint(self.origin, tree_size, tree.root())
            line = checkpoints.cosign(self.identity, checkpoint, now)
            witness_state.append_own_line(self.path, tree_size, line.to_line())
            self.ledger.store_cosignature(checkpoint, line)
        newest = Checkpoint(self.origin, size, trees[size].root())
        return WitnessRound(newest, tuple(sizes), tuple(warnings))

    def _inconsistency_error(self, problem: str) -> LedgerError:
        """Return the error for a problem, which is a sentence without its full stop."""
        consistency = self.ledger.staleness()
        if not consistency.current:  # an old copy looks truncated although the ledger is intact
            note = consistency.note.rstrip(".")
            return LedgerError(f"{note}; nothing was signed. Try once more later.", field="ledger")
        return LedgerError(
            f"{problem}; nothing was signed. Keep {self.path} and ask the other members.", field="ledger"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise KeyMaterialError(
                f"{self.path}: {error.strerror}. Pass another file.", field=witness_state.FIELD
            ) from None


def _entry_warnings(
    index: int, statement: Statement | None, state: WitnessState | None, now: int
) -> list[str]:
    if statement is None:
        return [f"Entry {index} is not a statement."]
    stated_time = statement.time
    if stated_time > now + CLOCK_TOLERANCE_S:
        return [f"Entry {index} is dated {stated_time - now} s in the future."]
    if state is not None and stated_time < state.time - CLOCK_TOLERANCE_S:
        return [f"Entry {index} is back-dated: it is dated {stated_time}, but was missing at {state.time}."]
    return []
