"""A claim in one file: what it proves, and every way in which it may lie."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims import bundle, owner
from mtlsign.claims.bundle import check_bundle, to_json, write_bundle
from mtlsign.claims.commands.owner import signed_note
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.model_card import claim_block, insert_block, provenance_block
from mtlsign.errors import ClaimError
from tests.unit.claims.scenario import ALICE, ByName, Town, kit_of

Made = tuple[Path, bytes, Town, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(bundle, pinned head, town, JSON of the good one)."""
    folder = tmp_path_factory.mktemp("bundle")
    town = Town(folder, ["1", "2", "3"])
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    town.attest()
    entry, _ = owner.claim(town.owner(ALICE), [kit], town.archive, model + b" tuned", marked=model)
    with pytest.raises(ClaimError, match="not yet under a head"):
        write_bundle(folder / "early.zip", town.ledger, town.view(), entry, town.archive)
    view = town.vote()
    path = folder / "claim.zip"
    write_bundle(path, town.ledger, view, entry, town.archive)
    note = signed_note(town.ledger, view)
    return path, note, town, to_json(check_bundle(path, ByName(), pinned=note))


def test_it_proves_the_claim(made: Made) -> None:
    path, note, town, done = made
    assert (
        done["standing"] == "in_the_weights"
        and done["head"]["pinned"]
        and done["numbers"]["votes"] == {"accepted": 3}
    )
    checked = check_bundle(path, ByName(), pinned=note)
    view = town.view()
    for index in checked.view.entries:
        assert checked.view.time(index) == view.time(index)
    assert not to_json(check_bundle(path, ByName()))["head"]["pinned"]
    card = insert_block("# Model\n", claim_block(done))
    assert "in_the_weights" in card and insert_block(card, claim_block(done)) == card
    head = {"origin": "o", "size": 4, "root": "r", "cosigned": ["m"]}
    block = provenance_block({"model_digest": "d", "index": 1, "id": "i", "head": head})
    both = insert_block(card, block)  # a release and a claim stand beside each other
    assert (
        card in both
        and insert_block(insert_block(both, claim_block(done)), block) == both
        and "entry 1" in both
    )


def test_an_older_pinned_head_will_do_if_the_bundle_extends_it(made: Made) -> None:
    path, _, town, _ = made
    view = town.view()
    older = next(c for c in view.heads if c.head.size == 4)
    lines = [line for at, line in town.ledger.cosignatures(view.origin) if at == older.head]
    assert (
        check_bundle(path, ByName(), pinned=checkpoints.encode_signed_note(older.head, lines)).head.size == 4
    )
    early = view.heads[0]
    lines = [line for at, line in town.ledger.cosignatures(view.origin) if at == early.head]
    with pytest.raises(ClaimError, match=r"pin a newer one|proves nothing"):
        check_bundle(path, ByName(), pinned=checkpoints.encode_signed_note(early.head, lines))


def test_another_ledger_or_a_fork_is_refused(made: Made, tmp_path: Path) -> None:
    path, note, _, _ = made
    other = Town(tmp_path, ["1", "2"])
    with pytest.raises(ClaimError, match="another ledger"):
        check_bundle(path, ByName(), pinned=signed_note(other.ledger, other.attest()))
    head, lines = checkpoints.parse_signed_note(note)
    forked = checkpoints.Checkpoint(head.origin, head.size, bytes(32))
    with pytest.raises(ClaimError, match="forked"):
        check_bundle(path, ByName(), pinned=checkpoints.encode_signed_note(forked, lines))
    longer = checkpoints.Checkpoint(head.origin, head.size + 1, bytes(32))
    with pytest.raises(ClaimError, match="proves nothing"):
        check_bundle(path, ByName(), pinned=checkpoints.encode_signed_note(longer, lines))


def members(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as file:
        return [(info.filename, file.read(info)) for info in file.infolist()]


def pack(files: list[tuple[str, bytes]], **info: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", info.pop("method", zipfile.ZIP_STORED)) as file:
        file.comment = info.pop("comment", b"")
        for name, data in files:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = file.compression
            for field, value in info.items():
                setattr(entry, field, value)
            file.writestr(entry, data)
    return out.getvalue()


def without(name: str) -> Callable[[list[tuple[str, bytes]]], bytes]:
    return lambda files: pack([f for f in files if f[0] != name])


def swapped(name: str, data: bytes) -> Callable[[list[tuple[str, bytes]]], bytes]:
    return lambda files: pack([(n, data if n == name else d) for n, d in files])


def strip_lines(files: list[tuple[str, bytes]]) -> bytes:
    notes = {n for n, _ in files if n == "head" or (n.startswith("heads/") and not n.endswith(".proof"))}
    return pack([(n, d.partition(b"\n\n")[0] + b"\n\n" if n in notes else d) for n, d in files])


HOSTILE: dict[str, Callable[[list[tuple[str, bytes]]], bytes]] = {
    "duplicate member": lambda f: pack([*f, ("bundle.json", b'{"format":"mtlsign/bundle/v0","claim":0}')]),
    "duplicate blob": lambda f: pack([*f, next(x for x in f if x[0].startswith("blobs/"))]),
    "foreign member": lambda f: pack([*f, ("../evil", b"x")]),
    "absolute member": lambda f: pack([*f, ("/etc/passwd", b"x")]),
    "folder": lambda f: pack([*f, ("entries/", b"")]),
    "leading zero": lambda f: pack([*f, ("entries/00", b"x")]),
    "Unicode digit": lambda f: pack([*f, ("entries/\u0661", b"x")]),
    "name cut by a zero": lambda f: pack([*f, ("head\0x", b"x")]),
    "compressed": lambda f: pack(f, method=zipfile.ZIP_DEFLATED),
    "a bomb": lambda f: pack([("entries/0", bytes(2**22))], method=zipfile.ZIP_DEFLATED),
    "commented": lambda f: pack(f, comment=b"hello"),
    "extra field": lambda f: pack(f, extra=b"\x01\x00\x00\x00"),
    "prefixed": lambda f: b"#!/bin/sh\n" + pack(f),
    "too large an entry": swapped("entries/0", bytes(70_000)),
    "odd path": swapped("entries/1.path", b"odd"),
    "another path": swapped("entries/1.path", bytes(64)),
    "no founding": without("entries/0"),
    "no claim": without("entries/3"),
    "no head": without("head"),
    "no proof": without("heads/4.proof"),
    "no path": without("entries/0.path"),
    "no lines": strip_lines,
    "a float": swapped("bundle.json", b'{"format":"mtlsign/bundle/v0","claim":3.0}'),
    "twice a field": swapped("bundle.json", b'{"format":"mtlsign/bundle/v0","claim":1,"claim":3}'),
    "not a claim": swapped("bundle.json", b'{"format":"mtlsign/bundle/v0","claim":1}'),
    "empty": lambda _: pack([]),
    "text": lambda _: b"hello",
    "nothing": lambda _: b"",
    "cut short": lambda f: pack(f)[:-30],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bundles_are_refused(made: Made, tmp_path: Path, name: str) -> None:
    path, note, _, _ = made
    bad = tmp_path / "bad.zip"
    bad.write_bytes(HOSTILE[name](members(path)))
    with pytest.raises(ClaimError) as caught:
        done = check_bundle(bad, ByName(), pinned=note if name != "no lines" else None)
        raise AssertionError(to_json(done))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_or_swapped_model_is_an_answer_or_an_error(made: Made, tmp_path: Path) -> None:
    path, note, _, done = made
    files, suspect = members(path), f"blobs/{done['suspect']}"
    bad = tmp_path / "bad.zip"
    bad.write_bytes(without(suspect)(files))
    assert to_json(check_bundle(bad, ByName(), pinned=note))["standing"] == "not_verifiable"
    bad.write_bytes(swapped(suspect, b"another model")(files))
    with pytest.raises(ClaimError, match="other bytes"):
        check_bundle(bad, ByName(), pinned=note)


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    for place in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(ClaimError):
            check_bundle(place, ByName())
    assert bundle.FORMAT
