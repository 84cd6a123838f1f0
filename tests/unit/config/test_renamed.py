"""Renamed settings: an old name is an error that names the new one, and never an alias."""

from __future__ import annotations

import pytest

from mtlsign.config import cli, renamed
from mtlsign.config.attack import AttackSettings
from mtlsign.config.base import Settings, setting_names
from mtlsign.config.claims import (
    ClaimSettings,
    CouncilSettings,
    DisputeSettings,
    LedgerJobSettings,
    PublishSettings,
)
from mtlsign.config.embed import PERTURBATION_KINDS, EmbedSettings
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.config.service import BatchSettings, ServiceSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import SettingsError

KINDS: list[type[Settings]] = [
    EmbedSettings, VerifySettings, AttackSettings, SweepSettings, ReproduceSettings,
    ServiceSettings, BatchSettings,
]  # fmt: skip
CLAIMS: list[type[Settings]] = [
    PublishSettings,
    ClaimSettings,
    CouncilSettings,
    DisputeSettings,
    LedgerJobSettings,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_old_name_names_the_new_one(kind: type[Settings]) -> None:
    names = setting_names(kind)
    assert kind.renamed
    for old, new in kind.renamed.items():
        if kind is ServiceSettings and old == "out":
            continue
        assert old not in names and new in names, (old, new)
        flag = "--" + old.replace("_", "-")
        with pytest.raises(SettingsError, match=f"renamed. Use '{new.replace('_', '-')}'") as caught:
            cli.parse(kind, [flag, "1"])
        assert caught.value.field == flag
        with pytest.raises(SettingsError, match="renamed"):
            kind.of({old: 1})


def test_old_name_of_a_claim_setting_names_the_new_one() -> None:
    names = {name for kind in CLAIMS for name in setting_names(kind)}
    assert set(renamed.CLAIMS.values()) <= names
    assert all(kind.renamed is renamed.CLAIMS for kind in CLAIMS)
    with pytest.raises(SettingsError, match="Use 'witness-state'"):
        cli.parse(CouncilSettings, ["--memory", "x"])


def test_old_name_of_a_variable_names_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLSIGN_STATE", "elsewhere")
    with pytest.raises(SettingsError, match=r"MTLSIGN_STATE was renamed\. Set MTLSIGN_STATE_DIR"):
        ServiceSettings.load()
    monkeypatch.setenv("MTLSIGN_EPOCHS", "3")
    with pytest.raises(SettingsError, match="Set MTLSIGN_PHASE1__EPOCHS"):
        cli.parse(EmbedSettings, [])


def test_old_perturbation_kind_names_the_new_one() -> None:
    for old, new in renamed.PERTURBATION_KINDS.items():
        assert new in PERTURBATION_KINDS and old not in PERTURBATION_KINDS
        with pytest.raises(SettingsError, match=f"^perturbation.kinds: {old!r} was renamed: use {new!r}"):
            EmbedSettings.of({"perturbation.kinds": f"noise,{old}"})


def test_old_study_names_the_new_one() -> None:
    for old, new in renamed.STUDIES.items():
        assert ReproduceSettings.of({"study": new}).study == new
        with pytest.raises(SettingsError, match=f"^study: {old!r} was renamed: use {new!r}"):
            ReproduceSettings.of({"study": old})
