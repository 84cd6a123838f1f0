"""Attacks on watermarked models: removal, ambiguity and function-preserving changes.

    for plan in parse_attacks("ftal:lr=quarter/full,prune:ratio=0.5+ftal,fast"):
        outcome = plan.run(model, task, AttackerResources(training_lr=0.1), seed=0)

`base` defines the arguments and results of an attack, `registry` lists the attacks, and `expressions` parses
`--attacks`. Attacks use the task's `attacker` split, which embedding never reads. Storage, reports and Ray
are outside this package (`mtlsign.experiments.attack_runs`).
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
