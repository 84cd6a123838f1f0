"""SQLite ledger, heads, witnesses: durability, proofs, and everything that somebody may do to the file."""

from __future__ import annotations

import base64
import contextlib
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims import merkle, owner
from mtlsign.claims.ledger import checkpoints, witness_state
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.rebuild import verify_stored_tree
from mtlsign.claims.ledger.sqlite import SqliteLedger
from mtlsign.claims.ledger.view import IncrementalReader, LedgerView, read_ledger
from mtlsign.claims.ledger.witness import Witness
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Membership, Ref, Register
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError, MTLSignError
from mtlsign.watermark.keys.opening import is_valid_signature
from tests.unit.claims.scenario import ALICE, BOB, Town, person


@pytest.fixture
def town(tmp_path: Path) -> Town:
    return Town(tmp_path, ["1", "2", "3"])


def stamp(town: Town, name: str, **more: Any) -> int:
    who = {"signer": ALICE.public_key, "ledger": town.view().origin, "time": int(town.clock())} | more
    return town.ledger.append(
        sign_statement(Register(**who, models=((name, person(name).public_key),)), ALICE)
    )


# --- heads: pinned against C2SP ---

SPEC_LINE = (
    "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZ"
    "qhf5nNo0xUe+mbIUBkBIfZ+qnA=="
)
SPEC_BODY = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"


def test_the_specifications_example_line() -> None:
    line = checkpoints.parse_line(SPEC_LINE)
    assert (line.name, line.key_id.hex(), line.time) == ("witness.example.com/w1", "8d66cf3f", 1679315147)
    assert line.line() == SPEC_LINE and len(line.signature) == 64
    assert (
        checkpoints.message(SPEC_BODY, line.time) == b"cosignature/v1\ntime 1679315147\n" + SPEC_BODY.encode()
    )


def test_key_ids_and_signatures_of_a_public_log() -> None:
    """A published verifier key and checkpoint of the transparency-dev witness project's tests (type 0x01)."""
    blob = base64.b64decode("AULaJMvTtDLHPUcUrjdDad9vDlh/PTfC2VV60JUtCfWT")
    assert checkpoints.key_id("monkeys", blob[1:], 0x01).hex() == "db4d9f7e"
    body = "monkeys\n5\n41smjBUiAU70EtKlT6lIOIYtRTYxYXsDB+XHfcvu/BE=\n"
    signature = base64.b64decode(
        "202fftzGl3LVoqjXfwCFZZXs8I+5G22+Ek2K0AOyBuSJ/8/CZawNF+6fNlTKOCd622pbzJNkkJFWuw9DbicZCkEx9AY="
    )
    assert signature[:4].hex() == "db4d9f7e" and is_valid_signature(blob[1:], signature[4:], body.encode())


def test_a_head_there_and_back() -> None:
    head = Checkpoint(bytes(range(32)), 20852163, bytes(range(32, 64)))
    lines = [checkpoints.cosign(who, head, 1_790_000_000 + i) for i, who in enumerate((ALICE, BOB))]
    note = checkpoints.encode_signed_note(head, lines)
    assert checkpoints.parse_signed_note(note) == (head, tuple(sorted(lines, key=lambda line: line.name)))
    members = [ALICE.public_key, BOB.public_key]
    assert checkpoints.cosigner_times(head, lines, members) == {
        members[0]: 1_790_000_000,
        members[1]: 1_790_000_001,
    }
    assert checkpoints.cosigner_times(head, lines, [person("x").public_key]) == {}
    assert checkpoints.median([5, 1, 3]) == 3 and checkpoints.median([1, 9]) == 9
    other = Checkpoint(head.origin, head.size + 1, head.root)
    for bad in (lines * 2, [checkpoints.cosign(ALICE, other, 5)]):
        with pytest.raises(ClaimError, match="does not hold"):
            checkpoints.cosigner_times(head, bad, members)
    stolen = Cosignature(
        checkpoints.MEMBER + BOB.public_key.hex(), lines[0].key_id, lines[0].time, lines[0].signature
    )
    assert checkpoints.cosigner_times(head, [stolen], members) == {}  # Alice's line under Bob's name


@pytest.mark.parametrize(
    "note",
    [
        b"", b"\n\n", b"mtlsign/ledger/v0/00\n1\nAAAA\n\n", b"\xff\n\n", b"a\nb\nc\n\n" * 20_000,
        b"mtlsign/ledger/v0/" + b"0" * 64 + b"\n01\n" + base64.b64encode(bytes(32)) + b"\n\n",
        b"mtlsign/ledger/v0/" + b"A" * 64 + b"\n1\n" + base64.b64encode(bytes(32)) + b"\n\n",
        b"mtlsign/ledger/v0/" + b"0" * 64 + b"\n1\n" + base64.b64encode(bytes(32)) + b"\next\n\n",
        b"mtlsign/ledger/v0/" + b"0" * 64 + b"\n1\n" + base64.b64encode(bytes(32)) + b"\n\n\xe2\x80\x94\n",
        b"mtlsign/ledger/v0/" + b"0" * 64 + b"\n\xd9\xa1\n" + base64.b64encode(bytes(32)) + b"\n\n",
    ],
)  # fmt: skip
def test_what_is_no_head_is_refused(note: bytes) -> None:
    with pytest.raises(ClaimError):
        checkpoints.parse_signed_note(note)


# --- the SQLite file ---


def test_entries_are_appended_once_and_proven(tmp_path: Path) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/sub/l.db", create=True)
    rows = [b"row %d" % i for i in range(300)]
    assert isinstance(ledger, SqliteLedger)
    assert ledger.append_many(rows[:200]) == list(range(200))
    assert [ledger.append(row) for row in rows[195:210]] == list(range(195, 210))
    again = open_ledger(ledger.uri)
    assert list(again.scan()) == rows[:210] and again.size() == 210 and list(again.scan(250)) == []
    for size in (1, 64, 65, 210):
        head = again.head(size) if size else None
        for index in range(0, size, 13):
            path = again.prove(index, size)
            assert head and merkle.verify_inclusion(
                merkle.leaf_hash(rows[index]), index, size, path, head.root
            )
    assert verify_stored_tree(again).root == merkle.root_from_leaves(
        merkle.leaf_hash(row) for row in rows[:210]
    )
    for statement in (
        "UPDATE entries SET envelope = 'x' WHERE idx = 1",
        "DELETE FROM entries WHERE idx = 209",
        "INSERT OR REPLACE INTO entries VALUES (3, x'00', x'00')",
        "INSERT INTO entries VALUES (300, x'01', x'00')",
        "REPLACE INTO nodes VALUES (0, 0, x'00')",
        "DELETE FROM nodes",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            again._db.execute(statement)  # type: ignore[attr-defined]
    verify_stored_tree(again)


def test_what_is_no_ledger_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE a(b)").connection.close()
    for uri in (
        "sqlite:///", "sqlite://x", "postgres://x", "etcd://", "etcd://nowhere", f"sqlite:///{tmp_path}/none.db",
        f"sqlite:///{tmp_path}/text", f"sqlite:///{tmp_path}/other.db", f"sqlite:///{tmp_path}",
    ):  # fmt: skip
        with pytest.raises(LedgerError, match="ledger: "):
            open_ledger(uri)
    empty = open_ledger(f"sqlite:///{tmp_path}/new.db", create=True)
    with pytest.raises(LedgerError, match="found it first"):
        read_ledger(empty)
    empty.append(b"junk first")
    with pytest.raises(LedgerError, match="does not begin"):
        read_ledger(empty)


# --- views ---


def test_junk_and_repeats_mean_nothing_and_stay_visible(town: Town) -> None:
    index = town.ledger.append(b"\x00 not even JSON")
    stamp(town, "a")
    view = town.attest()
    assert view.entries[index].statement is None and view.entries[index].problem
    assert view.time(index) is not None and view.time(index + 1) is not None
    repeated = LedgerView.of([*town.ledger.scan(), town.ledger.get(2)], [])
    assert repeated.entries[3].problem == "repeats entry 2"


def test_a_council_changes_only_by_its_own_threshold(town: Town) -> None:
    origin, new = town.view().origin, [person("4"), person("5")]
    changed = Membership(
        signer=town.members[0].public_key, ledger=origin, time=0, previous=Ref(0, origin), threshold=2,
        members=tuple(sorted(m.public_key for m in new)),
    )  # fmt: skip
    founder = replace(changed, signer=person("founder").public_key)
    alone = town.ledger.append(sign_statement(changed, town.members[0]))
    by_founder = town.ledger.append(sign_statement(founder, person("founder")))
    strangers = town.ledger.append(sign_statement(changed, town.members[0], *new))
    assert len(town.view().councils) == 1
    assert all("fewer than 2" in str(town.view().entries[i].problem) for i in (alone, by_founder, strangers))
    good = town.ledger.append(sign_statement(changed, *town.members[:2]))
    assert [i for i, _ in town.view().councils] == [0, good]
    town.attest()  # the old members are no longer asked
    assert town.view().time(good) is None
    first, town.members = town.members[0], new
    assert town.attest().time(good) is not None
    late = town.ledger.append(
        sign_statement(replace(changed, time=1), first, *new)
    )  # follows the founding, not the council in force
    assert town.view().entries[late].problem == "does not follow the membership in force"


def test_a_head_needs_the_threshold(town: Town) -> None:
    index = stamp(town, "a")
    town.witness(0).step()
    assert town.view().time(index) is None
    for stranger in ("x", "y", "z"):
        town.witness(person(stranger)).step()
    assert town.view().time(index) is None
    town.witness(1).step()
    first = town.view().time(index)
    town.witness(2).step()
    assert first is not None and town.view().time(index) == sorted(town.view().heads[0].times.values())[1]


# --- witnesses ---


def tamper(town: Town, *statements: str) -> None:
    """What the owner of the file can do: drop the triggers and edit."""
    path = Path(town.ledger.uri.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)
    db.close()


def rebuild(town: Town, rows: list[bytes]) -> None:
    """The whole file anew, tree and all, keeping the co-signatures."""
    tamper(town, "DELETE FROM entries", "DELETE FROM nodes")
    path = Path(town.ledger.uri.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as db:
        tree = merkle.CompactRange()
        for index, row in enumerate(rows):
            db.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, merkle.leaf_hash(row), row))
            db.executemany("INSERT INTO nodes VALUES (?, ?, ?)", tree.append(merkle.leaf_hash(row)))
    db.close()


@pytest.mark.parametrize(
    "crime", ["truncate", "rewrite", "reorder", "fork", "node", "row", "replace", "roll back"]
)
def test_a_witness_notices(town: Town, crime: str) -> None:
    for i in range(6):
        stamp(town, f"m{i}")
    saved = town.folder / "saved.db"
    town.ledger._db.execute("VACUUM INTO ?", (str(saved),))  # type: ignore[attr-defined]
    town.attest()
    for i in range(3):
        stamp(town, f"n{i}")
    town.attest()
    rows = list(town.ledger.scan())
    if crime == "truncate":
        rebuild(town, rows[:8])
    elif crime == "rewrite":
        rebuild(town, [*rows[:3], b"forged", *rows[4:], b"and", b"longer"])
    elif crime == "reorder":
        rebuild(town, [*rows[:5], rows[6], rows[5], *rows[7:]])
    elif crime == "fork":
        rebuild(town, [*rows[:8], b"another", b"future", b"longer"])
    elif crime == "node":
        tamper(town, "UPDATE nodes SET hash = zeroblob(32) WHERE level = 1 AND idx = 1")
    elif crime == "row":
        tamper(town, "UPDATE entries SET envelope = x'00' WHERE idx = 4")
    elif crime == "replace":
        rebuild(town, [Town(town.folder / "other", ["1"]).ledger.get(0), *rows[1:]])
    else:
        path = Path(town.ledger.uri.removeprefix("sqlite:///"))
        town.ledger.close()
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        shutil.copy(saved, path)
    again = open_ledger(town.ledger.uri)
    with pytest.raises(LedgerError):
        town.witness(0, again).step()
    if crime not in ("replace", "roll back"):  # an older state, or another's, is as good as any to a newcomer
        with pytest.raises(LedgerError):
            read_ledger(again)


def test_a_place_is_pinned_to_the_ledger_that_was_there_first(town: Town) -> None:
    """Without a named memory: the default one is named by the ledger's origin, so a pin of the place must
    tell.
    """
    member, path = town.members[0], Path(town.ledger.uri.removeprefix("sqlite:///"))
    assert Witness(member, town.ledger).step().cosigned
    assert Witness(member, town.ledger).step().cosigned == ()
    other = Town(town.folder / "other", ["1", "2", "3"], bits=99)
    other.ledger._db.execute("VACUUM INTO ?", (str(town.folder / "new.db"),))  # type: ignore[attr-defined]
    town.ledger.close()
    for ending in ("", "-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    shutil.copy(town.folder / "new.db", path)
    with open_ledger(town.ledger.uri) as again:
        with pytest.raises(LedgerError, match=r"another ledger .* nothing was signed"):
            Witness(member, again).step()
        names = [line.name for _, line in again.cosignatures(again.origin())]
        assert checkpoints.MEMBER + member.public_key.hex() not in names
        assert Witness(person("newcomer"), again).step().cosigned  # knows nothing: --origin is for that
    path.unlink()
    with open_ledger(town.ledger.uri, create=True) as empty:
        with pytest.raises(LedgerError, match="was there before"):
            Witness(member, empty)
        with pytest.raises(LedgerError, match="was there before"):
            owner.create_ledger(owner.Owner(member, empty), [member.public_key])
        assert empty.size() == 0
    pin = witness_state.pin_path(member, f"sqlite:///{path}")
    good = pin.read_bytes()
    for byte in range(len(good)):
        pin.write_bytes(good[:byte] + bytes([good[byte] ^ 1]) + good[byte + 1 :])
        with pytest.raises(MTLSignError):
            witness_state.pinned_origin(member, f"sqlite:///{path}")


def test_no_proof_is_handed_out_that_does_not_hold(town: Town) -> None:
    for i in range(20):
        stamp(town, f"m{i}")
    root = town.ledger.head(21).root
    for level, index in [(0, 3), (1, 0), (2, 1), (3, 0), (4, 0)]:
        (good,) = town.ledger.nodes(level, index, index + 1)
        tamper(town, f"UPDATE nodes SET hash = zeroblob(32) WHERE level = {level} AND idx = {index}")
        refused = 0
        for entry in range(21):
            try:
                path = town.ledger.prove(entry, 21)
            except LedgerError:
                refused += 1
                continue
            if town.ledger.head(21).root == root:  # else the root itself is another: nobody co-signed it
                leaf = merkle.leaf_hash(town.ledger.get(entry))
                assert merkle.verify_inclusion(leaf, entry, 21, path, root)
        assert refused
        for old in range(22):
            with contextlib.suppress(LedgerError):
                path = town.ledger.prove_consistency(old, 21)
                roots = town.ledger.head(old).root, town.ledger.head(21).root
                assert merkle.verify_consistency(old, roots[0], 21, roots[1], path)
        with pytest.raises(LedgerError):
            read_ledger(town.ledger)
        tamper(town, f"UPDATE nodes SET hash = x'{good.hex()}' WHERE level = {level} AND idx = {index}")
    read_ledger(town.ledger)


def test_deleted_cosignatures_come_back(town: Town) -> None:
    """Somebody deletes the heads between two entries, so that nobody could tell which came first."""
    for name in ("a", "b"):
        stamp(town, name)
        town.attest()
    before = town.view()
    tamper(town, "DELETE FROM cosignatures")
    assert town.view().time(1) is None
    assert all("were gone; they are back" in town.witness(i).step().remarks[0] for i in range(3))
    after = town.view()
    assert [after.time(i) for i in range(3)] == [before.time(i) for i in range(3)]
    assert [c.head for c in after.heads] == [c.head for c in before.heads]
    lines = town.memory(town.members[0]).with_name(town.memory(town.members[0]).name + ".lines")
    lines.write_bytes(lines.read_bytes()[:-20] + b"\xff\n77\nx y\n")  # torn, and rubbish: costs one line
    tamper(town, "DELETE FROM cosignatures")
    assert town.witness(0).step().remarks


def test_a_replayed_entry_is_remarked_on_and_means_nothing(town: Town) -> None:
    """The backend gives the same bytes the same number; whoever owns the file can append them again."""
    index = stamp(town, "a")
    assert town.ledger.append(town.ledger.get(index)) == index
    town.attest()
    rows = list(town.ledger.scan())
    tamper(
        town,
        "DROP TABLE entries",
        "CREATE TABLE entries(idx INTEGER PRIMARY KEY, leaf BLOB NOT NULL, envelope BLOB NOT NULL)",
    )
    rebuild(town, [*rows, rows[index]])
    with open_ledger(town.ledger.uri) as again:
        assert f"entry {len(rows)} repeats an earlier one" in town.witness(0, again).step().remarks
        assert read_ledger(again).entries[len(rows)].problem == f"repeats entry {index}"


def test_a_reader_that_stays_notices_too(town: Town) -> None:
    stamp(town, "a")
    reader = IncrementalReader(town.ledger)
    reader.view()
    rows = list(town.ledger.scan())
    rebuild(town, [rows[0], b"forged", b"longer"])
    with pytest.raises(LedgerError, match="not the tree of its entries"):
        reader.view()


def test_a_member_who_signs_another_tree_is_named(town: Town) -> None:
    stamp(town, "a")
    liar = town.members[2]
    lie = Checkpoint(town.view().origin, 2, bytes(32))
    town.ledger.cosign(lie, checkpoints.cosign(liar, lie, 5))
    step = town.witness(0).step()
    assert step.cosigned and any("FORK" in r and liar.public_key.hex()[:16] in r for r in step.remarks)
    town.witness(1).step()
    view = town.view()
    assert view.time(1) is not None and any(liar.public_key.hex()[:16] in remark for remark in view.remarks)
    second = town.members[1]
    town.ledger.cosign(lie, checkpoints.cosign(second, lie, 6))
    with pytest.raises(LedgerError, match="co-signed another tree"):
        town.view()


def test_nobody_can_keep_a_members_place(town: Town) -> None:
    """Somebody with the store's credentials writes rubbish under a member's name before the member signs."""
    index = stamp(town, "a")
    head, me = town.ledger.head(), town.members[0]
    for rubbish in (b"\0" * 64, checkpoints.cosign(me, Checkpoint(head.origin, 99, head.root), 5).signature):
        name = checkpoints.MEMBER + me.public_key.hex()
        town.ledger.cosign(head, Cosignature(name, checkpoints.key_id(name, me.public_key), 5, rubbish))
    assert town.witness(0).step().cosigned == (2,) and town.witness(0).step().cosigned == ()
    assert town.attest().time(index) is not None


def test_clocks(town: Town) -> None:
    town.attest()
    back = stamp(town, "back-dated", time=1_000_000_000)
    ahead = stamp(town, "ahead", time=2_000_000_000)
    step = town.witness(0).step()
    assert any(f"entry {back} is back-dated" in remark for remark in step.remarks)
    assert any(f"entry {ahead} says that it comes from" in remark for remark in step.remarks)
    town.witness(1).step()
    assert (
        town.view().time(back) or 0
    ) > 1_789_000_000  # by the co-signers' clocks, whatever the sender says
    town.clock.now = 1_600_000_000
    stamp(town, "after our own clock went back")
    step = town.witness(0).step()
    assert any("our own clock went back" in remark for remark in step.remarks)
    town.clock.now = 1_500_000_000
    view = town.attest()
    times = [view.time(index) for index in view.entries]
    assert times == sorted(times)  # type: ignore[type-var]


def test_a_witness_survives_a_crash_between_memory_and_publication(town: Town, monkeypatch: Any) -> None:
    stamp(town, "a")
    witness = town.witness(0)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(town.ledger, "cosign", crash)
    with pytest.raises(KeyboardInterrupt):
        witness.step()
    monkeypatch.undo()
    assert town.witness(0).step().cosigned == (2,) and town.witness(0).step().cosigned == ()


def test_anothers_memory_is_refused(town: Town) -> None:
    town.attest()
    with pytest.raises(KeyMaterialError, match="another witness's"):
        Witness(town.members[0], town.ledger, town.memory(town.members[1])).step()
