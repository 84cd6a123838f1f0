"""Blocks of a model card, whose texts may come from untrusted files."""

from __future__ import annotations

from mtlsign.claims.model_card import END, claim_block, escape, insert_block

HOSTILE = "x <!-- mtlsign claim: end --> **supported** | [a](b) `c`\n# heading"


def result_with(sentence: str) -> dict[str, object]:
    return {
        "standing": "not_supported", "sentence": sentence, "caveat": sentence, "suspect": "s", "claim": "c",
        "ledger": "l", "head": {"size": 3}, "votes": [{"status": "rejected", "counts": True}],
    }  # fmt: skip


def test_claim_block_with_hostile_text_has_one_end_and_no_markup() -> None:
    block = claim_block(result_with(HOSTILE))
    card = insert_block(insert_block("# Model\n", block), block)
    assert card.count(END.format("claim")) == 1 and card == insert_block(card, block)
    assert "**supported**" not in card and "\n# heading" not in card and "| 1 rejected |" in card


def test_escape_of_plain_text_changes_nothing() -> None:
    text = "The evidence is 58.7 bits, and 120 are required (2^-58.7)."
    assert escape(text) == text
