"""Studies that are resumed or told what they cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.base import dump
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import MTLSignError, SettingsError
from mtlsign.experiments.paper_studies import run
from mtlsign.storage.locations import open_storage


def of(**values: Any) -> ReproduceSettings:
    return ReproduceSettings.of({"study": "thresholds", **values})


def test_random_keys_take_no_settings_of_an_embedding(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="fixed: thresholds embeds nothing"):
        run.run_study(of(fixed="steps=3", storage=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_resuming_random_keys_refuses_other_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = of(keys=120, seed=4, heads="keyed", storage=str(tmp_path), run="t")
    folder = open_storage(str(tmp_path)).child("runs/t")
    folder.write("settings.json", dump(kept))
    for other, says in (
        ({"keys": 130}, "keys: is 120 in run 't'"), ({"seed": 5}, "seed: is 4"), ({"heads": "free"}, "heads"),
        ({"width": 8}, "width"), ({"study": "ablation"}, "is no sweep's"),
    ):  # fmt: skip
        with pytest.raises(MTLSignError, match=says):
            run.run_study(of(**{"storage": str(tmp_path), "resume": "t", **other}))
    began: list[ReproduceSettings] = []

    def train(cell: Any, _: Any) -> bytes:
        began.append(cell.settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_shared", train)
    with pytest.raises(KeyboardInterrupt):
        run.run_study(of(storage=str(tmp_path), resume="t", keys=120, data=tmp_path, quiet=True))
    assert began[0].seed == 4 and began[0].data == tmp_path
