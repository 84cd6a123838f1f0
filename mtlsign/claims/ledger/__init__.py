"""The append-only ledger, its checkpoints and witnesses."""
