"""Commands of the verification service: `mtlsign serve` and `mtlsign verify-batch`."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Mapping

from mtlsign.config.cli import Output, job
from mtlsign.config.service import BatchSettings, ServiceSettings

#: Seconds between two looks at the workers that Ray has stopped.
LOOK_S = 15.0


@job(ServiceSettings)
def serve(settings: ServiceSettings) -> None:
    """Start the verification service and run it until Ctrl-C or SIGTERM.

    `python -m mtlsign.service token NAME --scopes verify,ledger` creates a token for a client.
    """
    from mtlsign.distributed import serve as service

    reserved = service.start(settings)
    scheme = "https" if settings.tls_cert else "http"
    state = settings.state_dir.absolute()
    print(f"{scheme}://{settings.host}:{settings.port}/ answers; state folder: {state}", flush=True)
    print(
        f"create a token: python -m mtlsign.service token NAME --state-dir {shlex.quote(str(state))}",
        flush=True,
    )
    # After the start of Ray, which installs its own handler: service managers stop a process with SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    reported = set(service.stopped_for_memory())
    try:
        while True:
            time.sleep(LOOK_S)
            _report_memory_loss(service.stopped_for_memory(), reported)
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr, flush=True)
    finally:
        service.stop()
        if reserved is not None:
            reserved.close()


def _report_memory_loss(stopped: Mapping[str, str], reported: set[str]) -> None:
    """Print a warning for workers that Ray's memory monitor stopped, once for each worker.

    Args:
        stopped: node address by id of all workers stopped so far.
        reported: ids of the reported workers; receives those of this call.
    """
    new = sorted(stopped.keys() - reported)
    reported.update(new)
    if new:
        nodes = ", ".join(sorted({stopped[name] for name in new}))
        warning = f"Ray stopped {len(new)} worker(s) because the memory of {nodes} is nearly full."
        fix = "Their claims are repeated. Lower --min-replicas or --memory-mb, or use a larger machine."
        print(f"warning: {warning} {fix}", file=sys.stderr, flush=True)


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
