"""What thieves and forgers do to a marked model, each attack behind one protocol.

    for order in parse("ftal:lr=quarter/full,prune:ratio=0.5+ftal,fast"):
        attacked = order.run(model, task, Budget(lr=0.1), seed=0)

`protocol` says what an attack takes and gives, `catalogue` lists them, `orders` reads `--attacks`. Attacks
use the task's `attacker` part, which embedding never saw. They know nothing of Ray, storage and reports: that
is `mtlsign.experiments.attack_runs.target`.
"""

from mtlsign.attacks.base import (
    Attack,
    AttackDivergedError,
    AttackerResources,
    AttackOutcome,
    NotApplicableError,
)
from mtlsign.attacks.expressions import AttackPlan, AttackStep, describe, parse_attacks
from mtlsign.attacks.registry import ATTACKS, STANDARD

__all__ = [
    "ATTACKS",
    "STANDARD",
    "Attack",
    "AttackDivergedError",
    "AttackOutcome",
    "AttackPlan",
    "AttackStep",
    "AttackerResources",
    "NotApplicableError",
    "describe",
    "parse_attacks",
]
