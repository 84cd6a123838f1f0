"""Verify a file of claims: `python jobs/verify_batch.py --claims claims.jsonl`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.service import verify_batch as main

if __name__ == "__main__":
    main.run()
