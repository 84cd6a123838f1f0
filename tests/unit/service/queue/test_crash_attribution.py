"""Attribution of verifier crashes to claims."""

from __future__ import annotations

from mtlsign.service.queue.crash_attribution import CrashAttribution
from mtlsign.service.verifier.verifier import VerifierCrashed


def test_crash_attribution_first_crash_without_progress_suspects_no_claim() -> None:
    plan = CrashAttribution(3).record([0, 1, 2], VerifierCrashed())
    assert plan.exhausted == [] and plan.groups == [[0, 1, 2]]


def test_crash_attribution_second_crash_without_progress_separates_all_claims() -> None:
    attribution = CrashAttribution(3)
    attribution.record([0, 1], VerifierCrashed())
    plan = attribution.record([0, 1], VerifierCrashed(claim_started=None))
    assert plan.groups == [[0], [1]] and dict(attribution.crash_counts) == {0: 0.5, 1: 0.5}


def test_crash_attribution_with_started_claim_retries_it_alone_until_exhausted() -> None:
    attribution = CrashAttribution(2)
    crash = VerifierCrashed([{}], claim_started=True)
    assert attribution.record([4, 5, 6], crash).groups == [[5, 6], [4]]
    plan = attribution.record([4], crash)
    assert plan.exhausted == [4] and plan.groups == []


def test_crash_attribution_before_first_claim_suspects_none_but_ends() -> None:
    attribution = CrashAttribution(1)
    crash = VerifierCrashed(claim_started=False)
    plans = [attribution.record([7, 8], crash) for _ in range(10)]
    assert plans[-1].exhausted == [7, 8] and not plans[-1].groups
