"""Any flipped bit of anything that is stored is detected, or provably means nothing.

Each part is some bytes and a look at them, which raises or returns what they say. A flip must raise, or what
is said must be the same (a date inside the ZIP, an unused byte of a database page). The bits are drawn by a
fixed seed; `-m slow` draws many more, anew each time.
"""

from __future__ import annotations

import random
import secrets
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_statements import STATEMENTS

from mtlsign.claims import merkle, owner
from mtlsign.claims.blob_store import read_model_bytes
from mtlsign.claims.bundle import check_bundle, to_json, write_bundle
from mtlsign.claims.commands.owner import signed_note
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
from tests.unit.claims.scenario import ALICE, BOB, ByName, Town, keyed_opening, kit_of, person

Look = Callable[[bytes], Any]


@dataclass(frozen=True)
class Part:
    data: bytes
    look: Look
    always: bool = False
    """Nothing in it is without meaning: every flip raises."""


class Lost(MTLSignError):
    """Something that was there is not: that is a detection."""


def flip(data: bytes, bit: int) -> bytes:
    bad = bytearray(data)
    bad[bit // 8] ^= 1 << bit % 8
    return bytes(bad)


def in_file(path: Path, look: Callable[[], Any]) -> Look:
    def write(data: bytes) -> Any:
        path.write_bytes(data)
        return look()

    return write


class Scene:
    """A ledger with every kind of statement, its members' memories, a kit, a model folder and a bundle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.town = town = Town(folder, ["1", "2", "3"])
        kit, self.model = kit_of(ALICE)
        accused = town.owner(person("accused"))
        owner.register(accused, town.archive, [("base", b"clean")])
        owner.publish(town.owner(ALICE), [kit])
        town.attest()
        suspect = self.model + b" tuned"
        entry, self.claim = owner.claim(town.owner(ALICE), [kit], town.archive, suspect, marked=self.model)
        owner.exhibit(accused, town.archive, str(entry.index), b"clean")
        view = town.vote()
        write_bundle(folder / "claim.zip", town.ledger, view, entry, town.archive)
        self.note = signed_note(town.ledger, view)
        town.ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[attr-defined]
        self.size = town.ledger.size()
        self.head = town.ledger.head()
        self.proof = town.ledger.prove(3, self.size)
        self.consistency = town.ledger.prove_consistency(3, self.size)
        self.old_root = town.ledger.head(3).root
        self.leaf = merkle.leaf_hash(town.ledger.get(3))
        town.ledger.close()
        self.file = (folder / "ledger.db").read_bytes()
        self.place = open_storage(str(folder / "store"))
        self.kit = (
            folder
            / "store"
            / "kits"
            / write_kit(self.place, kit, EncryptionSecret.from_kit_key(ALICE.kit_key))
        )
        write_manifest_folder(
            self.place.child("models/m"), {"model.safetensors": self.model, "README.md": b"card"}
        )
        ALICE.save(folder / "alice.json", None)

    def picture(self, path: Path) -> Any:
        """What a reader and all members' witnesses see in a ledger's file."""
        with open_ledger(f"sqlite:///{path}") as ledger:
            view = read_ledger(ledger)
            proofs = [ledger.prove(i, self.size) for i in range(self.size)]
            for member in self.town.members:
                kept = self.folder / f"kept-{member.public_key.hex()[:8]}"
                for ending in ("", ".lines"):
                    source = self.town.memory(member)
                    shutil.copy(source.with_name(source.name + ending), kept.with_name(kept.name + ending))
                step = Witness(member, ledger, kept, clock=self.town.clock).step()
                if step.remarks or step.cosigned:
                    raise Lost(" ".join(step.remarks) or "co-signatures were gone")
            return view.entries, [(c.head, c.time) for c in view.heads], proofs

    def look_at_file(self, data: bytes) -> Any:
        path = self.folder / "flipped.db"
        for ending in ("-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        path.write_bytes(data)
        return self.picture(path)

    def look_at_head(self, data: bytes) -> Any:
        head, lines = checkpoints.parse_signed_note(data)
        times = checkpoints.cosigner_times(head, lines, [m.public_key for m in self.town.members])
        if len(times) < 3:
            raise Lost("a co-signature does not hold")
        return head, times

    def look_at_identity(self) -> Any:
        path = self.folder / "flipped.json"
        path.chmod(0o600)
        identity = Identity.load(path, None)
        opened = read_kit(str(self.kit), EncryptionSecret.from_kit_key(identity.kit_key)).opening
        return identity.public_key, opened.key()

    def look_at_lines(self, data: bytes) -> Any:
        member = self.town.members[0]
        path = self.folder / "lines"
        path.with_name("lines.lines").write_bytes(data)
        with open_ledger(f"sqlite:///{self.folder}/ledger.db") as ledger:
            good = {(head.size, line.line()) for head, line in ledger.cosignatures(self.head.origin)}
            found = witness_state.remembered_lines(path)
            held = {pair for pair in found if pair in good}
        if len(held) < len(good & set(witness_state.remembered_lines(self.town.memory(member)))):
            raise Lost("a line that no signature holds, and that is therefore never stored")
        return held

    def parts(self) -> dict[str, Part]:
        folder, town = self.folder, self.town
        member, path = town.members[0], town.memory(town.members[0])
        kit = lambda: read_kit(str(self.kit), EncryptionSecret.from_kit_key(ALICE.kit_key)).opening  # noqa: E731
        folder_bytes = lambda: read_model_bytes(str(folder / "store" / "models" / "m"))  # noqa: E731
        place = f"sqlite:///{folder}/pinned.db"
        path.parent.mkdir(exist_ok=True)
        pin, kept = witness_state.pin_path(member, place), folder / "memory.json"
        pin.parent.mkdir(parents=True, exist_ok=True)
        witness_state.pin_origin(member, place, self.head.origin)
        files = {name: self.kit / name for name in ("kit.sealed", "manifest.json")}
        model = folder / "store" / "models" / "m"
        blob = folder / "archive" / "blobs" / self.claim.suspect.hex()
        (folder / "flipped.json").write_bytes(b"")
        inclusion = lambda d: merkle.verify_inclusion(self.leaf, 3, self.size, _hashes(d), self.head.root)  # noqa: E731
        consistent = lambda d: merkle.verify_consistency(  # noqa: E731
            3, self.old_root, self.size, self.head.root, _hashes(d)
        )
        sealed = {
            f"statement {said.kind} {i}": sign_statement(said, ALICE) for i, said in enumerate(STATEMENTS)
        }
        return {name: Part(data, open_statement, always=True) for name, data in sealed.items()} | {
            "head": Part(self.note, self.look_at_head, always=True),
            "inclusion proof": Part(b"".join(self.proof), _holds(inclusion), always=True),
            "consistency proof": Part(b"".join(self.consistency), _holds(consistent), always=True),
            "key opening": Part(
                keyed_opening(BOB).to_json().encode(), lambda d: KeyOpening.from_json(d).key()
            ),
            "identity file": Part(
                (folder / "alice.json").read_bytes(),
                in_file(folder / "flipped.json", self.look_at_identity),
            ),
            "kit": Part(files["kit.sealed"].read_bytes(), in_file(files["kit.sealed"], kit), always=True),
            "kit's manifest": Part(
                files["manifest.json"].read_bytes(), in_file(files["manifest.json"], kit), always=True
            ),
            "model": Part(
                self.model, in_file(model / "model.safetensors", folder_bytes), always=True
            ),
            "model's manifest": Part(
                (model / "manifest.json").read_bytes(), in_file(model / "manifest.json", folder_bytes)
            ),
            "archived model": Part(
                blob.read_bytes(),
                in_file(blob, lambda: town.archive.get(self.claim.suspect, 10**6)),
                always=True,
            ),
            "ledger file": Part(self.file, self.look_at_file),
            "bundle": Part(
                (folder / "claim.zip").read_bytes(),
                in_file(
                    folder / "flipped.zip",
                    lambda: to_json(check_bundle(folder / "flipped.zip", ByName(), pinned=self.note)),
                ),
            ),
            "witness memory": Part(path.read_bytes(), in_file(kept, lambda: _memory(member, kept))),
            "witness lines": Part(path.with_name(path.name + ".lines").read_bytes(), self.look_at_lines),
            "pin": Part(pin.read_bytes(), in_file(pin, lambda: witness_state.pinned_origin(member, place))),
        }  # fmt: skip


def _memory(member: Identity, path: Path) -> Any:
    found = witness_state.load(member, path)
    assert found is not None
    return found.origin, found.tree.size, found.tree.hashes, found.time


def _hashes(data: bytes) -> list[bytes]:
    return [data[at : at + 32] for at in range(0, len(data), 32)]


def _holds(check: Callable[[bytes], bool]) -> Look:
    def look(data: bytes) -> Any:
        if not check(data):
            raise Lost("the proof does not hold")
        return data

    return look


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def try_flips(scene: Scene, budget: Callable[[str, Part], int], rng: random.Random) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, part in scene.parts().items():
        good, bits = part.look(part.data), 8 * len(part.data)
        count: Counter[str] = Counter()
        for bit in rng.sample(range(bits), min(budget(name, part), bits)):
            try:
                found = part.look(flip(part.data, bit))
            except MTLSignError:
                count["detected"] += 1
                continue
            assert found == good, f"{name}: bit {bit} changes what is read, unnoticed"
            assert not part.always, f"{name}: bit {bit} is not noticed"
            count["without meaning"] += 1
        assert part.look(part.data) == good
        print(f"{name}: {dict(count)} of {bits}")
        total += count
    return total


_FEW = {"ledger file": 150, "bundle": 250}


def test_flipped_bits(scene: Scene) -> None:
    total = try_flips(scene, lambda name, _: _FEW.get(name, 120), random.Random(5))
    print(total)
    assert total.total() >= 2000 and total["detected"] >= 1900


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_flipped_bits(scene: Scene) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    few = {"ledger file": 2000, "bundle": 3000}
    total = try_flips(scene, lambda name, _: few.get(name, 2000), random.Random(seed))
    print(total)
    assert total.total() >= 20_000


@pytest.mark.parametrize("count", [120, pytest.param(4000, marks=pytest.mark.slow)])
def test_flipped_bits_of_rows(scene: Scene, count: int) -> None:
    """Somebody who owns the file changes one bit of one field of one row, by SQL."""
    rng, path, tally = random.Random(count), scene.folder / "rows.db", Counter[str]()
    columns = {
        "entries": ("idx", "leaf", "envelope"), "nodes": ("level", "idx", "hash"),
        "cosignatures": ("size", "root", "line"),
    }  # fmt: skip
    path.write_bytes(scene.file)
    good = scene.picture(path)
    for _ in range(count):
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        path.write_bytes(scene.file)
        table = rng.choice(list(columns))
        column = rng.choice(columns[table])
        db = sqlite3.connect(path)
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        key = ", ".join(columns[table][: 3 if table == "cosignatures" else 2])
        rows = db.execute(f"SELECT {key}, {column} FROM {table}").fetchall()
        *where, value = rng.choice(rows)
        try:
            bad: object
            if isinstance(value, int):
                bad = value ^ 1 << rng.randrange(62)
            else:
                raw = value.encode() if isinstance(value, str) else value
                bad = flip(raw, rng.randrange(8 * len(raw)))
            cast = "CAST(? AS TEXT)" if isinstance(value, str) else "?"
            test = " AND ".join(f"{one.strip()} = ?" for one in key.split(","))
            db.execute(f"UPDATE {table} SET {column} = {cast} WHERE {test}", (bad, *where))
            db.commit()
        except sqlite3.IntegrityError:
            tally["refused by the store"] += 1
            continue
        finally:
            db.close()
        try:
            found = scene.picture(path)
        except MTLSignError:
            tally[f"detected in {table}"] += 1
            continue
        assert found == good, f"{table}.{column}: {value!r} → {bad!r} unnoticed"
        tally["without meaning"] += 1
    print(dict(tally))
    assert tally["without meaning"] == 0


def test_a_flipped_line_is_the_only_way_to_lose_one(scene: Scene) -> None:
    """What `look_at_head` takes for granted: a head with all three lines counts, with one it does not."""
    head, times = scene.look_at_head(scene.note)
    assert head == scene.head and len(times) == 3
    one = checkpoints.encode_signed_note(head, checkpoints.parse_signed_note(scene.note)[1][:1])
    with pytest.raises(Lost):
        scene.look_at_head(one)
    assert Checkpoint(head.origin, head.size, head.root) == head
