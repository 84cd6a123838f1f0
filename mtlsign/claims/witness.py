"""A witness: co-signs a ledger's heads, and only those that extend everything it has seen.

It recomputes the tree from the entries themselves, compares it with its own memory, with the ledger's stored
tree and with the other members' co-signatures, and remembers the new head *before* it publishes its
signature, so it never signs two trees of one size, whatever dies. Truncation, reordering, rewriting and forks
raise LedgerError, also when they were made with the store's own credentials.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtlsign.claims import heads, merkle
from mtlsign.claims.heads import Cosignature, Head
from mtlsign.claims.ledger import Ledger, Nodes, compare_nodes
from mtlsign.claims.parsing import unseal
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError
from mtlsign.identity import Identity, default_identity_path
from mtlsign.strict_json import strict_json, take, take_hex

VERSION = "mtlsign/witness/v0"
MAX_STATE = 64 * 1024
CLOCK_TOLERANCE_S = 900
MAX_NODE_CHECK = 200_000
"""Up to so many entries every stored node is compared, beyond that only the root that they make."""
MAX_CATCH_UP = 256
"""Most heads co-signed in one step."""


@dataclass(frozen=True)
class Memory:
    """What a witness last co-signed: ledger, tree (as its frontier), and the time it gave."""

    origin: bytes
    tree: merkle.Frontier
    time: int


@dataclass(frozen=True)
class Step:
    """What one step did: the newest head, whether it was co-signed now, and what a person should know."""

    head: Head
    cosigned: tuple[int, ...]
    remarks: tuple[str, ...]


def default_memory(identity: Identity, origin: bytes) -> Path:
    """Where a witness keeps its memory: beside the default identity, one file for each ledger."""
    name = f"{identity.public_key.hex()[:16]}-{origin.hex()[:16]}.json"
    return default_identity_path().parent / "witness" / name


class Witness:
    """One member's witness of one ledger; its memory is a small file that must outlive the process."""

    def __init__(
        self,
        identity: Identity,
        ledger: Ledger,
        memory: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.identity, self.ledger, self.clock = identity, ledger, clock
        self.origin = ledger.origin()
        self.path = memory or default_memory(identity, self.origin)

    def step(self) -> Step:
        """Look at the ledger once; co-sign its new heads, smallest first.

        Raises:
            LedgerError: the ledger is not an extension of what this witness saw, or contradicts itself.
            KeyMaterialError: the memory file is damaged.
        """
        with self._locked():
            old = self._load()
            if old is not None and old.origin != self.origin:
                raise self._alarm("is another ledger than the one this witness watches")
            others = self.ledger.cosignatures(self.origin)
            size = self.ledger.size()
            if old is not None and size < old.tree.size:
                raise self._alarm(f"is cut short: {size} entries, {old.tree.size} were co-signed")
            proposed = {head.size for head, _ in others if head.size <= size} | {size}
            roots, trees, remarks = self._recompute(old, size, proposed)
            if old is not None and old.tree.size and roots[old.tree.size] != old.tree.root():
                raise self._alarm(f"is rewritten: its first {old.tree.size} entries are others")
            if self.ledger.head(size).root != roots[size]:
                raise self._alarm("has a stored tree that is not the tree of its entries")
            remarks += self._compare(others, roots, size)
            return self._sign(old, others, roots, trees, size, remarks)

    def _recompute(
        self, old: Memory | None, size: int, wanted: set[int]
    ) -> tuple[dict[int, bytes], dict[int, merkle.Frontier], list[str]]:
        tree, roots, trees = merkle.Frontier(), {0: merkle.EMPTY_ROOT}, {}
        seen: set[bytes] = set()
        remarks: list[str] = []
        nodes: Nodes = {}
        start = 0 if old is None else old.tree.size
        now = int(self.clock())
        for index, envelope in enumerate(self.ledger.scan(0, size)):
            leaf = merkle.leaf_hash(envelope)
            if leaf in seen:
                remarks.append(f"entry {index} repeats an earlier one")
            seen.add(leaf)
            done = tree.append(leaf)
            if size <= MAX_NODE_CHECK:
                nodes.update({(level, at): found for level, at, found in done})
            if tree.size in wanted or tree.size == start:
                roots[tree.size] = tree.root()
                trees[tree.size] = merkle.Frontier(tree.size, tree.hashes)
            if index >= start:
                remarks += _clock_remark(index, envelope, old, now)
        if size <= MAX_NODE_CHECK:
            try:
                compare_nodes(self.ledger, nodes, size)
            except LedgerError as error:
                raise self._alarm(str(error).removeprefix("ledger: ")) from None
        return roots, trees, remarks

    def _compare(
        self, others: Sequence[tuple[Head, Cosignature]], roots: dict[int, bytes], size: int
    ) -> list[str]:
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

    def _sign(
        self,
        old: Memory | None,
        others: Sequence[tuple[Head, Cosignature]],
        roots: dict[int, bytes],
        trees: dict[int, merkle.Frontier],
        size: int,
        remarks: list[str],
    ) -> Step:
        me = self.identity.public_key
        have = {head.size for head, line in others if line.holds(head.body(), me)}
        seen = 0 if old is None else old.tree.size
        sizes = sorted(s for s in trees if s >= max(seen, 1) and s not in have)[-MAX_CATCH_UP:]
        if not self.ledger.freshness().current:
            raise self._alarm("is not read from a majority of its servers")
        now = int(self.clock())
        if old is not None and now < old.time:
            remarks.append(f"our own clock went back by {old.time - now} s; {old.time} is signed instead")
            now = old.time
        for each in sizes:
            self._save(Memory(self.origin, trees[each], now))
            head = Head(self.origin, each, roots[each])
            self.ledger.cosign(head, heads.cosign(self.identity, head, now))
        return Step(Head(self.origin, size, roots[size]), tuple(sizes), tuple(remarks))

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

    def _load(self) -> Memory | None:
        if not self.path.exists():
            return None
        with open(self.path, "rb") as file:
            data = file.read(MAX_STATE + 1)
        where = "memory"
        got = take(
            strict_json(data, limit=MAX_STATE, where=where),
            where, "version", "public_key", "origin", "size", "frontier", "time", "check",
        )  # fmt: skip
        listed, size, stamp = got["frontier"], got["size"], got["time"]
        if take_hex(got["public_key"], where, 32) != self.identity.public_key or got["version"] != VERSION:
            raise KeyMaterialError("is another witness's; name your own file", field=where)
        if not isinstance(listed, list) or type(size) is not int or type(stamp) is not int:
            raise KeyMaterialError("is damaged; restore it from a copy", field=where)
        try:
            tree = merkle.Frontier(size, [take_hex(one, where, 32) for one in listed])
        except ValueError:
            raise KeyMaterialError("is damaged; restore it from a copy", field=where) from None
        found = Memory(take_hex(got["origin"], where, 32), tree, stamp)
        if take_hex(got["check"], where, 32) != _check(self.identity, found):
            raise KeyMaterialError("is damaged; restore it from a copy", field=where)
        return found

    def _save(self, memory: Memory) -> None:
        fields = {
            "version": VERSION,
            "public_key": self.identity.public_key.hex(),
            "origin": memory.origin.hex(),
            "size": memory.tree.size,
            "frontier": [one.hex() for one in memory.tree.hashes],
            "time": memory.time,
            "check": _check(self.identity, memory).hex(),
        }
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        with open(part, "w") as file:
            file.write(json.dumps(fields, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check(identity: Identity, memory: Memory) -> bytes:
    """A keyed checksum, so that a flipped bit or a stranger's edit of the memory is seen."""
    text = f"{memory.origin.hex()} {memory.tree.size} {memory.time} {memory.tree.root().hex()}"
    return hmac.digest(identity.kit_key, b"mtlsign/v0/witness\n" + text.encode(), "sha256")


def _member(line: Cosignature) -> bytes | None:
    try:
        found = bytes.fromhex(line.name.removeprefix(heads.MEMBER))
    except ValueError:
        return None
    return found if len(found) == 32 and line.name == heads.MEMBER + found.hex() else None


def _clock_remark(index: int, envelope: bytes, old: Memory | None, now: int) -> list[str]:
    try:
        said = unseal(envelope)[0].time
    except ClaimError:
        return [f"entry {index} is no statement"]
    if said > now + CLOCK_TOLERANCE_S:
        return [f"entry {index} says that it comes from {said - now} s ahead"]
    if old is not None and said < old.time - CLOCK_TOLERANCE_S:
        return [f"entry {index} is back-dated: it says {said}, but was not there at {old.time}"]
    return []
