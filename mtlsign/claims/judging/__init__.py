"""From a claim to its standing: admissibility, verification, votes, lineage."""
