"""Text of `--attacks`: accepted forms, and one-line errors for all others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.attacks import ATTACKS, describe, parse_attacks
from mtlsign.attacks.base import parameters_of
from mtlsign.attacks.expressions import MAX_TEXT, _expand_step, row_header
from mtlsign.attacks.registry import RENAMED
from mtlsign.errors import SettingsError


def texts(text: str) -> list[str]:
    return [plan.text() for plan in parse_attacks(text)]


def test_parse_attacks_expands_parameters_alternatives_and_sequences() -> None:
    rows = parse_attacks("ftal:lr=quarter/full,epochs=3,prune:ratio=0.5+ftal")
    assert [r.name for r in rows] == ["ftal", "ftal", "prune+ftal"]
    assert rows[0].parameters == "lr=quarter epochs=3 schedule=constant batch=128"
    assert rows[1].parameters.startswith("lr=full epochs=3")
    assert rows[2].parameters.startswith("ratio=0.5 bn=kept + lr=quarter epochs=5")
    assert texts("prune,ratio=0.3") == texts("prune:ratio=0.3")
    assert texts("prune+ftal,epochs=2") == texts("prune+ftal:epochs=2")
    assert texts("ftal:lr=0.01") == texts("ftal:lr=1e-2,schedule=constant")
    assert len(parse_attacks("int8,int8,int8")) == 1


def test_kind_of_sequence_is_that_of_its_strongest_step() -> None:
    text = "none,bn_fold,bn_fold+ftal,ambiguity_trained_head+bn_fold,int8,none+bn_reparameterize"
    assert [plan.kind for plan in parse_attacks(text)] == [
        "none", "function_preserving", "removal", "ambiguity", "removal", "function_preserving",
    ]  # fmt: skip


def test_named_sets_hold_every_attack_and_required_parameters() -> None:
    everything = parse_attacks("all")
    assert {step.name for plan in everything for step in plan.steps} == set(ATTACKS)
    assert any(len(plan.steps) == 4 for plan in everything)
    fast = parse_attacks("fast")
    assert {plan.name for plan in fast} < set(ATTACKS) and fast[0].name == "none"
    rows = {f"{plan.name} {plan.parameters}" for plan in everything}
    for epochs in (50, 150, 250, 350):
        assert any(row.startswith(f"overwrite epochs={epochs} ") for row in rows)
    for name, counts in (("spoil", (20, 60, 200)), ("decorrelate", (40, 100, 300))):
        assert all(any(row.startswith(f"{name} steps={n} ") for row in rows) for n in counts)
    standard = {plan.name for plan in parse_attacks("standard")}
    required = {"ftal", "retrain", "fine_prune", "prune_to_accuracy_drop", "overwrite", "int8", "spoil"}
    assert required | {"decorrelate"} < standard


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no attack"),
        (" , ", "names no attack"),
        ("ftaal", "Did you mean 'ftal'"),
        ("zzz", "See --attacks list"),
        ("ftal:speed=3", "has no parameter 'speed=3'. Its parameters are: lr, epochs"),
        ("ftal:lr", "has no parameter 'lr'"),
        ("int8:bits=3", "Its parameters are: none"),
        ("epochs=3", "belongs to no attack"),
        ("ftal:epochs=0", "greater than or equal to 1"),
        ("ftal:epochs=1.5", "invalid"),
        ("ftal:lr=fast", "invalid"),
        ("ftal:lr=-1", "invalid"),
        ("prune:ratio=nan", "invalid"),
        ("prune:ratio=1", "less than 1"),
        ("prune:ratio=0.5/", "invalid"),
        ("prune:bn=none", "invalid"),
        ("ftal:path=cosine", "'path' of 'ftal' was renamed. Use 'schedule'"),
        ("prune:path=cosine", "has no parameter 'path=cosine'"),
        ("permute_channels:which=stream", "'residual'"),
        ("+".join(["int8"] * 9), "sequence of over 8"),
        ("prune:ratio=" + "/".join(f"0.{i}" for i in range(1000, 3100)), "over 2000 rows"),
        ("+".join([f"ftal:epochs={'/'.join(map(str, range(1, 99)))}"] * 8), "over 2000 rows"),
        (
            f"spoil:{','.join(f'{k}=' + '/'.join(map(str, range(2, 90))) for k in ('steps', 'lr'))}",
            "over 2000",
        ),
        ("int8," * MAX_TEXT, "over 20000 characters"),
    ],
)
def test_parse_attacks_of_invalid_text_raises_one_line_error(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=r"^attacks: ") as error:
        parse_attacks(text)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_parse_attacks_of_old_name_raises_error_with_new_name(old: str, new: str) -> None:
    for text in (old, f"{old}:steps=3", f"int8+{old}"):
        with pytest.raises(SettingsError, match=rf"^attacks: The attack '{old}' was renamed. Use '{new}'."):
            parse_attacks(text)


@given(st.text(alphabet="abcdeftlrprune:=+/,. 0123456789_-", max_size=60))
def test_parse_attacks_of_any_text_returns_plans_or_raises_settings_error(text: str) -> None:
    try:
        for plan in parse_attacks(text):
            assert parse_attacks(plan.text()) == [plan]
    except SettingsError as error:
        assert str(error).startswith("attacks: ")


@given(st.sampled_from(sorted(ATTACKS)), st.floats(1e-6, 99, allow_nan=False), st.integers(1, 9999))
def test_parse_attacks_reads_text_of_plans(name: str, lr: float, count: int) -> None:
    known = parameters_of(ATTACKS[name].run)
    values = [f"lr={lr!r}"] if "lr" in known else []
    values += [f"{key}={count}" for key in ("epochs", "steps") if key in known]
    (step,) = _expand_step(f"{name}:{','.join(values)}" if values else name)
    (plan,) = parse_attacks(step.name + ":" + ",".join(f"{k}={v}" for k, v in step.values) if known else name)
    assert plan.steps == (step,) and parse_attacks(plan.text()) == [plan]


def test_describe_lists_every_attack() -> None:
    entries = {entry["attack"]: entry for entry in describe()}
    assert set(entries) == set(ATTACKS)
    assert all(0 < len(entry["summary"]) < 100 for entry in entries.values())
    assert entries["ftal"]["settings"] == {
        "lr": "quarter", "epochs": 5, "schedule": "constant", "batch": 128,
    }  # fmt: skip
    assert row_header(parse_attacks("int8")[0]) == {"attack": "int8", "parameters": "", "kind": "removal"}
