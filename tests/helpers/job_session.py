"""One process that runs jobs one after the other: it imports torch and Ray once, and starts one cluster.

This module is the program of that process and its client. Each line of standard input is a JSON object with
`job`, `argv`, and the paths `out` and `err` for the output of that job. The program prints its exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtlsign.config import cli

if TYPE_CHECKING:
    from tests.helpers.job_harness import Job

JOBS = Path(__file__).resolve().parents[2] / "jobs"


@dataclass(frozen=True)
class SessionOutput:
    """Exit code and output of one job of a session."""

    code: int
    stdout: Path
    stderr: Path

    @property
    def out(self) -> str:
        return self.stdout.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.read_text(errors="replace")


class JobSession:
    """Client of the process. Jobs on Ray share one cluster, which ends with the process."""

    def __init__(self, process: Job) -> None:
        self._process = process
        self._count = 0

    def run(self, job: str, *argv: str, code: int | None = 0) -> SessionOutput:
        """Run a job, check its exit code, and return its output."""
        folder = self._process.stdout.parent
        stdout, stderr = folder / f"out{self._count}", folder / f"err{self._count}"
        request = {"job": job, "argv": argv, "out": str(stdout), "err": str(stderr)}
        assert self._process.process.stdin is not None
        self._process.process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.process.stdin.flush()
        self._count += 1
        try:
            answers = self._process.until(
                lambda: lines if len(lines := self._process.out.split("\n")) > self._count else None
            )
        except AssertionError as error:
            ended = f"exit code of the process: {self._process.process.poll()}"
            raise AssertionError(f"{error}\n{ended}\n{stderr.read_text(errors='replace')}") from None
        output = SessionOutput(int(answers[self._count - 1]), stdout, stderr)
        assert code is None or output.code == code, f"exit code {output.code}\n{output.out}\n{output.err}"
        return output

    def end(self) -> None:
        """End the process and its cluster."""
        self._process.process_tree()
        assert self._process.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.process.wait(30)
        self._process.end()


def run_job(job: str, argv: list[str]) -> int:
    """Run a job and return its exit code."""
    main = runpy.run_path(str(JOBS / f"{job}.py"))["main"]
    try:
        cli.run(main, argv)
    except SystemExit as ended:
        return int(str(ended.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def serve_requests() -> None:
    """Run the jobs that standard input names, with the output of each in files."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        for descriptor, name in ((1, "out"), (2, "err")):
            with open(request[name], "wb") as file:
                os.dup2(file.fileno(), descriptor)
        print(run_job(request["job"], request["argv"]), file=answers, flush=True)


if __name__ == "__main__":
    serve_requests()
