"""Verification of claims in a child process with limits of memory, processor time and elapsed time.

A claim that exhausts the child ends the child and not the council. A child that ends before it has read the
model makes the claim inadmissible; afterwards the model is not verifiable. The next claim starts a new child.

The parent writes four frames for each claim to the child's standard input: a JSON object, reference, head and
model. A frame is 8 bytes of length, then the bytes. The child writes one JSON object per line.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from mtlsign.claims.judging.judge import Finding
from mtlsign.claims.statements.types import Claim
from mtlsign.errors import ClaimError

SECONDS = 1800.0
"""Elapsed time of one verification."""
CPU_SECONDS = 7200
"""Processor time of one verification, over all threads."""
MEMORY_BYTES = 16 * 2**30
"""Address space of the child in addition to that at its start."""
MAX_LINE = 2**20
_WORKER = "mtlsign.claims.judging.worker"


class IsolatedClaimVerifier:
    """Algorithm 1 in a child process, which is started at the first claim and used for later ones.

    Args:
        trusted_factory: architecture beyond the allow-list, from the operator's settings.
        seconds: limit of the elapsed time of one verification.
        cpu_seconds: limit of its processor time.
        memory_bytes: limit of the child's address space in addition to that at its start.

    Attributes:
        verdicts: complete verdict on each verified model, by its SHA-256.
    """

    def __init__(
        self,
        trusted_factory: str | None = None,
        *,
        seconds: float = SECONDS,
        cpu_seconds: int = CPU_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._arguments = [trusted_factory or "", str(cpu_seconds), str(memory_bytes)]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.verdicts: dict[str, dict[str, Any]] = {}

    def judge(  # noqa: D102
        self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int
    ) -> Finding:
        process = self._running_process()
        is_late = threading.Event()

        def end_late_process() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(self._seconds, end_late_process)
        timer.daemon = True
        timer.start()
        status = "inadmissible"
        try:
            request = {"opening": claim.opening.to_json(), "bits": bits, "has_head": head is not None}
            _send(process, json.dumps(request).encode(), reference, head or b"", model)
            reply = _receive(process)
            if reply == {"phase": "model"}:
                status = "not_verifiable"
                reply = _receive(process)
            finding = Finding(**reply["finding"])
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return Finding(status, reason=self._end_of_process(is_late.is_set()))
        finally:
            timer.cancel()
        self.verdicts |= reply["verdicts"]
        return finding

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            self._process = None

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        path = os.pathsep.join(folder for folder in sys.path if folder)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER, *self._arguments],  # not from the working directory
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            ready = _receive(self._process)
        except (OSError, EOFError, ValueError):
            ready = {}
        if ready != {"phase": "ready"}:
            self.close()
            raise ClaimError(
                "The process that verifies claims does not start. Check --trusted-factory and the memory of "
                "this machine.",
                field="trusted-factory",
            )
        return self._process

    def _end_of_process(self, is_late: bool) -> str:
        """End the child and return the reason for display."""
        self.close()
        if is_late:
            return f"the verification took over {self._seconds:g} s"
        return "the verification exceeded its limit of memory or processor time"


def _send(process: subprocess.Popen[bytes], *frames: bytes) -> None:
    assert process.stdin is not None
    for frame in frames:
        process.stdin.write(struct.pack(">Q", len(frame)))
        process.stdin.write(frame)
    process.stdin.flush()


def _receive(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline(MAX_LINE)
    if not line.endswith(b"\n"):
        raise EOFError
    reply = json.loads(line)
    if not isinstance(reply, dict):
        raise ValueError("the reply is not an object")
    return reply
