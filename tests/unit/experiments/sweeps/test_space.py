"""Tests of search spaces and their cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import SettingsError
from mtlsign.experiments.sweeps.space import Cell, cells_of, load_space
from tests.unit.experiments.sweeps.helpers import TINY, tiny_sweep


def test_load_space_paper_grid_has_100_cells_and_one_phase_1() -> None:
    settings = SweepSettings.of({"space": "paper_grid"})
    cells = cells_of(load_space(settings), settings)
    pairs = {(cell.settings.lambda1, cell.settings.lambda2) for cell in cells}
    values = [i / 50 for i in range(1, 11)]
    assert pairs == {(a, b) for a in values for b in values} and len(cells) == 100
    assert len({cell.name for cell in cells}) == 100 and len({cell.clean_name for cell in cells}) == 1


def test_load_space_paper_ablation_has_four_cells() -> None:
    settings = SweepSettings.of({"space": "paper_ablation"})
    pairs = [(c.settings.lambda1, c.settings.lambda2) for c in cells_of(load_space(settings), settings)]
    assert pairs == [(0.0, 0.0), (0.0, 0.1), (0.1, 0.0), (0.1, 0.1)]


def test_load_space_repetitions_have_different_seeds() -> None:
    settings = tiny_sweep(num_samples=3, seed=7)
    cells = cells_of(load_space(settings), settings)
    assert len(cells) == 12 and {cell.settings.seed for cell in cells} == {7, 8, 9}
    assert len({cell.clean_name for cell in cells}) == 3


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"space": "papergrid"}, "space", "paper_grid"),
        ({"space": "os:getcwd"}, "space", "does not return a dict"),
        ({"space": "no.such:thing"}, "space", "ModuleNotFoundError"),
        ({"set": ["stepz=3"]}, "space", "steps"),
        ({"set": ["steps"]}, "set", "NAME=VALUE"),
        ({"set": ["phase2.steps=-3"]}, "phase2.steps", "greater"),
        ({"set": ["storage=/tmp"]}, "space", "storage"),
        ({"set": ["insecure_test_key=1"]}, "space", "insecure_test_key"),
        ({"set": ["lambda1=-1"]}, "lambda1", "greater"),
        ({"set": ["seed=3"], "num_samples": 3}, "set", "as --seed"),
    ],
)
def test_load_space_invalid_space_names_field_and_problem(
    changes: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_space(SweepSettings.of({"space": "smoke", **changes}))
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_load_space_random_phase_1_setting_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Draw:
        def sample(self) -> float:
            return 0.1

    monkeypatch.setattr("tune_spaces.smoke", lambda: {"task": "digits", "phase1.weight_decay": Draw()})
    with pytest.raises(SettingsError, match="weight_decay"):
        load_space(tiny_sweep(set=[]))


def test_load_space_override_may_hold_commas() -> None:
    settings = tiny_sweep(set=["perturbation.kinds=noise,fine_tuned", "phase2.steps=30"])
    cells = cells_of(load_space(settings), settings)
    assert {cell.settings.perturbation.kinds for cell in cells} == {("noise", "fine_tuned")}


def test_cell_name_depends_only_on_settings_that_affect_the_result() -> None:
    def name(config: Mapping[str, Any], data: str | None = None) -> str:
        return Cell(config, Path(data) if data else None, False).name

    base = name({"task": "digits", "lambda1": 0.1})
    assert name({"lambda1": 0.1, "task": "digits"}, "elsewhere") == base
    assert name({"task": "digits", "lambda1": 0.1, "lambda2": 0.0}) == base  # the default, stated explicitly
    changes = [{"lambda1": 0.2}, {"phase2.steps": 601}, {"seed": 1}, {"perturbation.kinds": "pruned"}]
    assert base not in {name({"task": "digits", "lambda1": 0.1} | change) for change in changes}


def test_load_space_variants_are_settings_that_change_together(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [{"perturbation.kinds": "fine_tuned"}, {"perturbation.kinds": "noise", "lambda2": 0.0}]
    space = {"task": "digits", "variant": {"grid_search": variants}, "lambda1": {"grid_search": [0.0, 0.1]}}
    monkeypatch.setattr("tune_spaces.smoke", lambda: space)
    settings = tiny_sweep()
    cells = [cell.settings for cell in cells_of(load_space(settings), settings)]
    assert [(",".join(c.perturbation.kinds), c.lambda2, c.lambda1) for c in cells] == [
        ("fine_tuned", 1, 0), ("fine_tuned", 1, 0.1), ("noise", 0, 0), ("noise", 0, 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "message"), [(3, "mappings"), ({"stepz": 1}, "steps"), ({"storage": "x"}, "storage")]
)
def test_load_space_invalid_variant_raises(
    monkeypatch: pytest.MonkeyPatch, variant: object, message: str
) -> None:
    monkeypatch.setattr("tune_spaces.smoke", lambda: {"variant": {"grid_search": [variant]}})
    with pytest.raises(SettingsError, match=message):
        load_space(tiny_sweep(set=TINY))


def test_cells_with_other_initial_weights_or_adapters_share_no_clean_model() -> None:
    starts = [(name, value) for name in ("phase1.initial_weights", "adapter") for value in ("a", "b")]
    cells = [Cell({"task": "digits", **dict([start])}, None, False) for start in starts]
    cells.append(Cell({"task": "digits"}, None, False))
    assert len({cell.clean_name for cell in cells}) == 5
