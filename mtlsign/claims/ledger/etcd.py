"""A ledger on etcd: Raft orders the entries, a compare-and-swap transaction appends them.

    PREFIX/h                    size and frontier of the tree: what an append compares and replaces
    PREFIX/e/<index>            an entry's bytes
    PREFIX/l/<leaf hash>        its index: the same bytes are never appended twice, however often one retries
    PREFIX/n/<level>/<index>    hash of a complete subtree
    PREFIX/c/<size>/<root>/<hash of the line>   a co-signature

One transaction writes all that an entry needs or nothing. Raft is not Byzantine: whoever may write can
delete and rewrite, which witnesses notice and readers see in proofs.
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
from mtlsign.claims.ledger.etcd_client import Answer, EtcdClient, decode, encode, revision
from mtlsign.claims.ledger.tls import Tls
from mtlsign.errors import ClaimError, LedgerError

PREFIX = "/mtlsign/ledger/v0"
ATTEMPTS = 400
"""Most times that one append starts again because another writer was faster."""
_PAGE_ENTRIES, _PAGE_SMALL, _OPS = 48, 1000, 100
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._-]{1,64}){1,8}")
_State = tuple[int, merkle.CompactRange]


def open_etcd(uri: str, tls: Tls) -> EtcdLedger:
    """The ledger at `etcd://HOST:PORT[,…][/PREFIX]`. Contacts nothing yet."""
    hosts, mark, prefix = uri.removeprefix("etcd://").partition("/")
    place = mark + prefix.rstrip("/") if prefix.strip("/") else PREFIX
    if not _PREFIX.fullmatch(place):
        raise LedgerError("has a malformed prefix; use letters, digits, '.', '_' and '-'", field="ledger")
    return EtcdLedger(EtcdClient(hosts.split(","), tls), place)


class EtcdLedger(Ledger):
    """See the module. Threads may share one object; each process opens its own."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self.client, self.prefix = client, prefix
        self.uri = f"etcd://{','.join(client.hosts)}{prefix}"
        self._lock = threading.Lock()
        self._known: _State | None = None

    @property
    def place(self) -> str:  # noqa: D102
        return f"etcd://{','.join(sorted(self.client.hosts))}{self.prefix}"

    def _key(self, *parts: str) -> str:
        return encode("/".join((self.prefix, *parts)))

    def append(self, envelope: bytes) -> int:  # noqa: D102
        check_size(envelope)
        leaf = merkle.leaf_hash(envelope)
        with self._lock:
            for _ in range(ATTEMPTS):
                if self._known is None:
                    there = self._look(leaf)
                    if there is not None:
                        return there
                assert self._known is not None
                rev, tree = self._known
                self._known = None  # until an answer says otherwise
                index = tree.size
                answer = self.client.call("/v3/kv/txn", self._transaction(rev, tree, leaf, envelope))
                if answer.get("succeeded"):
                    self._known = (revision(answer), tree)
                    return index
                there = self._take(answer, leaf)
                if there is not None:
                    return there
        raise LedgerError("other writers are always faster; try again later", field="ledger")

    def _look(self, leaf: bytes) -> int | None:
        """Read the tree's state; the entry's index if it is there already."""
        reads = [self._range("h"), self._range("l", leaf.hex())]
        return self._take(self.client.call("/v3/kv/txn", {"success": reads}), leaf)

    def _take(self, answer: Answer, leaf: bytes) -> int | None:
        try:
            state, there = (part.get("response_range", {}) for part in answer["responses"])
            rev = int(state["kvs"][0]["mod_revision"]) if state.get("kvs") else 0
        except (AttributeError, KeyError, TypeError, ValueError):
            raise LedgerError("a server's answer is damaged; check the cluster", field="ledger") from None
        there, state = _rows(there), _rows(state)
        if there:
            index = _number(there[0][1])
            if merkle.leaf_hash(self.get(index)) != leaf:
                raise LedgerError(
                    f"says that these bytes are entry {index}, which has others", field="ledger"
                )
            return index
        self._known = (rev, _tree(state[0][1]) if state else merkle.CompactRange())
        return None

    def _transaction(self, rev: int, tree: merkle.CompactRange, leaf: bytes, envelope: bytes) -> Answer:
        """Everything that the new entry needs; `tree` is moved on."""
        name, index = leaf.hex(), f"{tree.size:012d}"
        nodes = tree.append(leaf)
        puts = [("h",), ("e", index), ("l", name)]
        values = [_state(tree), envelope, index.encode()]
        for level, at, found in nodes:
            puts.append(("n", f"{level:02d}", f"{at:012d}"))
            values.append(found)
        new = [{"key": self._key(*parts), "target": "CREATE", "create_revision": "0"} for parts in puts[1:]]
        return {
            "compare": [{"key": self._key("h"), "target": "MOD", "mod_revision": str(rev)}, *new],
            "success": [
                {"requestPut": {"key": self._key(*parts), "value": encode(data)}}
                for parts, data in zip(puts, values, strict=True)
            ],
            "failure": [self._range("h"), self._range("l", name)],
        }

    def _range(self, *parts: str) -> Answer:
        return {"requestRange": {"key": self._key(*parts)}}

    def _one(self, *parts: str) -> bytes | None:
        rows = _rows(self.client.read("/v3/kv/range", {"key": self._key(*parts)}))
        return rows[0][1] if rows else None

    def _many(self, folder: str, page: int, start: str = "", stop: str = "") -> Iterator[tuple[str, bytes]]:
        """All keys below `folder` from `start` up to `stop`, in order, as (rest of the key, value)."""
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
        found = self._one("e", f"{index:012d}")
        if found is None:
            raise LedgerError(f"has no entry {index}; it ends at {self.size() - 1}", field="ledger")
        return found

    def find(self, leaf: bytes) -> int | None:  # noqa: D102
        found = self._one("l", leaf.hex())
        return None if found is None else _number(found)

    def scan(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:  # noqa: D102
        end = self.size() if stop is None else stop
        if start >= end:
            return
        for name, value in self._many("e", _PAGE_ENTRIES, f"{start:012d}", f"{end:012d}"):
            if name != f"{start:012d}":
                break
            start += 1
            yield value
        if start != end:
            raise LedgerError(f"entry {start} is missing: it was cut or damaged", field="ledger")

    def state(self) -> merkle.CompactRange:  # noqa: D102
        found = self._one("h")
        return merkle.CompactRange() if found is None else _tree(found)

    def size(self) -> int:  # noqa: D102
        return self.state().size

    def node(self, level: int, index: int) -> bytes:  # noqa: D102
        return self.fetch([(level, index)])[level, index]

    def fetch(self, wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:  # noqa: D102
        found: dict[tuple[int, int], bytes] = {}
        for at in range(0, len(wanted), _OPS):
            part = wanted[at : at + _OPS]
            reads = [self._range("n", f"{level:02d}", f"{index:012d}") for level, index in part]
            answer = self.client.read("/v3/kv/txn", {"success": reads})
            for (level, index), one in zip(part, answer.get("responses", []), strict=True):
                rows = _rows(one.get("response_range", {}))
                if not rows or len(rows[0][1]) != 32:
                    raise LedgerError(f"the stored tree lacks node {level}/{index}; check it", field="ledger")
                found[level, index] = rows[0][1]
        return found

    def nodes(self, level: int, start: int, stop: int) -> list[bytes]:  # noqa: D102
        names = (f"{level:02d}/{start:012d}", f"{level:02d}/{stop:012d}")
        rows = list(self._many("n", _PAGE_SMALL, *names))
        if [name for name, _ in rows] != [f"{level:02d}/{index:012d}" for index in range(start, stop)]:
            raise LedgerError(f"the stored tree lacks nodes of level {level}; restore a copy", field="ledger")
        return [found for _, found in rows]

    def cosign(self, head: Checkpoint, line: Cosignature) -> None:  # noqa: D102
        what = hashlib.sha256(line.line().encode()).hexdigest()
        key = self._key("c", f"{head.size:012d}", head.root.hex(), what)
        self.client.call(
            "/v3/kv/txn",
            {
                "compare": [{"key": key, "target": "CREATE", "create_revision": "0"}],
                "success": [{"requestPut": {"key": key, "value": encode(line.line())}}],
            },
        )

    def cosignatures(self, origin: bytes) -> list[tuple[Checkpoint, Cosignature]]:  # noqa: D102
        found = []
        for name, value in self._many("c", _PAGE_SMALL):
            parts = name.split("/")
            try:  # what does not parse is nobody's co-signature
                head = Checkpoint(origin, _number(parts[0].encode()), bytes.fromhex(parts[1]))
                found.append((head, parse_line(value.decode())))
            except (ClaimError, LedgerError, ValueError, IndexError):
                continue
        return found

    def freshness(self) -> ReadConsistency:  # noqa: D102
        lag = self.client.lagging
        return ReadConsistency(lag is None, lag or "confirmed by a majority of the servers")

    def close(self) -> None:  # noqa: D102
        self.client.close()


def _rows(answer: Answer) -> list[tuple[str, bytes]]:
    try:
        return [(decode(kv["key"]).decode(), decode(kv.get("value", ""))) for kv in answer.get("kvs", [])]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise LedgerError("a server's answer is damaged; check the cluster", field="ledger") from None


def _state(tree: merkle.CompactRange) -> bytes:
    """The one spelling of `h`."""
    value = {"size": tree.size, "frontier": [h.hex() for h in tree.hashes]}
    return json.dumps(value, separators=(",", ":")).encode()


def _tree(value: bytes) -> merkle.CompactRange:
    try:
        found = json.loads(value)
        tree = merkle.CompactRange(int(found["size"]), [bytes.fromhex(h) for h in found["frontier"]])
        if _state(tree) != value:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LedgerError("the stored head is damaged; restore a copy", field="ledger") from None
    return tree


def _number(value: bytes) -> int:
    if not value.isdigit() or len(value) > 16:
        raise LedgerError("a stored number is damaged; check it", field="ledger")
    return int(value)
