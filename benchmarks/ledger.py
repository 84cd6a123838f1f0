"""Benchmark of a ledger: `uv run benchmarks/ledger.py [--etcd] [--sizes 100,10000,1000000] [--json]`.

- publish/s: statements that one client signs and appends durably.
- verify/s: envelopes that are opened, with all signatures and fields checked.
- For each size: length of an inclusion proof, and the medians of `prove` and `verify_inclusion` over random
  entries. Large SQLite ledgers are filled in bulk with rows of 100 bytes, whose content proofs do not read.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.sqlite import SqliteLedger
from mtlsign.claims.statements.parsing import open_statement, sign_statement
from mtlsign.claims.statements.types import Publish
from mtlsign.watermark.keys.identity import Identity


def publishes(identity: Identity) -> Iterator[bytes]:
    """Yield signed publications, each with another model."""
    for number in range(2**31):
        h = number.to_bytes(32, "big")
        yield sign_statement(
            Publish(
                signer=identity.public_key, ledger=bytes(32), time=int(time.time()), nonce=h, keys_root=h,
                keys_count=1, heads=h, model=h, licence="CC-BY-4.0",
            ),
            identity,
        )  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def speed(ledger: Ledger, count: int) -> dict[str, float]:
    """Measure publish/s with signing, and verify/s of the written entries."""
    source = publishes(Identity.generate())
    begin = time.perf_counter()
    for envelope in islice(source, count):
        ledger.append(envelope)
    middle = time.perf_counter()
    rows = list(ledger.scan(0, count))
    checked = timed(lambda: [open_statement(row) for row in rows])
    return {
        "publish_per_s": count / (middle - begin),
        "verify_per_s": count / checked,
        "entry_bytes": len(rows[0]),
    }


def proofs(ledger: Ledger, size: int, samples: int) -> dict[str, Any]:
    """Measure inclusion proofs, and the length of a consistency proof from half of the tree.

    Args:
        ledger: the ledger, with at least `size` entries.
        size: size of the tree.
        samples: number of random entries.
    """
    root, spent, checks, lengths = ledger.checkpoint(size).root, [], [], []
    for _ in range(samples):
        index = random.randrange(size)
        leaf = merkle.leaf_hash(ledger.get(index))
        begin = time.perf_counter()
        path = ledger.prove(index, size)
        spent.append(time.perf_counter() - begin)
        checks.append(timed(lambda: merkle.verify_inclusion(leaf, index, size, path, root)))  # noqa: B023
        assert merkle.verify_inclusion(leaf, index, size, path, root)
        lengths.append(len(path))
    return {
        "size": size,
        "hashes": max(lengths),
        "bytes": 32 * max(lengths),
        "prove_ms": 1000 * statistics.median(spent),
        "verify_us": 1e6 * statistics.median(checks),
        "consistency_hashes": len(ledger.prove_consistency(size // 2 + 1, size)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--etcd", action="store_true", help="three etcd nodes over mutual TLS instead of SQLite"
    )
    parser.add_argument("--sizes", default=None, help="sizes of the trees [100,…,1000000; etcd: 100,…,10000]")
    parser.add_argument("--publishes", type=int, default=300)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = [
        int(s)
        for s in (
            options.sizes or ("100,1000,10000" if options.etcd else "100,1000,10000,100000,1000000")
        ).split(",")
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mtlsign-ledger-")))
        if options.etcd:
            from mtlsign.claims.ledger.etcd import open_etcd
            from tests.helpers import etcd_cluster

            cluster = stack.enter_context(etcd_cluster.running(folder))
            ledger: Ledger = open_etcd(cluster.uri("/bench"), cluster.tls)
        else:
            ledger = open_ledger(f"sqlite:///{folder}/ledger.db", create=True)
        result: dict[str, Any] = {"backend": "etcd" if options.etcd else "sqlite"} | speed(
            ledger, options.publishes
        )
        result["proofs"] = []
        for size in sizes:
            rows = (b"%-100d" % i for i in range(ledger.size(), size))
            if isinstance(ledger, SqliteLedger):
                while chunk := list(islice(rows, 50_000)):
                    ledger.append_many(chunk)
            else:
                for row in rows:
                    ledger.append(row)
            result["proofs"].append(proofs(ledger, size, options.samples))
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['backend']}: {result['publish_per_s']:.0f} publishes/s", end=", ")
    print(f"{result['verify_per_s']:.0f} verified/s, {result['entry_bytes']} bytes an entry")
    for row in result["proofs"]:
        print(
            "  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        )


if __name__ == "__main__":
    main()
