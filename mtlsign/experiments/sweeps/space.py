"""Search space of a sweep: settings of embeddings, each a value or a grid of values, and the cells it spans.

A space is plain data, so it is read, checked and counted without Ray. `variant` is a grid of mappings whose
settings change together: a study compares these combinations and no others.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.config.base import named_values, nearest, setting_names
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import SettingsError
from mtlsign.watermark.embedding.checkpoint_identity import PHASE1_SETTINGS

#: Settings that a space may not set, because the settings of the sweep determine them.
SWEEP_OWNED_SETTINGS = frozenset(
    (
        *("owner", "passphrase_file", "endpoint", "json", "quiet", "data", "download", "tokenizer"),
        *("workers", "cpus_per_worker", "gpus_per_worker", "resource_timeout_s", "max_failures"),
        *("storage", "run", "resume", "keep_checkpoints", "insecure_test_key", "name"),
    )
)
VARIANT = "variant"


def load_space(settings: SweepSettings) -> dict[str, Any]:
    """Return the search space as plain data for Ray Tune, with the settings of the sweep applied to it.

    Raises:
        SettingsError: the space is unknown, or sets something that a cell may not set.
    """
    space = _import_space(settings.space)
    if settings.task is not None:
        space.pop("model", None)  # the default model depends on the task
    named = {"task": settings.task, "model": settings.model, "width": settings.width}
    overrides = {name: value for name, value in named.items() if value is not None}
    overrides |= named_values(settings.overrides)
    space |= overrides
    variants = _variants(space, overrides)
    if variants:
        space[VARIANT] = {"grid_search": variants}
    _require_known_settings(space, variants)
    _set_seeds(space, settings)
    for name in PHASE1_SETTINGS:
        if name in space and not is_grid_or_constant(space[name]):
            raise SettingsError(
                f"The space draws {name!r}, which would need a phase 1 for every draw. "
                "Use values or a grid for it.",
                field="space",
            )
    for cell in cells_of(space, settings):
        _ = cell.name  # raises for invalid settings, before anything is written
    return space


def _require_known_settings(space: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> None:
    known = set(setting_names(EmbedSettings)) - SWEEP_OWNED_SETTINGS
    for name in [*space, *(name for variant in variants for name in variant)]:
        if name != VARIANT and (not isinstance(name, str) or name not in known):
            raise SettingsError(
                f"The space sets {name!r}, which is not a setting of a cell. {nearest(str(name), known)}",
                field="space",
            )


def _set_seeds(space: dict[str, Any], settings: SweepSettings) -> None:
    """Add the seeds of the repetitions. A space with random values repeats by drawing again, not by seed."""
    random = has_random_values(space)
    if "seed" in space:
        if settings.num_samples > 1 and not random:
            raise SettingsError(
                f"The seed is fixed, so {settings.num_samples} repetitions would be identical. Remove it and "
                "pass the first one as --seed, or use a grid of seeds without repetitions.",
                field="set" if "seed" in named_values(settings.overrides) else "space",
            )
        return
    count = 1 if random else settings.num_samples
    seeds = list(range(settings.seed, settings.seed + count))
    space["seed"] = {"grid_search": seeds} if count > 1 else settings.seed


def _variants(space: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the different variants without the settings that the caller has fixed."""
    if VARIANT not in space:
        return []
    listed = space[VARIANT]["grid_search"] if _is_grid(space[VARIANT]) else [space[VARIANT]]
    variants: list[dict[str, Any]] = []
    for variant in listed:
        if not isinstance(variant, Mapping):
            raise SettingsError(
                f"A {VARIANT} of the space is of type {type(variant).__name__}. Use mappings of settings.",
                field="space",
            )
        reduced = {name: value for name, value in variant.items() if name not in overrides}
        if reduced not in variants:
            variants.append(reduced)
    return variants


def _import_space(name: str) -> dict[str, Any]:
    """Call the function of a built-in space or of a custom one."""
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module if function else "tune_spaces"), function or module)
        space = make()
    except Exception as error:  # a custom space is the caller's code, which may raise anything
        raise SettingsError(
            f"{name[:100]!r} does not provide a space ({type(error).__name__}: {str(error)[:120]}). "
            "Use smoke, paper_grid, paper_ablation, or package.module:function.",
            field="space",
        ) from None
    if not isinstance(space, dict):
        raise SettingsError(f"{name[:100]!r} does not return a dict. Return settings by name.", field="space")
    return dict(space)


def describe(value: object) -> Any:
    """Return a space or a part of it as JSON values, so that two spaces can be compared.

    A random value becomes its class with its attributes. A function becomes its name.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return {"class": type(value).__name__, **describe(getattr(value, "__dict__", {}))}


def _is_grid(value: object) -> bool:
    return isinstance(value, Mapping) and set(value) == {"grid_search"} and bool(value["grid_search"])


def is_grid_or_constant(value: object) -> bool:
    """Return True for a value or a grid of values, False for a random value."""
    return value is None or isinstance(value, str | int | float | bool) or _is_grid(value)


def has_random_values(space: Mapping[str, Any]) -> bool:
    """Return True if the space draws any value at random."""
    return not all(is_grid_or_constant(value) for value in space.values())


def grid_points(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the space's grids, without the random values (they have defaults)."""
    constant = {name: value for name, value in space.items() if is_grid_or_constant(value)}
    choices = [value["grid_search"] if _is_grid(value) else [value] for value in constant.values()]
    for values in itertools.product(*choices):
        yield dict(zip(constant, values, strict=True))


@dataclass(frozen=True)
class Cell:
    """One combination of settings. Its names are digests of what the combination computes.

    Attributes:
        config: settings by name, with those of the variant under `variant`.
        data: folder of the datasets.
        download: let torchvision download missing data.
    """

    config: Mapping[str, Any]
    data: Path | None
    download: bool
    tokenizer: Path | None = None

    @property
    def flat(self) -> dict[str, Any]:
        """The combination as one mapping of settings, including those of its variant."""
        own = {name: value for name, value in self.config.items() if name != VARIANT}
        return own | dict(self.config.get(VARIANT, {}))

    @property
    def settings(self) -> EmbedSettings:
        """Complete settings of the embedding. Raises `SettingsError`."""
        fixed: dict[str, object] = {"data": self.data, "download": self.download, "tokenizer": self.tokenizer}
        fixed |= {"workers": 0, "insecure_test_key": True}
        return EmbedSettings.of({**self.flat, **fixed}).with_defaults()

    @property
    def name(self) -> str:
        """Digest of the settings that affect the result (16 hex)."""
        return _digest(self.settings, None)

    @property
    def clean_name(self) -> str:
        """Digest of the settings that phase 1 depends on (16 hex)."""
        return _digest(self.settings, PHASE1_SETTINGS)


def _digest(settings: EmbedSettings, fields: Sequence[str] | None) -> str:
    excluded = SWEEP_OWNED_SETTINGS | {"json_output"}
    values = {
        name: value
        for name, value in settings.flat_dump().items()
        if (name in fields if fields is not None else name not in excluded) and name != "data"
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def cells_of(space: Mapping[str, Any], settings: SweepSettings) -> list[Cell]:
    """Return the cells of the space's grids."""
    return [
        Cell(config, settings.data, settings.download, settings.tokenizer) for config in grid_points(space)
    ]


def count_of(space: Mapping[str, Any], settings: SweepSettings) -> int:
    """Return the number of cells of a sweep: those of the grids, times the number of random draws."""
    return len(cells_of(space, settings)) * (settings.num_samples if has_random_values(space) else 1)
