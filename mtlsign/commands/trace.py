"""Command `mtlsign trace`."""

from __future__ import annotations

from mtlsign.config.cli import Output, job
from mtlsign.config.trace import TraceSettings


@job(TraceSettings)
def trace(settings: TraceSettings) -> Output:
    """Find the recipients from whose copies a model was made.

    That there is none is a result, not an error.
    """
    from mtlsign.watermark import tracing

    results = tracing.trace(settings)
    lines = [settings.model]
    for result in results:
        name = result.recipient or result.kit
        share = f"{result.verdict.matches:,} of {result.verdict.n:,} bits"
        state = "traced" if result.traced else "not traced"
        if result.verdict.status == "not_verifiable":
            share = result.verdict.reason or ""
        lines.append(f"  {name}: {state}; {share}, evidence {result.evidence_bits:.1f} bits")
    documents = [
        {
            "kit": result.kit,
            "recipient": result.recipient,
            "traced": result.traced,
            "evidence_bits": result.evidence_bits,
            "verdict": result.verdict.to_json(),
        }
        for result in results
    ]
    return Output(documents, "\n".join(lines))
