"""Command `mtlsign embed`."""

from __future__ import annotations

from mtlsign.config.cli import Output, job
from mtlsign.config.embed import EmbedSettings
from mtlsign.reports.embedding_console import EmbedLine, summary


@job(EmbedSettings)
def embed(settings: EmbedSettings) -> Output:
    """Embed a watermark into a network. Without flags: a small network on the digits of scikit-learn."""
    line = EmbedLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0:
        from mtlsign.watermark.embedding.pipeline import LocalEmbeddingBackend, run_embedding_job

        result = run_embedding_job(settings, LocalEmbeddingBackend(line.row), log=line.log)
    else:
        from mtlsign.distributed.train import embed_on_ray

        result = embed_on_ray(settings, on_progress=line.row, log=line.log)
    line.end()
    text = summary(result.result, result.verdict.summary())
    return Output(result.result, text, problem=result.result["problem"])
