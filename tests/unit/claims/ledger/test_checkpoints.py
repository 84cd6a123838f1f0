"""Checkpoints and co-signatures, also against published C2SP examples."""

from __future__ import annotations

import base64

import pytest

from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.errors import ClaimError
from mtlsign.watermark.keys.opening import is_valid_signature
from tests.unit.claims.scenario import ALICE, BOB, make_identity

SPEC_LINE = (
    "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZ"
    "qhf5nNo0xUe+mbIUBkBIfZ+qnA=="
)


SPEC_BODY = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"


def test_parse_line_of_c2sp_example_returns_its_parts() -> None:
    line = checkpoints.parse_line(SPEC_LINE)
    assert (line.name, line.key_id.hex(), line.time) == ("witness.example.com/w1", "8d66cf3f", 1679315147)
    assert line.to_line() == SPEC_LINE and len(line.signature) == 64
    assert (
        checkpoints.signed_message(SPEC_BODY, line.time)
        == b"cosignature/v1\ntime 1679315147\n" + SPEC_BODY.encode()
    )


def test_key_id_and_signature_of_public_log_match() -> None:
    """Verifier key and checkpoint of type 0x01 from the tests of the transparency-dev witness project."""
    blob = base64.b64decode("AULaJMvTtDLHPUcUrjdDad9vDlh/PTfC2VV60JUtCfWT")
    assert checkpoints.key_id("monkeys", blob[1:], 0x01).hex() == "db4d9f7e"
    body = "monkeys\n5\n41smjBUiAU70EtKlT6lIOIYtRTYxYXsDB+XHfcvu/BE=\n"
    signature = base64.b64decode(
        "202fftzGl3LVoqjXfwCFZZXs8I+5G22+Ek2K0AOyBuSJ/8/CZawNF+6fNlTKOCd622pbzJNkkJFWuw9DbicZCkEx9AY="
    )
    assert signature[:4].hex() == "db4d9f7e" and is_valid_signature(blob[1:], signature[4:], body.encode())


def test_parse_signed_note_of_encoded_note_returns_checkpoint_and_lines() -> None:
    checkpoint = Checkpoint(bytes(range(32)), 20852163, bytes(range(32, 64)))
    lines = [checkpoints.cosign(who, checkpoint, 1_790_000_000 + i) for i, who in enumerate((ALICE, BOB))]
    note = checkpoints.encode_signed_note(checkpoint, lines)
    assert checkpoints.parse_signed_note(note) == (
        checkpoint,
        tuple(sorted(lines, key=lambda line: line.name)),
    )
    members = [ALICE.public_key, BOB.public_key]
    assert checkpoints.cosigner_times(checkpoint, lines, members) == {
        members[0]: 1_790_000_000,
        members[1]: 1_790_000_001,
    }
    assert checkpoints.cosigner_times(checkpoint, lines, [make_identity("x").public_key]) == {}
    assert checkpoints.median([5, 1, 3]) == 3 and checkpoints.median([1, 9]) == 9
    other = Checkpoint(checkpoint.origin, checkpoint.size + 1, checkpoint.root)
    for invalid in (lines * 2, [checkpoints.cosign(ALICE, other, 5)]):
        with pytest.raises(ClaimError, match="is invalid"):
            checkpoints.cosigner_times(checkpoint, invalid, members)
    copied = Cosignature(
        checkpoints.MEMBER + BOB.public_key.hex(), lines[0].key_id, lines[0].time, lines[0].signature
    )
    assert checkpoints.cosigner_times(checkpoint, [copied], members) == {}  # ALICE's line under BOB's name


@pytest.mark.parametrize(
    "note",
    [
        b"", b"\n\n", b"mtlsign/ledger/v1/00\n1\nAAAA\n\n", b"\xff\n\n", b"a\nb\nc\n\n" * 20_000,
        b"mtlsign/ledger/v1/" + b"0" * 64 + b"\n01\n" + base64.b64encode(bytes(32)) + b"\n\n",
        b"mtlsign/ledger/v1/" + b"A" * 64 + b"\n1\n" + base64.b64encode(bytes(32)) + b"\n\n",
        b"mtlsign/ledger/v1/" + b"0" * 64 + b"\n1\n" + base64.b64encode(bytes(32)) + b"\next\n\n",
        b"mtlsign/ledger/v1/" + b"0" * 64 + b"\n1\n" + base64.b64encode(bytes(32)) + b"\n\n\xe2\x80\x94\n",
        b"mtlsign/ledger/v1/" + b"0" * 64 + b"\n\xd9\xa1\n" + base64.b64encode(bytes(32)) + b"\n\n",
    ],
)  # fmt: skip
def test_parse_signed_note_of_invalid_note_is_refused(note: bytes) -> None:
    with pytest.raises(ClaimError):
        checkpoints.parse_signed_note(note)
