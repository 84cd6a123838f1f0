"""Claims that hold up before strangers: statements, a ledger, a council, and what follows from them.

An owner *publishes* a hiding commitment to keys, head and marked model before the model leaves (paper, §3.3).
Finding a suspect, the owner *registers* its digest, and only then opens one key in a *claim*. Each member of
a council checks the claim for itself and appends its *vote*. The *ledger* fixes the order of all this: it is
an append-only Merkle tree whose *heads* count once a threshold of the council has co-signed them. What the
ledger and the verdicts say together (`standing`, lineage) is computed by pure functions.

In reading order: `statements`, `envelope`, `merkle`, `heads`, `ledger`, `view`, `witness`, `owner`,
`council`, `lineage`, `bundle`. Written format: `docs/claims.md`.
"""
