"""Detection of corruption: a flipped bit in any stored artifact is detected or provably has no effect.

Each target consists of some bytes and a reader, which raises or returns their meaning. For example, the
reader of the target `kit` writes the bytes to the kit's file and opens the kit. After a flip, the reader must
raise, or return the same meaning (a date inside the ZIP or an unused byte of a database page has none). A
fixed seed draws the bits; `-m slow` draws many more with a new seed.
"""

from __future__ import annotations

import random
import secrets
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims import merkle, owner
from mtlsign.claims.blob_store import read_model_bytes
from mtlsign.claims.bundle import check_bundle, write_bundle
from mtlsign.claims.bundle_result import to_json
from mtlsign.claims.commands.settings import signed_note
from mtlsign.claims.ledger import checkpoints, witness_state
from mtlsign.claims.ledger.checkpoints import Checkpoint
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.view import read_ledger
from mtlsign.claims.ledger.witness import Witness
from mtlsign.claims.statements.parsing import open_statement, sign_statement
from mtlsign.errors import MTLSignError
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import write_manifest_folder
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit, write_kit
from tests.unit.claims.scenario import (
    ALICE,
    BOB,
    ClaimScenario,
    SubstringJudge,
    keyed_opening,
    kit_and_model,
    make_identity,
)
from tests.unit.claims.statement_examples import STATEMENTS

Reader = Callable[[bytes], Any]


@dataclass(frozen=True)
class CorruptionTarget:
    """Stored bytes and their reader. With `every_bit_matters`, each flip must raise."""

    data: bytes
    read: Reader
    every_bit_matters: bool = False


class Unreadable(MTLSignError):
    """A part that existed before is missing, which counts as a detection."""


def flip_bit(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def via_file(path: Path, read: Callable[[], Any]) -> Reader:
    """Return a reader that writes the bytes to `path` and calls `read`."""

    def write_and_read(data: bytes) -> Any:
        path.write_bytes(data)
        return read()

    return write_and_read


class StoredArtifacts:
    """Ledger with every statement kind, its members' witness states, a kit, a model folder and a bundle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scenario = scenario = ClaimScenario(folder, ["1", "2", "3"])
        kit, self.model = kit_and_model(ALICE)
        accused = scenario.owner(make_identity("accused"))
        alice = scenario.owner(ALICE)
        owner.register(accused, scenario.archive, [("base", b"clean")])
        owner.publish(alice, [kit])
        scenario.cosign_all()
        suspect = self.model + b" tuned"
        entry, self.claim = owner.claim(alice, [kit], scenario.archive, suspect, own_model=self.model)
        owner.exhibit(accused, scenario.archive, str(entry.index), b"clean")
        view = scenario.run_council()
        write_bundle(folder / "claim.zip", scenario.ledger, view, entry, scenario.archive)
        self.note = signed_note(scenario.ledger, view)
        self._read_ledger_and_close()
        self.storage = open_storage(str(folder / "store"))
        kit_name = write_kit(self.storage, kit, EncryptionSecret.from_kit_key(ALICE.kit_key))
        self.kit = folder / "store" / "kits" / kit_name
        self.model_folder = folder / "store" / "models" / "m"
        model_files = {"model.safetensors": self.model, "README.md": b"card"}
        write_manifest_folder(self.storage.child("models/m"), model_files)
        ALICE.save(folder / "alice.json", None)

    def _read_ledger_and_close(self) -> None:
        ledger = self.scenario.ledger
        ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[attr-defined]
        self.size = ledger.size()
        self.checkpoint = ledger.checkpoint()
        self.proof = ledger.prove(3, self.size)
        self.consistency = ledger.prove_consistency(3, self.size)
        self.old_root = ledger.checkpoint(3).root
        self.leaf = merkle.leaf_hash(ledger.get(3))
        ledger.close()
        self.file = (self.folder / "ledger.db").read_bytes()

    def snapshot(self, path: Path) -> Any:
        """Return the view of a reader and of all members' witnesses on a ledger file."""
        with open_ledger(f"sqlite:///{path}") as ledger:
            view = read_ledger(ledger)
            proofs = [ledger.prove(i, self.size) for i in range(self.size)]
            for member in self.scenario.members:
                copy = self.folder / f"copy-{member.public_key.hex()[:8]}"
                for suffix in ("", ".lines"):
                    source = self.scenario.witness_state_path(member)
                    shutil.copy(source.with_name(source.name + suffix), copy.with_name(copy.name + suffix))
                step = Witness(member, ledger, copy, clock=self.scenario.clock).run_once()
                if step.warnings or step.cosigned:
                    raise Unreadable(" ".join(step.warnings) or "co-signatures were missing")
            return view.entries, [(c.checkpoint, c.time) for c in view.confirmed], proofs

    def read_ledger_file(self, data: bytes) -> Any:
        path = self.folder / "flipped.db"
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.write_bytes(data)
        return self.snapshot(path)

    def read_note(self, data: bytes) -> Any:
        checkpoint, lines = checkpoints.parse_signed_note(data)
        members = [m.public_key for m in self.scenario.members]
        times = checkpoints.cosigner_times(checkpoint, lines, members)
        if len(times) < 3:
            raise Unreadable("a co-signature is invalid")
        return checkpoint, times

    def read_identity(self) -> Any:
        path = self.folder / "flipped.json"
        path.chmod(0o600)
        identity = Identity.load(path, None)
        opened = read_kit(str(self.kit), EncryptionSecret.from_kit_key(identity.kit_key)).opening
        return identity.public_key, opened.key()

    def read_kit_key(self) -> KeyOpening:
        return read_kit(str(self.kit), EncryptionSecret.from_kit_key(ALICE.kit_key)).opening

    def read_own_lines(self, data: bytes) -> Any:
        member = self.scenario.members[0]
        path = self.folder / "lines"
        path.with_name("lines.lines").write_bytes(data)
        with open_ledger(f"sqlite:///{self.folder}/ledger.db") as ledger:
            stored = ledger.cosignatures(self.checkpoint.origin)
            valid = {(checkpoint.size, line.to_line()) for checkpoint, line in stored}
        lines = {line for line in witness_state.load_own_lines(path) if line in valid}
        all_lines = set(witness_state.load_own_lines(self.scenario.witness_state_path(member)))
        if len(lines) < len(valid & all_lines):
            raise Unreadable("a line without a valid signature, which is therefore never stored")
        return lines

    def targets(self) -> dict[str, CorruptionTarget]:
        statements = {
            f"statement {statement.kind} {i}": sign_statement(statement, ALICE)
            for i, statement in enumerate(STATEMENTS)
        }
        return (
            {name: CorruptionTarget(data, open_statement, True) for name, data in statements.items()}
            | self._proof_targets()
            | self._owner_targets()
            | self._ledger_targets()
        )

    def _proof_targets(self) -> dict[str, CorruptionTarget]:
        inclusion = lambda d: merkle.verify_inclusion(  # noqa: E731
            self.leaf, 3, self.size, _hashes(d), self.checkpoint.root
        )
        consistent = lambda d: merkle.verify_consistency(  # noqa: E731
            3, self.old_root, self.size, self.checkpoint.root, _hashes(d)
        )
        return {
            "checkpoint": CorruptionTarget(self.note, self.read_note, True),
            "inclusion proof": CorruptionTarget(b"".join(self.proof), _proof_reader(inclusion), True),
            "consistency proof": CorruptionTarget(
                b"".join(self.consistency), _proof_reader(consistent), True
            ),
        }

    def _owner_targets(self) -> dict[str, CorruptionTarget]:
        folder, archive = self.folder, self.scenario.archive
        sealed, kit_manifest = self.kit / "kit.sealed", self.kit / "manifest.json"
        model, manifest = self.model_folder / "model.safetensors", self.model_folder / "manifest.json"
        blob = folder / "archive" / "blobs" / self.claim.suspect.hex()
        read_model = lambda: read_model_bytes(str(self.model_folder))  # noqa: E731
        (folder / "flipped.json").write_bytes(b"")
        return {
            "key opening": CorruptionTarget(
                keyed_opening(BOB).to_json().encode(), lambda d: KeyOpening.from_json(d).key()
            ),
            "identity file": CorruptionTarget(
                (folder / "alice.json").read_bytes(), via_file(folder / "flipped.json", self.read_identity)
            ),
            "kit": CorruptionTarget(sealed.read_bytes(), via_file(sealed, self.read_kit_key), True),
            "kit's manifest": CorruptionTarget(
                kit_manifest.read_bytes(), via_file(kit_manifest, self.read_kit_key), True
            ),
            "model": CorruptionTarget(self.model, via_file(model, read_model), True),
            "model's manifest": CorruptionTarget(manifest.read_bytes(), via_file(manifest, read_model)),
            "archived model": CorruptionTarget(
                blob.read_bytes(), via_file(blob, lambda: archive.get(self.claim.suspect, 10**6)), True
            ),
        }

    def _ledger_targets(self) -> dict[str, CorruptionTarget]:
        folder, member = self.folder, self.scenario.members[0]
        bundle, store_id = folder / "flipped.zip", f"sqlite:///{folder}/pinned.db"
        state, copy = self.scenario.witness_state_path(member), folder / "state.json"
        state.parent.mkdir(exist_ok=True)
        pin = witness_state.pin_path(member, store_id)
        pin.parent.mkdir(parents=True, exist_ok=True)
        witness_state.pin_origin(member, store_id, self.checkpoint.origin)
        return {
            "ledger file": CorruptionTarget(self.file, self.read_ledger_file),
            "bundle": CorruptionTarget(
                (folder / "claim.zip").read_bytes(),
                via_file(bundle, lambda: to_json(check_bundle(bundle, SubstringJudge(), pinned=self.note))),
            ),
            "witness state": CorruptionTarget(
                state.read_bytes(), via_file(copy, lambda: _read_witness_state(member, copy))
            ),
            "witness lines": CorruptionTarget(
                state.with_name(state.name + ".lines").read_bytes(), self.read_own_lines
            ),
            "pin": CorruptionTarget(
                pin.read_bytes(), via_file(pin, lambda: witness_state.pinned_origin(member, store_id))
            ),
        }


def _read_witness_state(member: Identity, path: Path) -> Any:
    state = witness_state.load(member, path)
    assert state is not None
    return state.origin, state.tree.size, state.tree.hashes, state.time


def _hashes(data: bytes) -> list[bytes]:
    return [data[start : start + 32] for start in range(0, len(data), 32)]


def _proof_reader(is_valid: Callable[[bytes], bool]) -> Reader:
    def read(data: bytes) -> Any:
        if not is_valid(data):
            raise Unreadable("the proof is invalid")
        return data

    return read


@pytest.fixture
def artifacts(tmp_path: Path) -> StoredArtifacts:
    return StoredArtifacts(tmp_path)


def flip_bits(artifacts: StoredArtifacts, budget: Callable[[str], int], rng: random.Random) -> Counter[str]:
    """Flip up to `budget(target)` bits of every target, one at a time, and count the outcomes."""
    total: Counter[str] = Counter()
    for name, target in artifacts.targets().items():
        expected, bits = target.read(target.data), 8 * len(target.data)
        count: Counter[str] = Counter()
        for bit in rng.sample(range(bits), min(budget(name), bits)):
            try:
                actual = target.read(flip_bit(target.data, bit))
            except MTLSignError:
                count["detected"] += 1
                continue
            assert actual == expected, f"{name}: bit {bit} changes the content and is not detected"
            assert not target.every_bit_matters, f"{name}: bit {bit} is not detected"
            count["without effect"] += 1
        assert target.read(target.data) == expected
        print(f"{name}: {dict(count)} of {bits}")
        total += count
    return total


def test_flipped_bits_of_stored_artifacts_are_detected(artifacts: StoredArtifacts) -> None:
    budgets = {"ledger file": 150, "bundle": 250}
    total = flip_bits(artifacts, lambda name: budgets.get(name, 120), random.Random(5))
    print(total)
    assert total.total() >= 2000 and total["detected"] >= 1900


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_flipped_bits_of_stored_artifacts_are_detected(artifacts: StoredArtifacts) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    budgets = {"ledger file": 2000, "bundle": 3000}
    total = flip_bits(artifacts, lambda name: budgets.get(name, 2000), random.Random(seed))
    print(total)
    assert total.total() >= 20_000


COLUMNS = {
    "entries": ("idx", "leaf", "envelope"),
    "nodes": ("level", "idx", "hash"),
    "cosignatures": ("size", "root", "line"),
}


def flip_field(path: Path, rng: random.Random) -> str | None:
    """Flip one bit of a random field by SQL. Return the change, or None if the store refuses it."""
    table = rng.choice(list(COLUMNS))
    column = rng.choice(COLUMNS[table])
    with closing(sqlite3.connect(path)) as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        key = COLUMNS[table][: 3 if table == "cosignatures" else 2]
        rows = db.execute(f"SELECT {', '.join(key)}, {column} FROM {table}").fetchall()
        *row_key, value = rng.choice(rows)
        flipped: object
        if isinstance(value, int):
            flipped = value ^ 1 << rng.randrange(62)
        else:
            data = value.encode() if isinstance(value, str) else value
            flipped = flip_bit(data, rng.randrange(8 * len(data)))
        cast = "CAST(? AS TEXT)" if isinstance(value, str) else "?"
        condition = " AND ".join(f"{name} = ?" for name in key)
        try:
            db.execute(f"UPDATE {table} SET {column} = {cast} WHERE {condition}", (flipped, *row_key))
            db.commit()
        except sqlite3.IntegrityError:
            return None
    return f"{table}.{column}: {value!r} -> {flipped!r}"


@pytest.mark.parametrize("count", [120, pytest.param(4000, marks=pytest.mark.slow)])
def test_flipped_bits_of_table_rows_are_detected(artifacts: StoredArtifacts, count: int) -> None:
    """The owner of the file changes one bit of one field of one row by SQL."""
    rng, path, tally = random.Random(count), artifacts.folder / "rows.db", Counter[str]()
    path.write_bytes(artifacts.file)
    expected = artifacts.snapshot(path)
    for _ in range(count):
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.write_bytes(artifacts.file)
        change = flip_field(path, rng)
        if change is None:
            tally["refused by the store"] += 1
            continue
        try:
            actual = artifacts.snapshot(path)
        except MTLSignError:
            tally[f"detected in {change.partition('.')[0]}"] += 1
            continue
        assert actual == expected, f"{change} is not detected"
        tally["without effect"] += 1
    print(dict(tally))
    assert tally["without effect"] == 0


def test_read_note_with_missing_line_is_unreadable(artifacts: StoredArtifacts) -> None:
    """Precondition of `read_note`: a note with all three lines is readable, one with fewer lines is not."""
    checkpoint, times = artifacts.read_note(artifacts.note)
    assert checkpoint == artifacts.checkpoint and len(times) == 3
    lines = checkpoints.parse_signed_note(artifacts.note)[1]
    with pytest.raises(Unreadable):
        artifacts.read_note(checkpoints.encode_signed_note(checkpoint, lines[:1]))
    assert Checkpoint(checkpoint.origin, checkpoint.size, checkpoint.root) == checkpoint
