"""Ledger on a real etcd cluster of three nodes over mutual TLS: order, retries, faults, manipulation."""

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
from tests.unit.claims.scenario import ALICE, ClaimScenario, kit_and_model, make_identity

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[etcd_cluster.Cluster]:
    executable, reason = etcd_cluster.program()
    if executable is None:
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="mtlsign-etcd-") as folder,
        etcd_cluster.running(Path(folder)) as running,
    ):
        yield running


@pytest.fixture
def fresh(cluster: etcd_cluster.Cluster) -> Iterator[Callable[[], EtcdLedger]]:
    """Return a function that opens a client of one new, empty ledger."""
    prefix, opened = f"/test/{secrets.token_hex(4)}", []

    def make() -> EtcdLedger:
        opened.append(open_etcd(cluster.uri(prefix), cluster.tls))
        return opened[-1]

    yield make
    for ledger in opened:
        ledger.close()


def test_etcd_ledger_has_the_same_tree_as_sqlite(fresh: Callable[[], EtcdLedger], tmp_path: Path) -> None:
    ledger, local = fresh(), open_ledger(f"sqlite:///{tmp_path}/l.db", create=True)
    assert ledger.size() == 0
    rows = [b"entry %d" % i * (1 + i % 7 * 800) for i in range(60)]
    for i, row in enumerate(rows):
        assert ledger.append(row) == local.append(row) == i
    assert ledger.append(rows[7]) == local.append(rows[7]) == 7 and ledger.size() == local.size() == 60
    assert list(ledger.scan()) == rows and list(ledger.scan(40, 55)) == rows[40:55]
    assert ledger.get(59) == rows[59] and ledger.find(merkle.leaf_hash(rows[9])) == 9
    for size in (1, 2, 59, 60):
        head = ledger.checkpoint(size)
        assert head == local.checkpoint(size)
        for index in {0, size // 2, size - 1}:
            path = ledger.prove(index, size)
            assert path == local.prove(index, size)
            assert merkle.verify_inclusion(merkle.leaf_hash(rows[index]), index, size, path, head.root)
        proof = ledger.prove_consistency(size // 2, size)
        assert merkle.verify_consistency(size // 2, local.checkpoint(size // 2).root, size, head.root, proof)
    assert verify_stored_tree(ledger) == verify_stored_tree(local)
    for wrong in (lambda: ledger.get(60), lambda: ledger.prove(60, 60), lambda: ledger.append(b""),
                  lambda: ledger.append(bytes(65_537)), lambda: list(ledger.scan(50, 70))):  # fmt: skip
        with pytest.raises(LedgerError):
            wrong()
    assert fresh().append(b"last") == 60 and ledger.append(b"after") == 61


def test_etcd_ledger_with_concurrent_writers_has_each_entry_once(fresh: Callable[[], EtcdLedger]) -> None:
    fresh().append(b"first entry")
    same = [b"same %d" % i for i in range(10)]
    written: dict[int, list[tuple[int, bytes]]] = {}

    def write(number: int) -> None:
        ledger = fresh()
        rows = [item for i in range(10) for item in (b"of %d, %d" % (number, i), same[i])]
        written[number] = [(ledger.append(row), row) for row in rows]

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = list(fresh().scan())
    assert len(rows) == 1 + 4 * 10 + 10 == len(set(rows))
    assert all(rows[index] == row for pairs in written.values() for index, row in pairs)
    for pairs in written.values():
        own = [index for index, row in pairs if row.startswith(b"of")]
        assert own == sorted(own)
    verify_stored_tree(fresh())


def test_claim_lifecycle_on_etcd_is_in_the_weights(fresh: Callable[[], EtcdLedger], tmp_path: Path) -> None:
    scenario = ClaimScenario(tmp_path, ledger=fresh())
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    entry, claim = owner.claim(
        scenario.owner(ALICE), [kit], scenario.archive, model + b" tuned", own_model=model
    )
    view = scenario.run_council()
    assert tally_votes(view, *find_claim(view, entry.leaf.hex())).counts == {"accepted": 5}
    assert scenario.dispute(entry.leaf.hex()).standings[0].standing == "supported"
    assert claim.publish.index == 1 and scenario.ledger.staleness().current


def put(ledger: EtcdLedger, key: str, value: bytes) -> None:
    ledger.client.call("/v3/kv/put", {"key": encode(f"{ledger.prefix}/{key}"), "value": encode(value)})


def delete(ledger: EtcdLedger, key: str) -> None:
    ledger.client.call("/v3/kv/deleterange", {"key": encode(f"{ledger.prefix}/{key}")})


def rewrite_entries(ledger: EtcdLedger, rows: list[bytes]) -> None:
    """Replace the complete ledger and its tree, as a party with etcd's credentials can do."""
    base = f"{ledger.prefix}/"
    for part in ("h", "e/", "l/", "n/"):
        key = base + part
        end = base + part[:-1] + "0" if part.endswith("/") else key + "\0"
        ledger.client.call("/v3/kv/deleterange", {"key": encode(key), "range_end": encode(end)})
    ledger._cached_state = None
    for row in rows:
        ledger.append(row)


@pytest.mark.parametrize(
    "manipulation",
    ["rewrite", "entry alone", "truncate", "reorder", "fork", "node", "state", "replace", "empty"],
)
def test_witness_detects_store_rewritten_with_valid_credentials(
    fresh: Callable[[], EtcdLedger], tmp_path: Path, manipulation: str
) -> None:
    ledger = fresh()
    scenario = ClaimScenario(tmp_path, ["1", "2"], ledger=ledger)
    who = {"signer": ALICE.public_key, "ledger": scenario.view().origin, "time": 1_790_000_000}
    rows = [ledger.get(0)] + [
        sign_statement(Register(**who, models=((f"m{i}", bytes([i]) * 32),)), ALICE) for i in range(6)
    ]
    for row in rows[1:]:
        ledger.append(row)
    scenario.cosign_all()
    pinned = Witness(scenario.members[0], fresh())  # the default state pins the origin
    pinned.run_once()
    assert scenario.view().time(6) is not None
    if manipulation == "rewrite":
        rewrite_entries(ledger, [*rows[:2], b"forged", *rows[3:]])
    elif manipulation == "entry alone":
        put(ledger, f"e/{2:012d}", rows[3])
    elif manipulation == "truncate":
        rewrite_entries(ledger, rows[:5])
    elif manipulation == "reorder":
        rewrite_entries(ledger, [*rows[:3], rows[4], rows[3], *rows[5:]])
    elif manipulation == "fork":
        rewrite_entries(ledger, [*rows[:5], b"another", b"future", b"longer"])
    elif manipulation == "node":
        put(ledger, f"n/01/{1:012d}", bytes(32))
        with pytest.raises(LedgerError, match="stored tree does not prove entry 1"):
            fresh().prove(1, 7)
    elif manipulation == "state":
        tree = merkle.CompactRange(7, [bytes(32)] * 3)
        state = {"size": 7, "frontier": [h.hex() for h in tree.hashes]}
        put(ledger, "h", json.dumps(state, separators=(",", ":")).encode())
    elif manipulation == "empty":
        rewrite_entries(ledger, [])
    else:
        other = ClaimScenario(tmp_path / "other", ["1", "2"], bits=99)
        rewrite_entries(ledger, [other.ledger.get(0), *rows[1:], b"more"])
    words = "store held the ledger" if manipulation == "empty" else "nothing was signed"
    for path in (scenario.witness_state_path(scenario.members[0]), None):
        with pytest.raises(LedgerError, match=words):
            Witness(scenario.members[0], fresh(), path, clock=scenario.clock).run_once()
    if manipulation != "replace":  # a reader detects it by the nodes or by the members' earlier co-signatures
        with pytest.raises(LedgerError):
            read_ledger(fresh())


def test_witness_restores_cosignatures_deleted_from_etcd(
    fresh: Callable[[], EtcdLedger], tmp_path: Path
) -> None:
    """Without the checkpoints between two publications, the order of their times would be lost."""
    scenario = ClaimScenario(tmp_path, ["1", "2", "3"], ledger=fresh())
    for name in ("a", "b"):
        owner.register(scenario.owner(name), scenario.archive, [(name, name.encode())])
        scenario.cosign_all()
    before = scenario.view()
    key = f"{scenario.ledger.prefix}/c/"  # type: ignore[attr-defined]
    body = {"key": encode(key), "range_end": encode(key[:-1] + "0")}
    scenario.ledger.client.call("/v3/kv/deleterange", body)  # type: ignore[attr-defined]
    assert scenario.view().time(1) is None
    steps = [scenario.witness(i).run_once() for i in range(3)]
    assert all("were missing and are restored" in step.warnings[0] for step in steps)
    after = scenario.view()
    assert [after.time(i) for i in range(3)] == [before.time(i) for i in range(3)]


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_flipped_bits_of_etcd_values_are_detected(
    fresh: Callable[[], EtcdLedger], tmp_path: Path, count: int
) -> None:
    """A party with etcd's credentials flips one bit of one value; a reader or a witness detects it."""
    ledger = fresh()
    scenario = ClaimScenario(tmp_path, ["1", "2", "3"], ledger=ledger)
    for i in range(5):
        owner.register(scenario.owner(ALICE), scenario.archive, [(f"m{i}", b"%d" % i)])
    scenario.cosign_all()
    rows = [ledger.get(i) for i in range(6)]

    def snapshot() -> object:
        reader = fresh()
        view = read_ledger(reader)
        proofs = [reader.prove(i, 6) for i in range(6)]
        indices = [reader.append(row) for row in rows]  # a retry finds its entry
        for member in scenario.members:
            step = scenario.witness(member, reader).run_once()
            if step.warnings or step.cosigned:
                raise LedgerError("a co-signature was missing")
        reader.close()
        return view.entries, [(c.checkpoint, c.time) for c in view.confirmed], proofs, indices

    expected, rng, outcomes = snapshot(), random.Random(count), Counter[str]()
    stored = [(name, value) for part in "elnc" for name, value in ledger._scan_prefix(part, 100)
              for name, value in [(f"{part}/{name}", value)]]  # fmt: skip
    stored.append(("h", ledger._get("h") or b""))
    for _ in range(count):
        name, value = rng.choice(stored)
        flipped = bytearray(value)
        bit = rng.randrange(8 * len(flipped))
        flipped[bit // 8] ^= 1 << bit % 8
        put(ledger, name, bytes(flipped))
        try:
            assert snapshot() == expected, f"{name}: bit {bit} is not detected"
            outcomes[f"without effect: {name[0]}"] += 1
        except LedgerError:
            outcomes[f"detected: {name[0]}"] += 1
        put(ledger, name, value)
        if name.startswith("c/"):  # delete the line that the witnesses restored under another key
            base = f"{ledger.prefix}/{name.rpartition('/')[0]}/"
            for other, _ in list(ledger._scan_prefix(name.rpartition("/")[0], 100)):
                if f"{base.removeprefix(ledger.prefix + '/')}{other}" not in dict(stored):
                    delete(ledger, f"{base.removeprefix(ledger.prefix + '/')}{other}")
    print(dict(outcomes))
    assert snapshot() == expected and not [outcome for outcome in outcomes if outcome.startswith("without")]


def test_etcd_client_with_foreign_certificates_is_refused(
    cluster: etcd_cluster.Cluster, tmp_path: Path
) -> None:
    foreign = etcd_cluster.Authority(tmp_path, "foreign")
    good, bad = cluster.tls, foreign.issue("client")
    for files in (Tls(good.ca, bad.cert, bad.key), Tls(bad.ca, good.cert, good.key)):
        with pytest.raises(LedgerError) as caught:
            open_etcd(cluster.uri(), files).size()
        assert "ledger: " in str(caught.value) and "do not trust each other" in str(caught.value)


def test_etcd_minority_refuses_writes_and_states_staleness_of_reads(
    cluster: etcd_cluster.Cluster, fresh: Callable[[], EtcdLedger]
) -> None:
    ledger = fresh()
    for i in range(5):
        ledger.append(b"%d" % i)
    cluster.kill(0)
    assert ledger.append(b"two of three are enough") == 5 and ledger.staleness().current
    cluster.kill(1)
    try:
        begin = time.monotonic()
        with pytest.raises(LedgerError, match=r"No majority of .* answers .*nothing was acknowledged"):
            ledger.append(b"refused")
        assert time.monotonic() - begin < 20
        reader = fresh()
        assert reader.size() == 6 and list(reader.scan())[5] == b"two of three are enough"
        consistency = reader.staleness()
        assert not consistency.current
        assert "copy at revision" in consistency.note and "never" in consistency.note
        ledger.size()
        assert "s ago" in ledger.staleness().note
    finally:
        cluster.start(0, 1)
    deadline = time.monotonic() + 20
    while not reader.staleness().current and time.monotonic() < deadline:
        time.sleep(0.5)
        reader.size()
    rows = list(reader.scan())
    assert reader.staleness().current and rows[:6] == [
        *(b"%d" % i for i in range(5)),
        b"two of three are enough",
    ]
    index = ledger.append(b"refused")
    assert list(reader.scan()).count(b"refused") == 1 and index == 6
    verify_stored_tree(reader)


@pytest.mark.slow
def test_etcd_ledger_with_killed_leaders_keeps_1000_entries_of_4_clients(
    cluster: etcd_cluster.Cluster, fresh: Callable[[], EtcdLedger], tmp_path: Path
) -> None:
    scenario = ClaimScenario(tmp_path, ["1", "2", "3"], ledger=fresh())
    origin, acknowledged, kills = scenario.view().origin, {}, []
    finished = threading.Event()

    def publish(number: int) -> None:
        ledger, identity = fresh(), make_identity(f"client {number}")
        for i in range(250):
            digest = secrets.token_bytes(32)
            statement = Register(
                signer=identity.public_key, ledger=origin, time=int(time.time()), models=((f"{i}", digest),)
            )
            data = sign_statement(statement, identity)
            while True:
                try:
                    acknowledged[data] = ledger.append(data)
                    break
                except LedgerError:  # unknown outcome: repeat with the same bytes
                    continue

    def kill() -> None:
        for _ in range(3):
            if finished.wait(1.5):
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
    finished.set()
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
    scenario.ledger = ledger
    view = scenario.cosign_all()
    assert view.confirmed[-1].checkpoint == head and not view.warnings
    cluster.stop()
    cluster.start()
    assert verify_stored_tree(fresh()) == head and list(fresh().scan()) == rows
