"""One door for settings: typed, limited, and every refusal names the field and the fix in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.base import MAX_CONFIG_BYTES, dump, read_config
from mtlsign.config.embed import RECIPES, EmbedSettings
from mtlsign.config.service import ServiceSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import SettingsError


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lamda1", "lambda1"),
        ("key-sise", "key-size"),
        ("worker", "workers"),
        ("wm_learning_rate", "learning"),
        ("jsn", "json"),
    ],
)
def test_an_unknown_setting_names_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(SettingsError) as caught:
        EmbedSettings.of({wrong: 1})
    if meant == "learning":
        assert "did you mean" in str(caught.value) or "--help" in str(caught.value)
    else:
        assert f"did you mean '{meant}'?" in str(caught.value)
    assert caught.value.field == wrong


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lambda1", -1),
        ("lambda1", float("nan")),
        ("lambda2", float("inf")),
        ("lambda1", "much"),
        ("key_size", 127),
        ("key_size", 4097),
        ("key_size", 600.5),
        ("workers", -1),
        ("workers", "two"),
        ("lr", 0),
        ("prune", 1.0),
        ("head", "public"),
        ("snapshots", ""),
        ("snapshots", "noise,quantised"),
        ("run", "../x"),
        ("run", "a\n"),
        ("resume", "a/b"),
        ("seed", -1),
        ("seed", 2**31),
        ("steps", 0),
        ("wm_lr", float("nan")),
        ("temperature", 0),
        ("distillation", float("nan")),
        ("gpus_per_worker", float("nan")),
        ("name", ""),
        ("task", "x" * 201),
    ],
)
def test_values_beyond_their_limits(name: str, value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        EmbedSettings.of({name: value})
    assert caught.value.field == name.replace("_", "-") and str(caught.value).startswith(
        f"{caught.value.field}: "
    )
    assert len(str(caught.value).splitlines()) == 1 and "http" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("bits", float("nan")), ("gamma", 0.5), ("controls", -1), ("bits", -1)]
)
def test_the_verifiers_policy_is_limited(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name):
        VerifySettings.of({"model": "m", "kit": "k", name: value})


def test_required_and_lists() -> None:
    with pytest.raises(SettingsError, match=r"^kit: Field required"):
        VerifySettings.of({"model": "m"})
    assert VerifySettings.of({"model": "a, b,,c", "kit": "k"}).models == ["a", "b", "c"]


def test_defaults_are_valid_and_resolved_by_task_and_head() -> None:
    settings = EmbedSettings.of({})
    assert (settings.width, settings.key_size, settings.epochs) == (None, None, None)
    digits, free = settings.resolved(), EmbedSettings.of({"task": "cifar10", "head": "free"}).resolved()
    assert (digits.width, digits.key_size, digits.epochs) == (16, 1024, RECIPES["digits"]["epochs"])
    assert (free.width, free.key_size, free.stem) == (64, 600, "cifar") and digits.inner_lr == digits.lr
    own = EmbedSettings.of(
        {"task": "a.b:f", "model": "c.d:g", "width": 32, "key_size": 256, "name": "mine", "inner_lr": 0.3}
    )
    done = own.resolved()
    assert (done.width, done.key_size, done.name, done.inner_lr) == (32, 256, "mine", 0.3)
    assert own.model_copy(update={"name": None}).resolved().name == "a.b.f-c.d.g"
    assert done.resolved() == done
    assert EmbedSettings.of({"snapshots": " noise , pruned"}).kinds == ("noise", "pruned")


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(Exception, match="frozen"):
        EmbedSettings.of({}).lambda1 = 3.0  # type: ignore[misc]


def test_what_is_dumped_is_read_again() -> None:
    settings = EmbedSettings.of(
        {"lambda1": 0.5, "json": True, "owner": "/o", "snapshots": "noise,tuned"}
    ).resolved()
    assert EmbedSettings.of(json.loads(dump(settings))) == settings


def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lambda1: 0.5\nkey-size: 256\nsnapshots: tuned\ndata: null\n")
    assert read_config(path) == {"lambda1": 0.5, "key_size": 256, "snapshots": "tuned", "data": None}
    assert EmbedSettings.of(read_config(path)).key_size == 256
    path.write_text("")
    assert read_config(path) == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- 1\n- 2\n", "not a mapping"),
        (b"1: 2\n", "not a mapping"),
        (b"a: [\n", "not YAML in line 2"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"a: !!python/object/apply:os.system [true]\n", "not YAML"),
        (b"#" * (MAX_CONFIG_BYTES + 1), "over"),
        (b"[" * 100_000, "not YAML"),
    ],
)
def test_bad_config_files(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^config: .*{says}"):
        read_config(path)
    with pytest.raises(SettingsError, match=r"^config: cannot be read"):
        read_config(tmp_path / "absent.yaml")


def test_every_option_says_what_it_is() -> None:
    for kind in (EmbedSettings, VerifySettings):
        for name, field in kind.model_fields.items():
            assert field.description and len(field.description) > 5, name


@pytest.mark.parametrize("given", ["ab" * 63, "ab" * 70, 0xABABAB])
def test_a_secret_is_not_repeated_in_a_refusal(given: object) -> None:
    with pytest.raises(SettingsError) as caught:
        ServiceSettings.of({"signing_key": given})
    assert str(caught.value).startswith("signing-key: ") and "got" not in str(caught.value)
    assert "abab" not in str(caught.value) and str(0xABABAB) not in str(caught.value)
    with pytest.raises(SettingsError, match="got '70000'"):
        ServiceSettings.of({"port": 70_000, "signing_key": "ab" * 64})
