"""Owner identities, specifications, key openings and encryption at rest."""
