"""Attribution of verifier crashes to single claims, so that a claim that crashes verifiers fails alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mtlsign.service.verifier.verifier import VerifierCrashed


@dataclass(frozen=True)
class RetryPlan:
    """Claims that are given up (`exhausted`), and the groups in which the remaining claims are retried."""

    exhausted: list[int]
    groups: list[list[int]]


@dataclass
class CrashAttribution:
    """Crash counts of the claims of one group.

    Args:
        max_attempts: crash count at which a claim is given up.
    """

    max_attempts: int
    crashes: int = 0
    crash_counts: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    def record(self, remaining: Sequence[int], crash: VerifierCrashed) -> RetryPlan:
        """Count a crash and plan the retry of the claims without an outcome.

        The claim that the verifier had started is suspected. If the verifier did not report which one it was,
        all claims are suspected with half the weight, except after the first crash, which suspects none.
        A suspected claim is retried alone, the others together.

        Args:
            remaining: indices of the claims without an outcome, in the order in which they were verified.
            crash: the crash, with the outcomes reported before it.

        Returns:
            The claims to give up and the groups to retry.
        """
        self.crashes += 1
        suspected = remaining[:1] if crash.claim_started else remaining if self.crashes > 1 else []
        for index in suspected:
            self.crash_counts[index] += 1 if crash.claim_started else 0.5
        most = self.max_attempts
        exhausted = [i for i in remaining if self.crash_counts[i] >= most or self.crashes >= 10 * most]
        unaffected = [i for i in remaining if i not in suspected and i not in exhausted]
        groups = [unaffected] if unaffected else []
        groups.extend([i] for i in suspected if i not in exhausted)
        return RetryPlan(exhausted, groups)
