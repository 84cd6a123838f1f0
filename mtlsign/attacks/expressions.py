"""Attack expressions: names, parameters, alternatives and sequences of attacks as text.

    EXPRESSIONS = ITEM ("," ITEM)*            an item KEY=VALUE continues the parameters before it
    ITEM        = SEQUENCE | all | fast | standard
    SEQUENCE    = NAME[:PARAMETER("," PARAMETER)*] ("+" ...)*     attacks on the result of the one before
    PARAMETER   = KEY=VALUE("/" VALUE)*                           alternatives: one row for each

`ftal:lr=quarter/full,epochs=3,prune:ratio=0.5+ftal` makes three rows: two of fine-tuning, and one of pruning
followed by fine-tuning.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from mtlsign.attacks.attacker_data import transform_task
from mtlsign.attacks.base import AttackerResources, AttackOutcome, Kind, parameters_of
from mtlsign.attacks.registry import ATTACKS, CHAINS, RENAMED, RENAMED_PARAMETERS, STANDARD
from mtlsign.errors import SettingsError
from mtlsign.tasks import Task

MAX_TEXT, MAX_PLANS, MAX_STEPS = 20_000, 2_000, 8
_NAMED_SETS: dict[str, Callable[[], str]] = {
    "all": lambda: ",".join((_named_set(lambda a: a.variants), *CHAINS)),
    "fast": lambda: _named_set(lambda a: a.fast),
    "standard": lambda: STANDARD,
}


@dataclass(frozen=True)
class AttackStep:
    """One attack with all its parameters.

    Attributes:
        name: name of the attack.
        values: (parameter, value), defaults included.
    """

    name: str
    values: tuple[tuple[str, Any], ...]

    @property
    def parameters(self) -> str:
        """Parameters as text: `lr=quarter epochs=5`."""
        return " ".join(f"{key}={value}" for key, value in self.values)

    def text(self) -> str:
        """Return the expression of this attack alone."""
        values = ",".join(f"{key}={value}" for key, value in self.values)
        return f"{self.name}:{values}" if values else self.name


@dataclass(frozen=True)
class AttackPlan:
    """One row of the table: an attack, or several in sequence."""

    steps: tuple[AttackStep, ...]

    @property
    def name(self) -> str:
        """`ftal`, or `prune+ftal`."""
        return "+".join(step.name for step in self.steps)

    @property
    def parameters(self) -> str:
        """Parameters as text; those of a sequence are separated by ` + `."""
        if len(self.steps) == 1:
            return self.steps[0].parameters
        return " + ".join(step.parameters or "–" for step in self.steps)

    @property
    def kind(self) -> Kind:
        """Kind of the sequence; it is function-preserving only if all its steps are."""
        kinds = {ATTACKS[step.name].kind for step in self.steps}
        for kind in ("ambiguity", "removal", "function_preserving"):
            if kind in kinds:
                return kind
        return "none"

    def text(self) -> str:
        """Return the expression that `parse_attacks` reads as this plan alone."""
        return "+".join(step.text() for step in self.steps)

    def run(self, model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
        """Attack a model step by step; later steps get the images that earlier ones require.

        Args:
            model: the marked model; unchanged.
            task: the primary task.
            resources: resources of the attacker.
            seed: seed of all random choices.

        Raises:
            NotApplicableError: an attack is undefined for this model or lacks a resource.
            AttackDivergedError: a loss is not finite.
        """
        total = AttackOutcome(model)
        transformed = task
        for step in self.steps:
            outcome = ATTACKS[step.name].run(total.model, transformed, resources, seed, **dict(step.values))
            transformed = transform_task(outcome.task or transformed, outcome.input_transforms)
            total = AttackOutcome(
                outcome.model,
                total.steps + outcome.steps,
                total.images + outcome.images,
                total.input_transforms + outcome.input_transforms,
                outcome.detection,
                outcome.tensors,
                outcome.task or total.task,
            )
        return total


def parse_attacks(text: str) -> list[AttackPlan]:
    """Return the plans that a text describes, each once, in the order of the text.

    Raises:
        SettingsError: an unknown attack or parameter, a value outside its limits, or too many plans.
    """
    if len(text) > MAX_TEXT:
        raise SettingsError(
            f"The text has over {MAX_TEXT} characters. Run fewer attacks at a time.", field="attacks"
        )
    plans: dict[AttackPlan, None] = {}
    for expression in _split_expressions(text):
        for plan in _expand_plan(expression):
            plans.setdefault(plan)
            _check_count(len(plans))
    if not plans:
        raise SettingsError("The text names no attack. See --attacks list.", field="attacks")
    return list(plans)


def _check_count(count: int) -> None:
    if count > MAX_PLANS:
        raise SettingsError(
            f"The text describes over {MAX_PLANS} rows. Run fewer attacks at a time.", field="attacks"
        )


def _split_expressions(text: str) -> Iterator[str]:
    """Yield expressions with their parameters joined again and named sets replaced."""
    expressions: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if not part:
            continue
        if re.match(r"[a-z0-9_]+=", part):
            if not expressions:
                raise SettingsError(
                    f"{part[:60]!r} belongs to no attack. Write NAME:{part[:60]}.", field="attacks"
                )
            expressions[-1] += ("," if ":" in expressions[-1].rpartition("+")[2] else ":") + part
        else:
            expressions.append(part)
    for expression in expressions:
        if expression in _NAMED_SETS:
            yield from _split_expressions(_NAMED_SETS[expression]())
        else:
            yield expression


def _expand_plan(expression: str) -> Iterator[AttackPlan]:
    parts = re.split(r"\+(?=[a-z])", expression)
    if len(parts) > MAX_STEPS:
        raise SettingsError(
            f"{expression[:40]!r} is a sequence of over {MAX_STEPS} attacks. Shorten it.", field="attacks"
        )
    choices = [list(_expand_step(part)) for part in parts]
    _check_count(math.prod(map(len, choices)))
    for steps in itertools.product(*choices):
        yield AttackPlan(steps)


def _expand_step(part: str) -> Iterator[AttackStep]:
    name, _, items = part.partition(":")
    name = name.strip()
    _require_attack(name)
    known = parameters_of(ATTACKS[name].run)
    values: dict[str, list[Any]] = {key: [default] for key, (_, default) in known.items()}
    for item in filter(None, (i.strip() for i in items.split(","))):
        key, equals, text = item.partition("=")
        if not equals or key not in known:
            raise _unknown_parameter(name, key, item, known)
        values[key] = [_value(name, key, known[key][0], choice.strip()) for choice in text.split("/")]
    _check_count(math.prod(map(len, values.values())))
    for combination in itertools.product(*values.values()):
        yield AttackStep(name, tuple(zip(values, combination, strict=True)))


def _unknown_parameter(name: str, key: str, item: str, known: Collection[str]) -> SettingsError:
    new = RENAMED_PARAMETERS.get(key)
    if new in known:
        return SettingsError(f"The parameter {key!r} of {name!r} was renamed. Use {new!r}.", field="attacks")
    names = ", ".join(known) or "none"
    return SettingsError(
        f"{name!r} has no parameter {item[:60]!r}. Its parameters are: {names}.", field="attacks"
    )


def _require_attack(name: str) -> None:
    """Raise `SettingsError` for an unknown attack; an old name's message has the new name."""
    if name in RENAMED:
        raise SettingsError(f"The attack {name!r} was renamed. Use {RENAMED[name]!r}.", field="attacks")
    if name not in ATTACKS:
        near = difflib.get_close_matches(name, [*ATTACKS, *_NAMED_SETS], n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else "See --attacks list."
        raise SettingsError(f"Unknown attack {name[:60]!r}. {hint}", field="attacks")


def _value(name: str, key: str, annotation: Any, text: str) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(text)
    except ValidationError as error:
        reason = error.errors(include_url=False)[-1]["msg"]
        raise SettingsError(
            f"{name}:{key}={text[:40]} is invalid ({reason}). Correct the value.", field="attacks"
        ) from None


def _named_set(choose: Callable[[Any], tuple[str, ...]]) -> str:
    return ",".join(
        f"{name}:{variant}" if variant else name
        for name, attack in ATTACKS.items()
        for variant in choose(attack)
    )


def describe() -> list[dict[str, Any]]:
    """Return the registry as `--attacks list` prints it: name, kind, summary, parameters with defaults."""
    return [
        {
            "attack": name,
            "kind": attack.kind,
            "summary": attack.summary,
            "settings": {key: default for key, (_, default) in parameters_of(attack.run).items()},
        }
        for name, attack in ATTACKS.items()
    ]


def row_header(plan: AttackPlan) -> Mapping[str, Any]:
    """Return name, parameters and kind of a plan in the columns of `attacks.csv`."""
    return {"attack": plan.name, "parameters": plan.parameters, "kind": plan.kind}
