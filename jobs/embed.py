"""Mark a network: `python jobs/embed.py [--task digits] [--storage s3://…] …`, also by `ray job submit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # own tasks and models are found from where the job was started
    sys.path[:0] = [str(Path.cwd()), str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings
from mtlsign.reports import console
from mtlsign.reports.embedding_console import EmbedLine, summary


def main(argv: Sequence[str]) -> None:
    """Settings → one call → result.json."""
    settings = cli.parse(EmbedSettings, argv, description=__doc__ or "")
    line = EmbedLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0:
        from mtlsign.watermark.embedding.pipeline import LocalEmbeddingBackend, run_embedding_job

        done = run_embedding_job(settings, LocalEmbeddingBackend(line.row), say=line.say)
    else:
        from mtlsign.distributed.train import embed_on_ray

        done = embed_on_ray(settings, show=line.row, say=line.say)
    line.end()
    if settings.json_output:
        console.print_json(done.result)
    else:
        print(summary(done.result, done.verdict.summary()))


if __name__ == "__main__":
    cli.run(main, resumes=True)
