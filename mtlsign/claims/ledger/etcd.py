"""Ledger on etcd: Raft orders the entries, and a compare-and-swap transaction appends them.

    PREFIX/h                    size and subtree roots of the tree; an append compares and replaces it
    PREFIX/e/<index>            bytes of an entry
    PREFIX/l/<leaf hash>        index of that entry, so that a repeated append does not add a second entry
    PREFIX/n/<level>/<index>    hash of a complete subtree
    PREFIX/c/<size>/<root>/<hash of the line>   a co-signature

One transaction writes all keys of an entry or none. Raft does not tolerate Byzantine faults: a party with
write access can delete and rewrite entries. Witnesses detect that, and proofs fail for readers.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger, ReadConsistency, check_size
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature, parse_line
from mtlsign.claims.ledger.etcd_client import (
    EtcdClient,
    Response,
    damaged_response_error,
    decode,
    encode,
    revision,
)
from mtlsign.claims.ledger.tls import Tls
from mtlsign.errors import ClaimError, LedgerError

PREFIX = "/mtlsign/ledger/v1"
ATTEMPTS = 400
"""Most attempts of one append while other writers append first."""
_PAGE_ENTRIES, _PAGE_SMALL, _OPS = 48, 1000, 100
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._-]{1,64}){1,8}")
_State = tuple[int, merkle.CompactRange]


def open_etcd(uri: str, tls: Tls) -> EtcdLedger:
    """Return the ledger at `etcd://HOST:PORT[,…][/PREFIX]`. No server is contacted yet."""
    hosts, slash, path = uri.removeprefix("etcd://").partition("/")
    prefix = slash + path.rstrip("/") if path.strip("/") else PREFIX
    if not _PREFIX.fullmatch(prefix):
        raise LedgerError(
            "The URI has a malformed prefix. Use letters, digits, '.', '_' and '-'.", field="ledger"
        )
    return EtcdLedger(EtcdClient(hosts.split(","), tls), prefix)


class EtcdLedger(Ledger):
    """Ledger on an etcd cluster. Threads can share one object; each process opens a separate one."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self.client, self.prefix = client, prefix
        self.uri = f"etcd://{','.join(client.hosts)}{prefix}"
        self._lock = threading.Lock()
        self._cached_state: _State | None = None

    @property
    def store_id(self) -> str:  # noqa: D102
        return f"etcd://{','.join(sorted(self.client.hosts))}{self.prefix}"

    def _key(self, *parts: str) -> str:
        return encode("/".join((self.prefix, *parts)))

    def append(self, envelope: bytes) -> int:  # noqa: D102
        check_size(envelope)
        leaf = merkle.leaf_hash(envelope)
        with self._lock:
            for _ in range(ATTEMPTS):
                if self._cached_state is None:
                    existing = self._read_state(leaf)
                    if existing is not None:
                        return existing
                assert self._cached_state is not None
                rev, tree = self._cached_state
                self._cached_state = None  # unknown until a response arrives
                index = tree.size
                response = self.client.call("/v3/kv/txn", self._transaction(rev, tree, leaf, envelope))
                if response.get("succeeded"):
                    self._cached_state = (revision(response), tree)
                    return index
                existing = self._apply_response(response, leaf)
                if existing is not None:
                    return existing
        raise LedgerError(
            f"Other writers appended first in {ATTEMPTS} attempts. Try once more later.", field="ledger"
        )

    def _read_state(self, leaf: bytes) -> int | None:
        """Read the state of the tree. Return the index of the entry with this leaf hash if it exists."""
        reads = [self._range("h"), self._range("l", leaf.hex())]
        return self._apply_response(self.client.call("/v3/kv/txn", {"success": reads}), leaf)

    def _apply_response(self, response: Response, leaf: bytes) -> int | None:
        """Cache the tree state of a response. Return the index of the entry if the response contains it."""
        try:
            state, entry = (part.get("response_range", {}) for part in response["responses"])
            rev = int(state["kvs"][0]["mod_revision"]) if state.get("kvs") else 0
        except (AttributeError, KeyError, TypeError, ValueError):
            raise damaged_response_error() from None
        entry_rows, state_rows = _rows(entry), _rows(state)
        if entry_rows:
            index = _number(entry_rows[0][1])
            if merkle.leaf_hash(self.get(index)) != leaf:
                raise LedgerError(
                    f"The store has the index {index} for these bytes, but other bytes there. Run "
                    "jobs/ledger.py check.",
                    field="ledger",
                )
            return index
        self._cached_state = (rev, _tree(state_rows[0][1]) if state_rows else merkle.CompactRange())
        return None

    def _transaction(self, rev: int, tree: merkle.CompactRange, leaf: bytes, envelope: bytes) -> Response:
        """Return the transaction that adds one entry. `tree` is advanced by that entry."""
        name, index = leaf.hex(), f"{tree.size:012d}"
        nodes = tree.append(leaf)
        puts = [("h",), ("e", index), ("l", name)]
        values = [_state(tree), envelope, index.encode()]
        for level, position, digest in nodes:
            puts.append(("n", f"{level:02d}", f"{position:012d}"))
            values.append(digest)
        new = [{"key": self._key(*parts), "target": "CREATE", "create_revision": "0"} for parts in puts[1:]]
        return {
            "compare": [{"key": self._key("h"), "target": "MOD", "mod_revision": str(rev)}, *new],
            "success": [
                {"requestPut": {"key": self._key(*parts), "value": encode(data)}}
                for parts, data in zip(puts, values, strict=True)
            ],
            "failure": [self._range("h"), self._range("l", name)],
        }

    def _range(self, *parts: str) -> Response:
        return {"requestRange": {"key": self._key(*parts)}}

    def _get(self, *parts: str) -> bytes | None:
        rows = _rows(self.client.read("/v3/kv/range", {"key": self._key(*parts)}))
        return rows[0][1] if rows else None

    def _scan_prefix(
        self, folder: str, page: int, start: str = "", stop: str = ""
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the keys below `folder` from `start` up to `stop` in order, as (rest of the key, value)."""
        base = f"{self.prefix}/{folder}/"
        key, end = base + start, base + stop if stop else base[:-1] + "0"  # "0" follows "/"
        while True:
            body = {"key": encode(key), "range_end": encode(end), "limit": page, "sort_order": "ASCEND"}
            rows = _rows(self.client.read("/v3/kv/range", body))
            for name, value in rows:
                yield name.removeprefix(base), value
            if len(rows) < page:
                return
            key = rows[-1][0] + "\0"

    def get(self, index: int) -> bytes:  # noqa: D102
        envelope = self._get("e", f"{index:012d}")
        if envelope is None:
            raise LedgerError(
                f"The ledger has no entry {index}. Pass an index up to {self.size() - 1}.", field="ledger"
            )
        return envelope

    def find(self, leaf: bytes) -> int | None:  # noqa: D102
        value = self._get("l", leaf.hex())
        return None if value is None else _number(value)

    def scan(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:  # noqa: D102
        end = self.size() if stop is None else stop
        if start >= end:
            return
        for name, value in self._scan_prefix("e", _PAGE_ENTRIES, f"{start:012d}", f"{end:012d}"):
            if name != f"{start:012d}":
                break
            start += 1
            yield value
        if start != end:
            raise LedgerError(
                f"Entry {start} is missing: it was deleted or damaged. Restore the ledger from a copy.",
                field="ledger",
            )

    def tree_state(self) -> merkle.CompactRange:  # noqa: D102
        value = self._get("h")
        return merkle.CompactRange() if value is None else _tree(value)

    def size(self) -> int:  # noqa: D102
        return self.tree_state().size

    def node(self, level: int, index: int) -> bytes:  # noqa: D102
        return self.read_nodes([(level, index)])[level, index]

    def read_nodes(self, positions: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:  # noqa: D102
        nodes: dict[tuple[int, int], bytes] = {}
        for first in range(0, len(positions), _OPS):
            batch = positions[first : first + _OPS]
            reads = [self._range("n", f"{level:02d}", f"{index:012d}") for level, index in batch]
            response = self.client.read("/v3/kv/txn", {"success": reads})
            for (level, index), part in zip(batch, response.get("responses", []), strict=True):
                rows = _rows(part.get("response_range", {}))
                if not rows or len(rows[0][1]) != 32:
                    raise LedgerError(
                        f"The stored tree lacks node {level}/{index}. Run jobs/ledger.py check.",
                        field="ledger",
                    )
                nodes[level, index] = rows[0][1]
        return nodes

    def nodes(self, level: int, start: int, stop: int) -> list[bytes]:  # noqa: D102
        names = (f"{level:02d}/{start:012d}", f"{level:02d}/{stop:012d}")
        rows = list(self._scan_prefix("n", _PAGE_SMALL, *names))
        if [name for name, _ in rows] != [f"{level:02d}/{index:012d}" for index in range(start, stop)]:
            raise LedgerError(
                f"The stored tree lacks nodes of level {level}. Restore the ledger from a copy.",
                field="ledger",
            )
        return [digest for _, digest in rows]

    def store_cosignature(self, checkpoint: Checkpoint, line: Cosignature) -> None:  # noqa: D102
        text = line.to_line()
        digest = hashlib.sha256(text.encode()).hexdigest()
        key = self._key("c", f"{checkpoint.size:012d}", checkpoint.root.hex(), digest)
        self.client.call(
            "/v3/kv/txn",
            {
                "compare": [{"key": key, "target": "CREATE", "create_revision": "0"}],
                "success": [{"requestPut": {"key": key, "value": encode(text)}}],
            },
        )

    def cosignatures(self, origin: bytes) -> list[tuple[Checkpoint, Cosignature]]:  # noqa: D102
        cosignatures = []
        for name, value in self._scan_prefix("c", _PAGE_SMALL):
            parts = name.split("/")
            try:  # a malformed value cannot be a member's co-signature, so it is skipped
                checkpoint = Checkpoint(origin, _number(parts[0].encode()), bytes.fromhex(parts[1]))
                cosignatures.append((checkpoint, parse_line(value.decode())))
            except (ClaimError, LedgerError, ValueError, IndexError):
                continue
        return cosignatures

    def staleness(self) -> ReadConsistency:  # noqa: D102
        lag = self.client.lagging
        return ReadConsistency(lag is None, lag or "The answer was confirmed by a majority of the servers.")

    def close(self) -> None:  # noqa: D102
        self.client.close()


def _rows(response: Response) -> list[tuple[str, bytes]]:
    try:
        return [(decode(kv["key"]).decode(), decode(kv.get("value", ""))) for kv in response.get("kvs", [])]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged_response_error() from None


def _state(tree: merkle.CompactRange) -> bytes:
    """Return the unique encoding of the value of `h`."""
    value = {"size": tree.size, "frontier": [h.hex() for h in tree.hashes]}
    return json.dumps(value, separators=(",", ":")).encode()


def _tree(value: bytes) -> merkle.CompactRange:
    try:
        fields = json.loads(value)
        tree = merkle.CompactRange(int(fields["size"]), [bytes.fromhex(h) for h in fields["frontier"]])
        if _state(tree) != value:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LedgerError(
            "The stored tree state is damaged. Restore the ledger from a copy.", field="ledger"
        ) from None
    return tree


def _number(value: bytes) -> int:
    if not value.isdigit() or len(value) > 16:
        raise LedgerError("A stored number is damaged. Run jobs/ledger.py check.", field="ledger")
    return int(value)
