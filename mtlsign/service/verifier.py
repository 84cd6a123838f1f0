"""What a verifying replica does: claims on one model in, one outcome for each out, in order.

An outcome is `{"verdict": …, "key": id}` or `{"problem": …}`. Models are kept by digest, so that claims on
the same model share one download, one digest and one load; a bad claim never touches its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mtlsign import backbone
from mtlsign.errors import MTLSignError
from mtlsign.service.bundles import OpenedClaim, read_bundle
from mtlsign.service.files import Library
from mtlsign.service.problems import Problem, of_error
from mtlsign.service.suspects import Suspect
from mtlsign.service.web import Resolver, Transport, system_resolver
from mtlsign.service.work import check_work, probe_of
from mtlsign.settings_service import MIB, ServiceSettings
from mtlsign.verification import Probe, Verdict, verify

Outcome = dict[str, Any]
log = logging.getLogger("mtlsign.service")
PROBES = 4


@dataclass(frozen=True)
class Question:
    """One claim: the bundle's bytes or the pointer to them. Never shown by `repr`."""

    bundle: bytes | None = field(default=None, repr=False)
    pointer: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Task:
    """Claims on one model: its pointer, the digest that it must have (or None), and the claims."""

    model: str
    sha256: str | None
    questions: tuple[Question, ...]


@dataclass
class Answer:
    """Outcomes in the order of the questions, and seconds by stage."""

    outcomes: list[Outcome]
    seconds: dict[str, float] = field(default_factory=dict)
    cached: bool = False


class Backend(Protocol):
    """Whoever answers tasks: this process, or replicas of Ray Serve."""

    async def verify(self, task: Task) -> Answer:
        """Answer one task. Raises `Lost` when the one who had it died, `Problem` when there is no room."""

    async def ready(self) -> bool:
        """Whether somebody is there to answer."""


class Lost(Exception):
    """Whoever had the task died or was too slow; it may be tried again."""


class Verifier:
    """One verifying process. Blocking; `answer` may be called from several threads, which compute in turn."""

    def __init__(
        self, s: ServiceSettings, *, resolver: Resolver = system_resolver, transport: Transport | None = None
    ) -> None:
        self.s = s
        self.library = Library(s, resolver=resolver, transport=transport)
        self.factories: Mapping[str, backbone.Factory] = (
            {s.factory: backbone.load_factory(s.factory)} if s.factory else {}
        )
        self.device = "cuda" if s.gpus and torch.cuda.is_available() else "cpu"
        self._suspects: OrderedDict[str, Suspect] = OrderedDict()
        self._probes: OrderedDict[str, Probe] = OrderedDict()
        self._checked: OrderedDict[tuple[Any, ...], float] = OrderedDict()
        self._compute = threading.Lock()
        self.busy_since: float | None = None

    def answer(self, task: Task) -> Answer:
        """Answer every claim of a task; whatever is wrong with one of them is its own problem."""
        seconds: dict[str, float] = dict.fromkeys(("fetch", "load", "prepare", "forward"), 0.0)
        start = time.perf_counter()
        before = self.library.downloads
        try:
            digest, path = self.library.model(task.model)
            if task.sha256 is not None and digest != task.sha256:
                raise Problem("wrong-digest", f"the pointer leads to {digest}")
        except Problem as problem:
            return Answer([{"problem": problem.document()} for _ in task.questions], seconds)
        seconds["fetch"] = time.perf_counter() - start
        with self._compute:
            start = time.perf_counter()
            try:
                suspect = self._suspect(digest, path)
            except (Problem, OSError) as error:
                lost = Problem("unreachable", "the cache lost the model; try again")
                told = error if isinstance(error, Problem) else lost
                return Answer([{"problem": told.document()} for _ in task.questions], seconds)
            seconds["load"] = time.perf_counter() - start
            outcomes = []
            for question in task.questions:
                self.busy_since = time.monotonic()
                try:
                    outcomes.append(self._one(question, suspect, seconds))
                finally:
                    self.busy_since = None
            self._forget()
        return Answer(outcomes, seconds, cached=self.library.downloads == before)

    def _suspect(self, digest: str, path: Any) -> Suspect:
        found = self._suspects.pop(digest, None) or Suspect(path, digest, max_tensors=self.s.max_tensors)
        self._suspects[digest] = found
        return found

    def _forget(self) -> None:
        while len(self._suspects) > 1 and (
            len(self._suspects) > self.s.cache_models
            or sum(one.kept_bytes for one in self._suspects.values()) > self.s.cache_tensors_mb * MIB
        ):
            self._suspects.popitem(last=False)

    def _one(self, question: Question, suspect: Suspect, seconds: dict[str, float]) -> Outcome:
        start = time.perf_counter()
        try:
            data = (
                question.bundle
                if question.bundle is not None
                else self.library.bundle(question.pointer or "")
            )
            opened = read_bundle(data)
            probe = self._probe(opened)
            seconds["prepare"] += time.perf_counter() - start
            start = time.perf_counter()
            verdict = verify(
                suspect, probe, bits=self.s.bits, gamma=self.s.gamma, controls=self.s.controls,
                model_digest=suspect.digest,
            )  # fmt: skip
            seconds["forward"] += time.perf_counter() - start
            return {"verdict": plain(verdict), "key": opened.key_id, "claim": opened.claim}
        except Problem as problem:
            return {"problem": problem.document()}
        except MTLSignError as error:
            return {"problem": of_error(error, about="bundle").document()}
        except MemoryError:
            return {
                "problem": Problem("too-large", "the claim needs more memory than a verifier has").document()
            }
        except Exception as error:  # a hostile claim never stops its neighbours
            log.exception("claim failed", extra={"event": "claim_failed"})
            if "alloc" in str(error).lower():
                return {
                    "problem": Problem(
                        "too-large", "the claim needs more memory than a verifier has"
                    ).document()
                }
            return {
                "problem": Problem(
                    "internal", f"the claim could not be judged ({type(error).__name__})"
                ).document()
            }

    def _probe(self, opened: OpenedClaim) -> Probe:
        found = self._probes.pop(opened.key_id, None)
        if found is None:
            spec = opened.opening.parse()
            kind = (spec.graph_fields, spec.taps, spec.carrier, spec.n)
            if kind not in self._checked:
                self._checked[kind] = check_work(spec, self.s, self.factories)
                while len(self._checked) > 256:
                    self._checked.popitem(last=False)
            found = probe_of(opened, self.factories, device=self.device)
        self._probes[opened.key_id] = found
        while len(self._probes) > PROBES:
            self._probes.popitem(last=False)
        return found


def plain(verdict: Verdict) -> dict[str, Any]:
    """The verdict's fields as JSON can say them: infinite bits become the largest float."""
    found = verdict.to_json()
    return {
        name: (1e308 if value > 0 else None)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in found.items()
    }


class Here:
    """A backend in this process: tasks run in threads, one computing at a time."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    async def verify(self, task: Task) -> Answer:
        """Answer one task."""
        return await asyncio.to_thread(self.verifier.answer, task)

    async def ready(self) -> bool:
        """Always."""
        return True
