"""A sweep's space: settings of embeddings, each a value or a grid of values, and the cells that it spans.

A space is plain data, so it is read, checked and counted without Ray. `arm` is a setting of its own: a grid
of small mappings of settings that go together, where a study compares a few combinations and not all.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.config.base import nearest
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import SettingsError

#: Settings that phase 1 depends on: cells that agree in them start from the same W0.
PHASE1_SETTINGS = (
    *("task", "data", "model", "width", "stem", "init", "epochs", "batch", "lr", "weight_decay"),
    *("amp", "seed"),
)
#: What a space may not set: the sweep's own settings say it.
SWEEP_OWNED_SETTINGS = frozenset(
    (
        *("owner", "passphrase_file", "endpoint", "json", "quiet", "data", "download", "workers"),
        *("cpus_per_worker", "gpus_per_worker", "cluster_wait", "max_failures", "storage", "run", "resume"),
        *("keep_checkpoints", "insecure_test_key", "name"),
    )
)
VARIANT = "arm"


def load_space(settings: SweepSettings) -> dict[str, Any]:
    """The search space, with the sweep's own settings put over it, as plain data for Ray Tune.

    Raises: SettingsError for an unknown space, or one that sets what is not a cell's to set.
    """
    space = _named(settings.space)
    over = {
        k: v
        for k, v in (("task", settings.task), ("model", settings.model), ("width", settings.width))
        if v is not None
    }
    over |= _fixed(settings.fixed)
    space |= over
    arms = _variants(space, over)
    if arms:
        space[VARIANT] = {"grid_search": arms}
    known = set(EmbedSettings.model_fields) - SWEEP_OWNED_SETTINGS
    for name in [*space, *(name for arm in arms for name in arm)]:
        if name != VARIANT and (not isinstance(name, str) or name not in known):
            raise SettingsError(f"the space sets {name!r}; {nearest(str(name), known)}", field="space")
    if "seed" in space and settings.num_samples > 1 and not has_random_values(space):
        raise SettingsError(
            f"fixes the seed, so nothing is repeated {settings.num_samples} times; leave it out and give the first "
            "one as --seed, or give a grid of seeds and no repetitions",
            field="fixed" if "seed" in _fixed(settings.fixed) else "space",
        )
    if "seed" not in space:
        count = 1 if has_random_values(space) else settings.num_samples
        space["seed"] = (
            {"grid_search": list(range(settings.seed, settings.seed + count))} if count > 1 else settings.seed
        )
    for name in PHASE1_SETTINGS:
        if name in space and not is_grid_or_constant(space[name]):
            raise SettingsError(
                f"the space draws {name!r}, which needs a phase 1 for every draw; give values or a grid",
                field="space",
            )
    for cell in cells_of(space, settings):  # refuses what no cell could run, before anything is written
        _ = cell.name
    return space


def _variants(space: Mapping[str, Any], over: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arms without what the caller has fixed, each once. Raises `SettingsError`."""
    if VARIANT not in space:
        return []
    given = space[VARIANT]["grid_search"] if _is_grid(space[VARIANT]) else [space[VARIANT]]
    found: list[dict[str, Any]] = []
    for arm in given:
        if not isinstance(arm, Mapping):
            raise SettingsError(
                f"the space's {VARIANT} is {type(arm).__name__}; give mappings", field="space"
            )
        left = {name: value for name, value in arm.items() if name not in over}
        if left not in found:
            found.append(left)
    return found


def _named(name: str) -> dict[str, Any]:
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module if function else "tune_spaces"), function or module)
        space = make()
    except Exception as error:  # an own space is the user's code: whatever it raises is told in one line
        hint = "write smoke, paper_grid, paper_ablation, or package.module:function"
        raise SettingsError(
            f"{name[:100]!r} gives no space ({type(error).__name__}: {str(error)[:120]}); {hint}",
            field="space",
        ) from None
    if not isinstance(space, dict):
        raise SettingsError(f"{name[:100]!r} gives no mapping of settings", field="space")
    return dict(space)


def _fixed(text: str) -> dict[str, str]:
    pairs = {}
    # a value may hold commas itself: snapshots=noise,tuned,steps=300
    for part in re.split(r",(?=\s*[A-Za-z0-9_-]+\s*=)", text) if text.strip() else []:
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise SettingsError(f"{part[:60]!r} is not NAME=VALUE", field="fixed")
        pairs[name.strip().replace("-", "_")] = value.strip()
    return pairs


def _is_grid(value: object) -> bool:
    return isinstance(value, Mapping) and set(value) == {"grid_search"} and bool(value["grid_search"])


def is_grid_or_constant(value: object) -> bool:
    """Whether it is a value or a grid of values, not a draw."""
    return value is None or isinstance(value, str | int | float | bool) or _is_grid(value)


def has_random_values(space: Mapping[str, Any]) -> bool:
    """Whether the space draws any value."""
    return not all(is_grid_or_constant(value) for value in space.values())


def grid_points(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the space's grids; draws are left out (they have defaults)."""
    plain = {name: value for name, value in space.items() if is_grid_or_constant(value)}
    choices = [value["grid_search"] if _is_grid(value) else [value] for value in plain.values()]
    for values in itertools.product(*choices):
        yield dict(zip(plain, values, strict=True))


@dataclass(frozen=True)
class Cell:
    """One combination: its settings, and names that follow from what it computes."""

    config: Mapping[str, Any]
    data: Path | None
    download: bool

    @property
    def flat(self) -> dict[str, Any]:
        """The combination as one mapping of settings, those of its arm included."""
        return {k: v for k, v in self.config.items() if k != VARIANT} | dict(self.config.get(VARIANT, {}))

    @property
    def settings(self) -> EmbedSettings:
        """Complete settings. Raises `SettingsError`."""
        fixed = {"data": self.data, "download": self.download, "workers": 0, "insecure_test_key": True}
        return EmbedSettings.of({**self.flat, **fixed}).resolved()

    @property
    def name(self) -> str:
        """16 hex digits of the settings that change what is computed."""
        return _digest(self.settings, None)

    @property
    def clean_name(self) -> str:
        """16 hex digits of what phase 1 depends on."""
        return _digest(self.settings, PHASE1_SETTINGS)


def _digest(settings: EmbedSettings, fields: Sequence[str] | None) -> str:
    left_out = SWEEP_OWNED_SETTINGS | {"json_output"}
    chosen = {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if (name in fields if fields is not None else name not in left_out) and name != "data"
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def cells_of(space: Mapping[str, Any], settings: SweepSettings) -> list[Cell]:
    """The cells of the space's grids."""
    return [Cell(config, settings.data, settings.download) for config in grid_points(space)]


def count_of(space: Mapping[str, Any], settings: SweepSettings) -> int:
    """How many cells a sweep has: its grids' once, or once for each draw."""
    return len(cells_of(space, settings)) * (settings.num_samples if has_random_values(space) else 1)
