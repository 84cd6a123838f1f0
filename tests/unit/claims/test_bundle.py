"""Bundles: complete ones prove a claim offline, and manipulated ones are refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims import bundle, owner
from mtlsign.claims.bundle import check_bundle, write_bundle
from mtlsign.claims.bundle_result import to_json
from mtlsign.claims.commands.settings import signed_note
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.model_card import claim_block, insert_block, provenance_block
from mtlsign.errors import ClaimError
from tests.unit.claims.scenario import ALICE, ClaimScenario, SubstringJudge, kit_and_model

BundleFixture = tuple[Path, bytes, ClaimScenario, Any]


@pytest.fixture(scope="module")
def bundle_fixture(tmp_path_factory: pytest.TempPathFactory) -> BundleFixture:
    """Return bundle, pinned checkpoint, scenario, and JSON of the valid bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    scenario = ClaimScenario(folder, ["1", "2", "3"])
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    scenario.cosign_all()
    entry, _ = owner.claim(scenario.owner(ALICE), [kit], scenario.archive, model + b" tuned", own_model=model)
    with pytest.raises(ClaimError, match="not under a confirmed checkpoint"):
        write_bundle(folder / "early.zip", scenario.ledger, scenario.view(), entry, scenario.archive)
    view = scenario.run_council()
    path = folder / "claim.zip"
    write_bundle(path, scenario.ledger, view, entry, scenario.archive)
    note = signed_note(scenario.ledger, view)
    return path, note, scenario, to_json(check_bundle(path, SubstringJudge(), pinned=note))


def test_check_bundle_of_valid_bundle_proves_the_claim(bundle_fixture: BundleFixture) -> None:
    path, note, scenario, result = bundle_fixture
    assert (
        result["standing"] == "supported"
        and result["head"]["pinned"]
        and result["numbers"]["votes"] == {"accepted": 3}
    )
    checked = check_bundle(path, SubstringJudge(), pinned=note)
    view = scenario.view()
    for index in checked.view.entries:
        assert checked.view.time(index) == view.time(index)
    assert not to_json(check_bundle(path, SubstringJudge()))["head"]["pinned"]
    card = insert_block("# Model\n", claim_block(result))
    assert "supported" in card and insert_block(card, claim_block(result)) == card
    head = {"origin": "o", "size": 4, "root": "r", "cosigned": ["m"]}
    block = provenance_block({"model_digest": "d", "index": 1, "id": "i", "head": head})
    both = insert_block(card, block)  # a card can contain both blocks
    assert (
        card in both
        and insert_block(insert_block(both, claim_block(result)), block) == both
        and "entry 1" in both
    )


def test_check_bundle_with_older_pinned_checkpoint_needs_one_with_the_claim(
    bundle_fixture: BundleFixture,
) -> None:
    path, _, scenario, _ = bundle_fixture
    view = scenario.view()
    older = next(c for c in view.confirmed if c.checkpoint.size == 4)
    lines = [line for at, line in scenario.ledger.cosignatures(view.origin) if at == older.checkpoint]
    assert (
        check_bundle(
            path, SubstringJudge(), pinned=checkpoints.encode_signed_note(older.checkpoint, lines)
        ).checkpoint.size
        == 4
    )
    early = view.confirmed[0]
    lines = [line for at, line in scenario.ledger.cosignatures(view.origin) if at == early.checkpoint]
    with pytest.raises(ClaimError, match=r"does not contain the claim|proves nothing"):
        check_bundle(path, SubstringJudge(), pinned=checkpoints.encode_signed_note(early.checkpoint, lines))


def test_check_bundle_of_other_ledger_or_fork_is_refused(
    bundle_fixture: BundleFixture, tmp_path: Path
) -> None:
    path, note, _, _ = bundle_fixture
    other = ClaimScenario(tmp_path, ["1", "2"])
    with pytest.raises(ClaimError, match="another ledger"):
        check_bundle(path, SubstringJudge(), pinned=signed_note(other.ledger, other.cosign_all()))
    head, lines = checkpoints.parse_signed_note(note)
    forked = checkpoints.Checkpoint(head.origin, head.size, bytes(32))
    with pytest.raises(ClaimError, match="forked"):
        check_bundle(path, SubstringJudge(), pinned=checkpoints.encode_signed_note(forked, lines))
    longer = checkpoints.Checkpoint(head.origin, head.size + 1, bytes(32))
    with pytest.raises(ClaimError, match="proves nothing"):
        check_bundle(path, SubstringJudge(), pinned=checkpoints.encode_signed_note(longer, lines))


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
    "duplicate member": lambda f: pack([*f, ("bundle.json", b'{"format":"mtlsign/bundle/v1","claim":0}')]),
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
    "no entry 0": without("entries/0"),
    "no claim": without("entries/3"),
    "no head": without("head"),
    "no proof": without("heads/4.proof"),
    "no path": without("entries/0.path"),
    "no lines": strip_lines,
    "a float": swapped("bundle.json", b'{"format":"mtlsign/bundle/v1","claim":3.0}'),
    "twice a field": swapped("bundle.json", b'{"format":"mtlsign/bundle/v1","claim":1,"claim":3}'),
    "not a claim": swapped("bundle.json", b'{"format":"mtlsign/bundle/v1","claim":1}'),
    "empty": lambda _: pack([]),
    "text": lambda _: b"hello",
    "nothing": lambda _: b"",
    "cut short": lambda f: pack(f)[:-30],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_check_bundle_of_hostile_file_is_refused(
    bundle_fixture: BundleFixture, tmp_path: Path, name: str
) -> None:
    path, note, _, _ = bundle_fixture
    manipulated = tmp_path / "manipulated.zip"
    manipulated.write_bytes(HOSTILE[name](members(path)))
    with pytest.raises(ClaimError) as caught:
        result = check_bundle(manipulated, SubstringJudge(), pinned=note if name != "no lines" else None)
        raise AssertionError(to_json(result))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_check_bundle_without_model_is_not_verifiable_and_with_other_bytes_refused(
    bundle_fixture: BundleFixture, tmp_path: Path
) -> None:
    path, note, _, result = bundle_fixture
    files, suspect = members(path), f"blobs/{result['suspect']}"
    manipulated = tmp_path / "manipulated.zip"
    manipulated.write_bytes(without(suspect)(files))
    assert to_json(check_bundle(manipulated, SubstringJudge(), pinned=note))["standing"] == "not_verifiable"
    manipulated.write_bytes(swapped(suspect, b"another model")(files))
    with pytest.raises(ClaimError, match="other bytes"):
        check_bundle(manipulated, SubstringJudge(), pinned=note)


def test_check_bundle_of_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(ClaimError):
            check_bundle(path, SubstringJudge())
    assert bundle.FORMAT
