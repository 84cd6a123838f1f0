"""Confirmed checkpoints: which co-signatures count, and the time that they give to entries.

A change of the council seals the past. Keys that were rotated out stay valid for old checkpoints, so a line
of a former member counts only if it is not dated after the first confirmed checkpoint of the next council.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature, median
from mtlsign.claims.statements.types import Membership
from mtlsign.errors import LedgerError

Councils = Sequence[tuple[int, Membership]]
Times = dict[bytes, int]
MAX_LINES = 2**20
"""Most stored co-signatures in the name of members in force; each one costs a signature check."""
_NAMED_SIZES = 8


@dataclass(frozen=True, slots=True)
class ConfirmedCheckpoint:
    """Checkpoint with the co-signatures of at least the council's threshold of members.

    Attributes:
        checkpoint: the co-signed tree.
        times: public key of each co-signing member → time by that member's clock.
        time: median of `times`, but never earlier than the time of an earlier confirmed checkpoint.
    """

    checkpoint: Checkpoint
    times: Mapping[bytes, int]
    time: int


class LineCache:
    """Results of signature checks of co-signatures. Each line is checked once."""

    def __init__(self) -> None:
        self._results: dict[tuple[Checkpoint, Cosignature], bool] = {}

    def is_valid(self, checkpoint: Checkpoint, line: Cosignature) -> bool:
        """Return whether the line is a valid co-signature of the member that it names."""
        key = (checkpoint, line)
        if key not in self._results:
            member = line.member
            self._results[key] = member is not None and line.is_valid_for(checkpoint.body(), member)
        return self._results[key]


def council_in_force(councils: Councils, index: int) -> Membership:
    """Return the membership in force for entry `index`, or for a tree of `index` entries.

    Args:
        councils: (index, membership) pairs in ascending order; not empty.
        index: number of the entry, or size of the tree.
    """
    position = bisect.bisect_left([start for start, _ in councils], index)
    return councils[max(position - 1, 0)][1]


def member_times(
    councils: Councils, cosignatures: Iterable[tuple[Checkpoint, Cosignature]], cache: LineCache
) -> dict[Checkpoint, Times]:
    """Return the earliest valid time of each member in force, for each co-signed tree.

    Any sender can store lines, so an invalid line must not invalidate the members' valid ones.

    Args:
        councils: (index, membership) pairs.
        cosignatures: stored lines, unverified.
        cache: results of earlier checks.

    Raises:
        LedgerError: the store holds over a million co-signatures in the name of members.
    """
    members: dict[int, frozenset[bytes]] = {}
    times_by_tree: dict[Checkpoint, Times] = {}
    checks = 0
    for checkpoint, line in cosignatures:
        size, member = checkpoint.size, line.member
        if size not in members:
            members[size] = frozenset(council_in_force(councils, size).members)
        if member is None or member not in members[size]:
            continue
        checks += 1
        if checks > MAX_LINES:
            raise LedgerError(
                f"Over {MAX_LINES} co-signatures name members in force. Delete those that no member made.",
                field="ledger",
            )
        if not cache.is_valid(checkpoint, line):
            continue
        times = times_by_tree.setdefault(checkpoint, {})
        times[member] = min(times.get(member, line.time), line.time)
    return times_by_tree


def confirm_checkpoints(
    councils: Councils, times_by_tree: Mapping[Checkpoint, Times], roots: Mapping[int, bytes]
) -> tuple[tuple[ConfirmedCheckpoint, ...], tuple[str, ...]]:
    """Return the confirmed checkpoints by ascending size, and warnings for display.

    Args:
        councils: (index, membership) pairs.
        times_by_tree: result of `member_times`.
        roots: verified root of each co-signed size.

    Raises:
        LedgerError: enough members of a council without confirmed successor co-signed another tree.
    """
    by_council: dict[int, list[Checkpoint]] = {}
    for checkpoint in sorted(times_by_tree, key=lambda tree: (tree.size, tree.root)):
        position = bisect.bisect_left([start for start, _ in councils], checkpoint.size)
        by_council.setdefault(max(position - 1, 0), []).append(checkpoint)
    counted: list[tuple[Checkpoint, Times]] = []
    late_sizes: set[int] = set()
    forks: list[str] = []
    seal: int | None = None
    for position in range(len(councils) - 1, -1, -1):
        council, first_time = councils[position][1], None
        for checkpoint in by_council.get(position, ()):
            times = times_by_tree[checkpoint]
            if roots.get(checkpoint.size) != checkpoint.root:
                sentence = _other_tree_sentence(checkpoint.size, times, roots)
                if len(times) >= council.threshold and seal is None:
                    raise LedgerError(f"{sentence} Do not use this ledger; ask its members.", field="ledger")
                forks.append(sentence)
                continue
            if seal is not None and max(times.values()) > seal:
                late_sizes.add(checkpoint.size)
                times = {member: time for member, time in times.items() if time <= seal}
            if len(times) >= council.threshold:
                counted.append((checkpoint, times))
                first_time = median(times.values()) if first_time is None else first_time
        seal = seal if first_time is None else first_time
    warnings = sorted(forks)
    if late_sizes:
        warnings.append(
            f"Former members co-signed checkpoints of {named_sizes(late_sizes)} entries after the next "
            "council had confirmed a checkpoint. These co-signatures do not count."
        )
    return _with_increasing_times(counted), tuple(warnings)


def named_sizes(sizes: Iterable[int]) -> str:
    """Return the first sizes of a set for display."""
    ordered = sorted(sizes)
    names = ", ".join(map(str, ordered[:_NAMED_SIZES]))
    return names + (", …" if len(ordered) > _NAMED_SIZES else "")


def _with_increasing_times(
    counted: Iterable[tuple[Checkpoint, Times]],
) -> tuple[ConfirmedCheckpoint, ...]:
    latest_time, confirmed = 0, []
    for checkpoint, times in sorted(counted, key=lambda item: item[0].size):
        latest_time = max(latest_time, median(times.values()))
        confirmed.append(ConfirmedCheckpoint(checkpoint, times, latest_time))
    return tuple(confirmed)


def _other_tree_sentence(size: int, times: Mapping[bytes, int], roots: Mapping[int, bytes]) -> str:
    cosigners = ", ".join(member.hex()[:16] for member in sorted(times))
    state = "differs from the co-signed tree" if size in roots else "is truncated"
    return f"The ledger {state}: {cosigners} co-signed another tree of {size} entries."
