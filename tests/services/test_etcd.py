"""The ledger on a real three-node etcd over mutual TLS: order, retries, faults, thieves with credentials."""

from __future__ import annotations

import json
import random
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtlsign.claims import merkle, owner
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.council import tally_votes
from mtlsign.claims.ledger.etcd import EtcdLedger, open_etcd
from mtlsign.claims.ledger.etcd_client import encode
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.rebuild import verify_stored_tree
from mtlsign.claims.ledger.tls import Tls
from mtlsign.claims.ledger.view import read_ledger
from mtlsign.claims.ledger.witness import Witness
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Register
from mtlsign.errors import LedgerError
from tests.helpers import etcd_cluster
from tests.unit.claims.scenario import ALICE, Town, kit_of, person

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[etcd_cluster.Cluster]:
    found, reason = etcd_cluster.program()
    if found is None:
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="mtlsign-etcd-") as folder,
        etcd_cluster.running(Path(folder)) as running,
    ):
        yield running


@pytest.fixture
def fresh(cluster: etcd_cluster.Cluster) -> Iterator[Callable[[], EtcdLedger]]:
    """Opens clients of one new, empty ledger."""
    prefix, opened = f"/test/{secrets.token_hex(4)}", []

    def make() -> EtcdLedger:
        opened.append(open_etcd(cluster.uri(prefix), cluster.tls))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_it_is_the_same_tree_as_sqlite(fresh: Callable[[], EtcdLedger], tmp_path: Path) -> None:
    ledger, local = fresh(), open_ledger(f"sqlite:///{tmp_path}/l.db", create=True)
    assert ledger.size() == 0
    rows = [b"entry %d" % i * (1 + i % 7 * 800) for i in range(60)]
    for i, row in enumerate(rows):
        assert ledger.append(row) == local.append(row) == i
    assert ledger.append(rows[7]) == local.append(rows[7]) == 7 and ledger.size() == local.size() == 60
    assert list(ledger.scan()) == rows and list(ledger.scan(40, 55)) == rows[40:55]
    assert ledger.get(59) == rows[59] and ledger.find(merkle.leaf_hash(rows[9])) == 9
    for size in (1, 2, 59, 60):
        head = ledger.head(size)
        assert head == local.head(size)
        for index in {0, size // 2, size - 1}:
            path = ledger.prove(index, size)
            assert path == local.prove(index, size)
            assert merkle.verify_inclusion(merkle.leaf_hash(rows[index]), index, size, path, head.root)
        proof = ledger.prove_consistency(size // 2, size)
        assert merkle.verify_consistency(size // 2, local.head(size // 2).root, size, head.root, proof)
    assert verify_stored_tree(ledger) == verify_stored_tree(local)
    for wrong in (lambda: ledger.get(60), lambda: ledger.prove(60, 60), lambda: ledger.append(b""),
                  lambda: ledger.append(bytes(65_537)), lambda: list(ledger.scan(50, 70))):  # fmt: skip
        with pytest.raises(LedgerError):
            wrong()
    assert fresh().append(b"last") == 60 and ledger.append(b"after") == 61


def test_racing_writers_lose_and_double_nothing(fresh: Callable[[], EtcdLedger]) -> None:
    fresh().append(b"founding")
    same = [b"same %d" % i for i in range(10)]
    got: dict[int, list[tuple[int, bytes]]] = {}

    def write(number: int) -> None:
        ledger = fresh()
        rows = [item for i in range(10) for item in (b"of %d, %d" % (number, i), same[i])]
        got[number] = [(ledger.append(row), row) for row in rows]

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = list(fresh().scan())
    assert len(rows) == 1 + 4 * 10 + 10 == len(set(rows))
    assert all(rows[index] == row for pairs in got.values() for index, row in pairs)
    for pairs in got.values():
        own = [index for index, row in pairs if row.startswith(b"of")]
        assert own == sorted(own)
    verify_stored_tree(fresh())


def test_the_whole_way_on_etcd(fresh: Callable[[], EtcdLedger], tmp_path: Path) -> None:
    town = Town(tmp_path, ledger=fresh())
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    entry, claim = owner.claim(town.owner(ALICE), [kit], town.archive, model + b" tuned", marked=model)
    view = town.vote()
    assert tally_votes(view, *find_claim(view, entry.leaf.hex())).counts == {"accepted": 5}
    assert town.dispute(entry.leaf.hex()).standings[0].standing == "in_the_weights"
    assert claim.publish.index == 1 and town.ledger.freshness().current


def put(ledger: EtcdLedger, key: str, value: bytes) -> None:
    ledger.client.call("/v3/kv/put", {"key": encode(f"{ledger.prefix}/{key}"), "value": encode(value)})


def delete(ledger: EtcdLedger, key: str) -> None:
    ledger.client.call("/v3/kv/deleterange", {"key": encode(f"{ledger.prefix}/{key}")})


def rebuild(ledger: EtcdLedger, rows: list[bytes]) -> None:
    """What somebody with etcd's credentials can do: replace the whole ledger, its tree included."""
    base = f"{ledger.prefix}/"
    for part in ("h", "e/", "l/", "n/"):
        key = base + part
        end = base + part[:-1] + "0" if part.endswith("/") else key + "\0"
        ledger.client.call("/v3/kv/deleterange", {"key": encode(key), "range_end": encode(end)})
    ledger._known = None
    for row in rows:
        ledger.append(row)


@pytest.mark.parametrize(
    "crime", ["rewrite", "entry alone", "truncate", "reorder", "fork", "node", "state", "replace", "empty"]
)
def test_a_thief_with_credentials_is_noticed(
    fresh: Callable[[], EtcdLedger], tmp_path: Path, crime: str
) -> None:
    ledger = fresh()
    town = Town(tmp_path, ["1", "2"], ledger=ledger)
    who = {"signer": ALICE.public_key, "ledger": town.view().origin, "time": 1_790_000_000}
    rows = [ledger.get(0)] + [
        sign_statement(Register(**who, models=((f"m{i}", bytes([i]) * 32),)), ALICE) for i in range(6)
    ]
    for row in rows[1:]:
        ledger.append(row)
    town.attest()
    pinned = Witness(town.members[0], fresh())  # memory at its default place, which pins the origin
    pinned.step()
    assert town.view().time(6) is not None
    if crime == "rewrite":
        rebuild(ledger, [*rows[:2], b"forged", *rows[3:]])
    elif crime == "entry alone":
        put(ledger, f"e/{2:012d}", rows[3])
    elif crime == "truncate":
        rebuild(ledger, rows[:5])
    elif crime == "reorder":
        rebuild(ledger, [*rows[:3], rows[4], rows[3], *rows[5:]])
    elif crime == "fork":
        rebuild(ledger, [*rows[:5], b"another", b"future", b"longer"])
    elif crime == "node":
        put(ledger, f"n/01/{1:012d}", bytes(32))
        with pytest.raises(LedgerError, match="stored tree does not prove entry 1"):
            fresh().prove(1, 7)
    elif crime == "state":
        tree = merkle.CompactRange(7, [bytes(32)] * 3)
        found = {"size": 7, "frontier": [h.hex() for h in tree.hashes]}
        put(ledger, "h", json.dumps(found, separators=(",", ":")).encode())
    elif crime == "empty":
        rebuild(ledger, [])
    else:
        other = Town(tmp_path / "other", ["1", "2"], bits=99)
        rebuild(ledger, [other.ledger.get(0), *rows[1:], b"more"])
    words = "was there before" if crime == "empty" else "nothing was signed"
    for path in (town.memory(town.members[0]), None):
        with pytest.raises(LedgerError, match=words):
            Witness(town.members[0], fresh(), path, clock=town.clock).step()
    if crime != "replace":  # a reader sees it too, from the nodes, or from the members' old co-signatures
        with pytest.raises(LedgerError):
            read_ledger(fresh())


def test_deleted_cosignatures_come_back(fresh: Callable[[], EtcdLedger], tmp_path: Path) -> None:
    """Somebody deletes the heads between two publications, so that nobody could tell which came first."""
    town = Town(tmp_path, ["1", "2", "3"], ledger=fresh())
    for name in ("a", "b"):
        owner.register(town.owner(name), town.archive, [(name, name.encode())])
        town.attest()
    before = town.view()
    key = f"{town.ledger.prefix}/c/"  # type: ignore[attr-defined]
    body = {"key": encode(key), "range_end": encode(key[:-1] + "0")}
    town.ledger.client.call("/v3/kv/deleterange", body)  # type: ignore[attr-defined]
    assert town.view().time(1) is None
    steps = [town.witness(i).step() for i in range(3)]
    assert all("were gone; they are back" in step.remarks[0] for step in steps)
    after = town.view()
    assert [after.time(i) for i in range(3)] == [before.time(i) for i in range(3)]


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_flipped_bits_of_stored_values(fresh: Callable[[], EtcdLedger], tmp_path: Path, count: int) -> None:
    """Somebody with etcd's credentials flips one bit of one value: a reader or a witness notices."""
    ledger = fresh()
    town = Town(tmp_path, ["1", "2", "3"], ledger=ledger)
    for i in range(5):
        owner.register(town.owner(ALICE), town.archive, [(f"m{i}", b"%d" % i)])
    town.attest()
    rows = [ledger.get(i) for i in range(6)]

    def picture() -> object:
        seen = fresh()
        view = read_ledger(seen)
        proofs = [seen.prove(i, 6) for i in range(6)]
        places = [seen.append(row) for row in rows]  # a retry finds its entry
        for member in town.members:
            step = town.witness(member, seen).step()
            if step.remarks or step.cosigned:
                raise LedgerError("a co-signature was gone")
        seen.close()
        return view.entries, [(c.head, c.time) for c in view.heads], proofs, places

    good, rng, noticed = picture(), random.Random(count), Counter[str]()
    stored = [(name, value) for part in "elnc" for name, value in ledger._many(part, 100)
              for name, value in [(f"{part}/{name}", value)]]  # fmt: skip
    stored.append(("h", ledger._one("h") or b""))
    for _ in range(count):
        name, value = rng.choice(stored)
        bad = bytearray(value)
        bit = rng.randrange(8 * len(bad))
        bad[bit // 8] ^= 1 << bit % 8
        put(ledger, name, bytes(bad))
        try:
            assert picture() == good, f"{name}: bit {bit} unnoticed"
            noticed[f"without meaning: {name[0]}"] += 1
        except LedgerError:
            noticed[f"detected: {name[0]}"] += 1
        put(ledger, name, value)
        if name.startswith("c/"):  # what the witnesses put back beside it
            base = f"{ledger.prefix}/{name.rpartition('/')[0]}/"
            for other, _ in list(ledger._many(name.rpartition("/")[0], 100)):
                if f"{base.removeprefix(ledger.prefix + '/')}{other}" not in dict(stored):
                    delete(ledger, f"{base.removeprefix(ledger.prefix + '/')}{other}")
    print(dict(noticed))
    assert picture() == good and not [what for what in noticed if what.startswith("without")]


def test_a_stranger_gets_in_nowhere(cluster: etcd_cluster.Cluster, tmp_path: Path) -> None:
    stranger = etcd_cluster.Authority(tmp_path, "stranger")
    good, bad = cluster.tls, stranger.issue("nobody")
    for files in (Tls(good.ca, bad.cert, bad.key), Tls(bad.ca, good.cert, good.key)):
        with pytest.raises(LedgerError) as caught:
            open_etcd(cluster.uri(), files).size()
        assert "ledger: " in str(caught.value) and "do not trust each other" in str(caught.value)


def test_a_minority_refuses_writes_and_says_how_old_its_answers_are(
    cluster: etcd_cluster.Cluster, fresh: Callable[[], EtcdLedger]
) -> None:
    ledger = fresh()
    for i in range(5):
        ledger.append(b"%d" % i)
    cluster.kill(0)
    assert ledger.append(b"two of three are enough") == 5 and ledger.freshness().current
    cluster.kill(1)
    try:
        begin = time.monotonic()
        with pytest.raises(LedgerError, match=r"no majority of .* answers .*nothing was acknowledged"):
            ledger.append(b"refused")
        assert time.monotonic() - begin < 20
        reader = fresh()
        assert reader.size() == 6 and list(reader.scan())[5] == b"two of three are enough"
        fresh_of = reader.freshness()
        assert not fresh_of.current and "copy at revision" in fresh_of.note and "never" in fresh_of.note
        ledger.size()
        assert "s ago" in ledger.freshness().note
    finally:
        cluster.start(0, 1)
    deadline = time.monotonic() + 20
    while not reader.freshness().current and time.monotonic() < deadline:
        time.sleep(0.5)
        reader.size()
    rows = list(reader.scan())
    assert reader.freshness().current and rows[:6] == [
        *(b"%d" % i for i in range(5)),
        b"two of three are enough",
    ]
    again = ledger.append(b"refused")
    assert list(reader.scan()).count(b"refused") == 1 and again == 6
    verify_stored_tree(reader)


@pytest.mark.slow
def test_the_leader_is_killed_under_1000_publishes_of_4_clients(
    cluster: etcd_cluster.Cluster, fresh: Callable[[], EtcdLedger], tmp_path: Path
) -> None:
    town = Town(tmp_path, ["1", "2", "3"], ledger=fresh())
    origin, acknowledged, kills = town.view().origin, {}, []
    done = threading.Event()

    def publish(number: int) -> None:
        ledger, me = fresh(), person(f"client {number}")
        for i in range(250):
            digest = secrets.token_bytes(32)
            said = Register(
                signer=me.public_key, ledger=origin, time=int(time.time()), models=((f"{i}", digest),)
            )
            data = sign_statement(said, me)
            while True:
                try:
                    acknowledged[data] = ledger.append(data)
                    break
                except LedgerError:  # unknown outcome: the same bytes again
                    continue

    def kill() -> None:
        for _ in range(3):
            if done.wait(1.5):
                return
            leader = cluster.leader()
            if leader is not None:
                cluster.kill(leader)
                kills.append(len(acknowledged))
                time.sleep(3)
                cluster.start(leader)

    clients = [threading.Thread(target=publish, args=(i,)) for i in range(4)]
    killer = threading.Thread(target=kill)
    begin = time.monotonic()
    for thread in (*clients, killer):
        thread.start()
    for thread in clients:
        thread.join()
    done.set()
    killer.join()
    print(f"1000 publishes in {time.monotonic() - begin:.1f} s, leader killed after {kills}")
    assert kills and kills[0] < 1000
    ledger = fresh()
    rows = list(ledger.scan())
    assert len(rows) == 1001 == len(set(rows)) and len(acknowledged) == 1000
    assert all(rows[index] == data for data, index in acknowledged.items())
    head = verify_stored_tree(ledger)
    for index in range(0, 1001, 97):
        path = ledger.prove(index, 1001)
        assert merkle.verify_inclusion(merkle.leaf_hash(rows[index]), index, 1001, path, head.root)
    town.ledger = ledger
    view = town.attest()
    assert view.heads[-1].head == head and not view.remarks
    cluster.stop()
    cluster.start()
    assert verify_stored_tree(fresh()) == head and list(fresh().scan()) == rows
