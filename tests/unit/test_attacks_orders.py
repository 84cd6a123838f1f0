"""`--attacks`: what it takes, and what it refuses in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.attacks import ATTACKS, describe, parse_attacks
from mtlsign.attacks.base import settings_of
from mtlsign.attacks.expressions import MAX_TEXT, _expand_step, row_header
from mtlsign.errors import SettingsError


def texts(text: str) -> list[str]:
    return [order.text() for order in parse_attacks(text)]


def test_settings_alternatives_and_chains() -> None:
    rows = parse_attacks("ftal:lr=quarter/full,epochs=3,prune:ratio=0.5+ftal")
    assert [r.name for r in rows] == ["ftal", "ftal", "prune+ftal"]
    assert rows[0].setting == "lr=quarter epochs=3 path=constant batch=128"
    assert rows[1].setting.startswith("lr=full epochs=3")
    assert rows[2].setting.startswith("ratio=0.5 bn=kept + lr=quarter epochs=5")
    assert texts("prune,ratio=0.3") == texts("prune:ratio=0.3")
    assert texts("prune+ftal,epochs=2") == texts("prune+ftal:epochs=2")
    assert texts("ftal:lr=0.01") == texts("ftal:lr=1e-2,path=constant")
    assert len(parse_attacks("int8,int8,int8")) == 1


def test_kinds_of_chains() -> None:
    assert [o.kind for o in parse_attacks("none,bn_fold,bn_fold+ftal,forge_head+bn_fold,int8,none+bn_gauge")] == [
        "none", "free", "removal", "forgery", "removal", "free",
    ]  # fmt: skip


def test_sets_hold_every_attack_and_the_issues_settings() -> None:
    everything = parse_attacks("all")
    assert {link.name for o in everything for link in o.links} == set(ATTACKS)
    assert any(len(o.links) == 4 for o in everything)
    assert {o.name for o in parse_attacks("fast")} < set(ATTACKS) and parse_attacks("fast")[0].name == "none"
    settings = {f"{o.name} {o.setting}" for o in everything}
    for epochs in (50, 150, 250, 350):
        assert any(s.startswith(f"overwrite epochs={epochs} ") for s in settings)
    for name, steps in (("spoil", (20, 60, 200)), ("scrub", (40, 100, 300))):
        assert all(any(s.startswith(f"{name} steps={n} ") for s in settings) for n in steps)
    standard = {o.name for o in parse_attacks("standard")}
    assert {"ftal", "annealed", "fine_prune", "prune_until", "overwrite", "int8", "spoil", "scrub"} < standard


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no attack"),
        (" , ", "names no attack"),
        ("ftaal", "did you mean 'ftal'"),
        ("zzz", "see --attacks list"),
        ("ftal:speed=3", "has no setting 'speed=3'; it has lr, epochs"),
        ("ftal:lr", "has no setting 'lr'"),
        ("int8:bits=3", "it has none"),
        ("epochs=3", "belongs to no attack"),
        ("ftal:epochs=0", "greater than or equal to 1"),
        ("ftal:epochs=1.5", "refused"),
        ("ftal:lr=fast", "refused"),
        ("ftal:lr=-1", "refused"),
        ("prune:ratio=nan", "refused"),
        ("prune:ratio=1", "less than 1"),
        ("prune:ratio=0.5/", "refused"),
        ("prune:bn=none", "refused"),
        ("+".join(["int8"] * 9), "chains over 8"),
        ("prune:ratio=" + "/".join(f"0.{i}" for i in range(1000, 3100)), "over 2000 rows"),
        ("+".join([f"ftal:epochs={'/'.join(map(str, range(1, 99)))}"] * 8), "over 2000 rows"),
        (
            f"spoil:{','.join(f'{k}=' + '/'.join(map(str, range(2, 90))) for k in ('steps', 'lr'))}",
            "over 2000",
        ),
        ("int8," * MAX_TEXT, "over 20000 characters"),
    ],
)
def test_refusals_are_one_line_that_names_the_setting(text: str, told: str) -> None:
    with pytest.raises(SettingsError, match=r"^attacks: ") as error:
        parse_attacks(text)
    assert told in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@given(st.text(alphabet="abcdeftlrprune:=+/,. 0123456789_-", max_size=60))
def test_anything_is_parsed_or_refused(text: str) -> None:
    try:
        for order in parse_attacks(text):
            assert parse_attacks(order.text()) == [order]
    except SettingsError as error:
        assert str(error).startswith("attacks: ")


@given(st.sampled_from(sorted(ATTACKS)), st.floats(1e-6, 99, allow_nan=False), st.integers(1, 9999))
def test_texts_of_orders_are_read_back(name: str, lr: float, count: int) -> None:
    known = settings_of(ATTACKS[name].run)
    given_ = [f"lr={lr!r}"] if "lr" in known else []
    given_ += [f"{key}={count}" for key in ("epochs", "steps") if key in known]
    (link,) = _expand_step(f"{name}:{','.join(given_)}" if given_ else name)
    (order,) = parse_attacks(
        link.name + ":" + ",".join(f"{k}={v}" for k, v in link.settings) if known else name
    )
    assert order.links == (link,) and parse_attacks(order.text()) == [order]


def test_the_list_describes_every_attack() -> None:
    found = {d["attack"]: d for d in describe()}
    assert set(found) == set(ATTACKS) and all(0 < len(d["summary"]) < 100 for d in found.values())
    assert found["ftal"]["settings"] == {"lr": "quarter", "epochs": 5, "path": "constant", "batch": 128}
    assert row_header(parse_attacks("int8")[0]) == {"attack": "int8", "setting": "", "kind": "removal"}
