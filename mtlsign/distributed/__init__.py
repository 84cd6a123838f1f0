"""Backends on Ray: embedding, attacks, sweeps and the verification service. Nothing else imports Ray."""
