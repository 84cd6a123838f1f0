"""Ownership protocol: signed statements on an append-only ledger, votes of a council, and their evaluation.

An owner *publishes* a hiding commitment to keys, head and marked model before releasing the model (paper,
§3.3). When the owner finds a suspect model, the owner *registers* its digest and then opens one key in a
*claim*. Each council member verifies the claim independently and appends a *vote*. The *ledger* fixes the
order of all entries: it is an append-only Merkle tree. Its *checkpoints* are confirmed once a threshold of
the council has co-signed them. Pure functions compute each claim's *standing* and lineage from the ledger
and the findings.

Reading order: `statements`, `merkle`, `ledger`, `owner`, `judging`, `bundle`, `commands`. `docs/claims.md`
specifies the formats.
"""
