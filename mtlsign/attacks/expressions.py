"""Which attacks to run: names, settings, alternatives and chains as one line of text.

    ORDERS  = PIECE ("," PIECE)*             a piece without a name goes on with the settings before it
    PIECE   = CHAIN | all | fast | standard
    CHAIN   = NAME[:SETTING("," SETTING)*] ("+" …)*       done one after the other on the same model
    SETTING = KEY=VALUE("/" VALUE)*                        alternatives: one row for each

`ftal:lr=quarter/full,epochs=3,prune:ratio=0.5+ftal` are three rows: two of tuning, one pruned and then tuned.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from mtlsign.attacks.attacker_data import transform_task
from mtlsign.attacks.base import AttackerResources, AttackOutcome, Kind, settings_of
from mtlsign.attacks.registry import ATTACKS, CHAINS, STANDARD
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
    """One attack with all its settings."""

    name: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def setting(self) -> str:
        """The settings, defaults included: `lr=quarter epochs=5`."""
        return " ".join(f"{key}={value}" for key, value in self.settings)


@dataclass(frozen=True)
class AttackPlan:
    """One row of the table: an attack, or several in sequence."""

    links: tuple[AttackStep, ...]

    @property
    def name(self) -> str:
        """`ftal`, or `prune+ftal`."""
        return "+".join(link.name for link in self.links)

    @property
    def setting(self) -> str:
        """All settings, those of a chain's links parted by ` + `."""
        return (
            " + ".join(link.setting or "–" for link in self.links)
            if len(self.links) > 1
            else self.links[0].setting
        )

    @property
    def kind(self) -> Kind:
        """The kind of the whole: it is free only if all its links are."""
        kinds = {ATTACKS[link.name].kind for link in self.links}
        for kind in ("forgery", "removal", "free"):
            if kind in kinds:
                return kind
        return "none"

    def text(self) -> str:
        """What `parse` reads back as this order alone."""
        return "+".join(
            link.name + (":" + ",".join(f"{k}={v}" for k, v in link.settings) if link.settings else "")
            for link in self.links
        )

    def run(self, model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
        """Attack `model`, link after link; later links see images as the earlier ones left them.

        Raises: NotApplicableError, AttackDivergedError.
        """
        done = AttackOutcome(model)
        seen = task
        for link in self.links:
            last = ATTACKS[link.name].run(done.model, seen, budget, seed, **dict(link.settings))
            seen = transform_task(seen, last.inputs)
            done = AttackOutcome(
                last.model,
                done.steps + last.steps,
                done.images + last.images,
                done.inputs + last.inputs,
                last.verdict,
            )
        return done


def parse_attacks(text: str) -> list[AttackPlan]:
    """The orders that a line of text asks for, each once, in the order given.

    Raises:
        SettingsError: an unknown attack or setting, a value outside its limits, or too many of them.
    """
    if len(text) > MAX_TEXT:
        raise SettingsError(f"is over {MAX_TEXT} characters; run fewer at a time", field="attacks")
    found: dict[AttackPlan, None] = {}
    for piece in _split_expressions(text):
        for order in _expand_plan(piece):
            found.setdefault(order)
            _check_count(len(found))
    if not found:
        raise SettingsError("names no attack; see --attacks list", field="attacks")
    return list(found)


def _check_count(count: int) -> None:
    if count > MAX_PLANS:
        raise SettingsError(f"asks for over {MAX_PLANS} rows; run fewer at a time", field="attacks")


def _split_expressions(text: str) -> Iterator[str]:
    """Pieces with their settings joined again and named sets replaced."""
    joined: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if not part:
            continue
        if re.match(r"[a-z0-9_]+=", part):
            if not joined:
                raise SettingsError(
                    f"{part[:60]!r} belongs to no attack; write NAME:{part[:60]}", field="attacks"
                )
            joined[-1] += ("," if ":" in joined[-1].rpartition("+")[2] else ":") + part
        else:
            joined.append(part)
    for piece in joined:
        if piece in _NAMED_SETS:
            yield from _split_expressions(_NAMED_SETS[piece]())
        else:
            yield piece


def _expand_plan(piece: str) -> Iterator[AttackPlan]:
    parts = re.split(r"\+(?=[a-z])", piece)
    if len(parts) > MAX_STEPS:
        raise SettingsError(f"chains over {MAX_STEPS} attacks; shorten {piece[:40]!r}", field="attacks")
    choices = [list(_expand_step(part)) for part in parts]
    _check_count(math.prod(map(len, choices)))
    for links in itertools.product(*choices):
        yield AttackPlan(links)


def _expand_step(part: str) -> Iterator[AttackStep]:
    name, _, given = part.partition(":")
    name = name.strip()
    if name not in ATTACKS:
        near = difflib.get_close_matches(name, [*ATTACKS, *_NAMED_SETS], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "see --attacks list"
        raise SettingsError(f"unknown attack {name[:60]!r}; {hint}", field="attacks")
    known = settings_of(ATTACKS[name].run)
    values: dict[str, list[Any]] = {key: [default] for key, (_, default) in known.items()}
    for item in filter(None, (i.strip() for i in given.split(","))):
        key, equals, text = item.partition("=")
        if not equals or key not in known:
            settings = ", ".join(known) or "none"
            raise SettingsError(f"{name} has no setting {item[:60]!r}; it has {settings}", field="attacks")
        values[key] = [_value(name, key, known[key][0], one.strip()) for one in text.split("/")]
    _check_count(math.prod(map(len, values.values())))
    for chosen in itertools.product(*values.values()):
        yield AttackStep(name, tuple(zip(values, chosen, strict=True)))


def _value(name: str, key: str, annotation: Any, text: str) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(text)
    except ValidationError as error:
        why = error.errors(include_url=False)[-1]["msg"]
        raise SettingsError(
            f"{name}:{key}={text[:40]} is refused ({why}); correct it", field="attacks"
        ) from None


def _named_set(choose: Callable[[Any], tuple[str, ...]]) -> str:
    return ",".join(
        f"{name}:{variant}" if variant else name
        for name, attack in ATTACKS.items()
        for variant in choose(attack)
    )


def describe() -> list[dict[str, Any]]:
    """The catalogue for `--attacks list`: name, kind, one line, settings with their defaults."""
    return [
        {
            "attack": name,
            "kind": attack.kind,
            "summary": attack.summary,
            "settings": {key: default for key, (_, default) in settings_of(attack.run).items()},
        }
        for name, attack in ATTACKS.items()
    ]


def row_header(order: AttackPlan) -> Mapping[str, Any]:
    """Name, setting and kind of an order, as a row begins."""
    return {"attack": order.name, "setting": order.setting, "kind": order.kind}
