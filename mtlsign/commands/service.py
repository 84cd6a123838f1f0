"""Commands of the verification service: `mtlsign serve` and `mtlsign verify-batch`."""

from __future__ import annotations

import signal
import sys
import time

from mtlsign.config.cli import Output, job
from mtlsign.config.service import BatchSettings, ServiceSettings


@job(ServiceSettings)
def serve(settings: ServiceSettings) -> None:
    """Start the verification service and run it until Ctrl-C or SIGTERM.

    `python -m mtlsign.service token NAME --scopes verify,ledger` creates a token for a client.
    """
    from mtlsign.distributed import serve as service

    service.start(settings)
    scheme = "https" if settings.tls_cert else "http"
    state = settings.state_dir.absolute()
    print(f"{scheme}://{settings.host}:{settings.port}/ answers; state folder: {state}", flush=True)
    # After the start of Ray, which installs its own handler: service managers stop a process with SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr, flush=True)
    finally:
        service.stop()


@job(BatchSettings)
def verify_batch(settings: BatchSettings) -> Output:
    """Verify a file of claims with replicas that live as long as the job.

    Each line of the input is one claim, {"model": LOCATION, "bundle": {…} or LOCATION}. Each line of the
    output is its verdict or problem, in the same order, with the signed verdict. Results are written as they
    come, to `results.jsonl.part`, which is renamed when all are complete.
    """
    from mtlsign.service.batch.jsonl import ResultWriter, read_claims

    claims = read_claims(settings.claims)
    from mtlsign.distributed import serve as service

    with ResultWriter(settings.output) as results:
        service.batch(settings, claims, results.add)
    document = {**results.tally, "out": str(settings.output)}
    counts = ", ".join(f"{count} {name}" for name, count in results.tally.items())
    return Output(document, "" if settings.quiet else f"{counts} → {settings.output}")
