"""Child process of `isolated`: verifies one claim after the other within its limits."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from mtlsign.claims.judging.judge import DetectorClaimVerifier
from mtlsign.watermark.keys.opening import KeyOpening


def main(trusted_factory: str, cpu_seconds: str, memory_bytes: str) -> None:
    """Verify the claims of the standard input until it ends.

    Args:
        trusted_factory: path of a factory, or "".
        cpu_seconds: limit of the processor time of each claim.
        memory_bytes: limit of the address space in addition to that at the start.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print; only replies go to the parent
    judge = DetectorClaimVerifier(
        _factories(trusted_factory), on_claim_accepted=lambda: _reply(output, {"phase": "model"})
    )
    _limit_memory(int(memory_bytes))
    _reply(output, {"phase": "ready"})
    while (frame := _read_frame(sys.stdin.buffer)) is not None:
        request = json.loads(frame)
        reference, head, model = (_read_frame(sys.stdin.buffer) for _ in range(3))
        if reference is None or head is None or model is None:
            return
        _limit_cpu(int(cpu_seconds))
        judge.verdicts.clear()
        opening, head_bytes = KeyOpening.from_json(request["opening"]), head if request["has_head"] else None
        finding = judge.judge_opening(opening, reference, head_bytes, model, request["bits"])
        _reply(output, {"finding": asdict(finding), "verdicts": judge.verdicts})


def _factories(path: str) -> dict[str, object] | None:
    import torch  # loaded before the memory at the start is measured

    from mtlsign.models.factories import trusted_factories
    from mtlsign.watermark.verification import detector

    assert torch and detector
    return dict(trusted_factories(path)) or None


def _limit_memory(size: int) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():  # only Linux has it; the other limits still hold
        return
    pages = int(statm.read_text().split()[0])
    limit = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_cpu(seconds: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + 1 + seconds, hard))


def _read_frame(stream: BinaryIO) -> bytes | None:
    front = stream.read(8)
    if len(front) != 8:
        return None
    return stream.read(struct.unpack(">Q", front)[0])


def _reply(output: BinaryIO, fields: dict[str, Any]) -> None:
    output.write(json.dumps(fields).encode() + b"\n")
    output.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
