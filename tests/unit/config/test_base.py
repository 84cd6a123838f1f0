"""Settings: limits, unknown names, nested groups, YAML files, dumps, resumed settings, secrets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtlsign.config.attack import AttackSettings
from mtlsign.config.base import Settings, dump, field_info, setting_names
from mtlsign.config.embed import EmbedSettings, Phase1Settings
from mtlsign.config.embed_defaults import RECIPES
from mtlsign.config.service import ServiceSettings
from mtlsign.config.sources import command_line
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import SettingsError


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lamda1", "lambda1"),
        ("key-sise", "key-size"),
        ("worker", "workers"),
        ("wm_learning_rate", None),
        ("jsn", "json"),
        ("phase1.epoch", "phase1.epochs"),
        ("refresh_stepz", "perturbation.refresh-steps"),
    ],
)
def test_of_unknown_setting_names_the_nearest(name: str, nearest: str | None) -> None:
    with pytest.raises(SettingsError) as caught:
        EmbedSettings.of({name: 1})
    if nearest is None:
        assert "Did you mean" in str(caught.value) or "--help-all" in str(caught.value)
    else:
        assert f"Did you mean '{nearest}'?" in str(caught.value)
    assert caught.value.field == name


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
        ("phase1.lr", 0),
        ("perturbation.max_prune_ratio", 1.0),
        ("head", "public"),
        ("perturbation.kinds", ""),
        ("perturbation.kinds", "noise,quantised"),
        ("perturbation.kinds", ["noise", 3]),
        ("perturbation.kinds", 3),
        ("run", "../x"),
        ("run", "a\n"),
        ("resume", "a/b"),
        ("seed", -1),
        ("seed", 2**31),
        ("phase2.steps", 0),
        ("phase2.lr", float("nan")),
        ("phase2.temperature", 0),
        ("phase2.distillation", float("nan")),
        ("gpus_per_worker", float("nan")),
        ("name", ""),
        ("task", "x" * 201),
        ("width", 129),
    ],
)
def test_of_value_beyond_its_limits_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        EmbedSettings.of({name: value})
    assert caught.value.field == name.replace("_", "-") and str(caught.value).startswith(
        f"{caught.value.field}: "
    )
    assert len(str(caught.value).splitlines()) == 1 and "http" not in str(caught.value)


def test_of_name_of_a_run_with_other_characters_states_the_allowed_ones() -> None:
    message = r"^run: A name begins with a letter or a digit, .* '\.', '_' and '-'\. \(got 'a,b'\)$"
    with pytest.raises(SettingsError, match=message):
        EmbedSettings.of({"run": "a,b"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_evidence_bits", float("nan")),
        ("gamma", 0.5),
        ("control_keys", -1),
        ("min_evidence_bits", -1),
    ],
)
def test_of_policy_of_the_verifier_is_limited(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name.replace("_", "-")):
        VerifySettings.of({"model": "m", "kit": "k", name: value})


def test_of_required_settings_and_lists() -> None:
    with pytest.raises(SettingsError, match=r"^kit: This setting is required\. See --help\.$"):
        VerifySettings.of({"model": "m"})
    with pytest.raises(SettingsError, match=r"^model: "):
        VerifySettings.of({"model": [], "kit": "k"})
    assert VerifySettings.of({"model": "a, b,,c", "kit": "k"}).models == ("a, b,,c",)
    assert VerifySettings.of({"model": ["a", "b"], "kit": "k"}).models == ("a", "b")


def test_of_group_accepts_nested_and_dotted_names() -> None:
    settings = EmbedSettings.of({"phase1": {"epochs": 3, "batch": 5}, "phase1.batch": 6, "phase2.steps": "9"})
    assert (settings.phase1.epochs, settings.phase1.batch, settings.phase2.steps) == (3, 6, 9)
    assert settings.given_values() == {"phase1.batch": 6, "phase1.epochs": 3, "phase2.steps": 9}
    group = Phase1Settings.model_validate({"epochs": 4})
    assert EmbedSettings.of({"phase1": group}).given_values() == {"phase1.epochs": 4}
    assert settings.flat_dump()["phase1.batch"] == 6 and "phase1" not in settings.flat_dump()
    with pytest.raises(SettingsError, match=r"^phase1: Unknown setting"):
        EmbedSettings.of({"phase1": 3})


def test_with_defaults_depends_on_task_and_head() -> None:
    settings = EmbedSettings.of({})
    assert (settings.width, settings.key_size, settings.phase1.epochs) == (None, None, None)
    digits = EmbedSettings.of({"head": "keyed"}).with_defaults()
    free = EmbedSettings.of({"task": "cifar10", "head": "free"}).with_defaults()
    assert (digits.width, digits.key_size, digits.phase1.epochs) == (
        16,
        1024,
        RECIPES["digits"]["phase1.epochs"],
    )
    assert (digits.phase2.steps, digits.phase1.lr, digits.phase2.lr) == (600, 0.1, 0.002)
    assert (free.width, free.key_size, free.stem) == (64, 600, "cifar")
    assert (free.phase1.lr, free.phase2.lr, free.phase2.steps, free.phase1.epochs) == (0.05, 0.001, 800, 30)
    assert digits.perturbation.tuning_lr == digits.phase1.lr
    own = EmbedSettings.of(
        {
            "task": "a.b:f",
            "head": "keyed",
            "model": "c.d:g",
            "width": 32,
            "key_size": 256,
            "name": "mine",
            "perturbation.tuning_lr": 0.3,
        }
    )
    complete = own.with_defaults()
    assert (complete.width, complete.key_size, complete.name) == (32, 256, "mine")
    assert complete.perturbation.tuning_lr == 0.3
    assert own.model_copy(update={"name": None}).with_defaults().name == "a.b.f-c.d.g"
    assert complete.with_defaults() == complete
    kinds = EmbedSettings.of({"perturbation.kinds": " noise , pruned"}).perturbation.kinds
    assert kinds == ("noise", "pruned")


@pytest.mark.parametrize(("task", "epochs"), [("imdb", 5), ("sst2", 6), ("sst5@0.5", 6)])
def test_with_defaults_of_text_tasks_use_adam(task: str, epochs: int) -> None:
    settings = EmbedSettings.of({"task": task}).with_defaults()
    phase1 = settings.phase1
    assert (phase1.optimizer, phase1.lr, phase1.epochs) == ("adam", 0.002, epochs)
    assert (phase1.batch, phase1.weight_decay) == (64, 0.0)
    assert settings.with_defaults() == settings
    values = {"epochs": 2, "batch": 128, "optimizer": "sgd", "weight_decay": 5e-4}
    chosen = EmbedSettings.of({"task": task, "phase1": values}).with_defaults()
    assert {name: getattr(chosen.phase1, name) for name in values} == values
    assert chosen.phase1.lr == 0.05
    assert "--phase1.batch" in chosen.flags() and "--phase1.weight-decay" in chosen.flags()


def test_resume_flags_name_workers_and_storage_that_are_not_the_default() -> None:
    assert EmbedSettings.of({}).resume_flags("a1") == "--resume a1"
    assert EmbedSettings.of({"workers": 0}).resume_flags("a1") == "--resume a1 --workers 0"
    elsewhere = {"workers": 0, "storage": "my runs"}
    assert EmbedSettings.of(elsewhere).resume_flags("a1") == "--resume a1 --workers 0 --storage 'my runs'"
    assert EmbedSettings.of({"storage": "s3://b/p"}).resume_flags("a1") == "--resume a1 --storage s3://b/p"


def test_with_defaults_of_imdb_and_pretrained_models_have_other_margins() -> None:
    assert EmbedSettings.of({"task": "imdb@0.3"}).with_defaults().phase2.margin == 3.0
    assert EmbedSettings.of({"task": "sst2"}).with_defaults().phase2.margin == 4.0
    pretrained = EmbedSettings.of({"task": "imdb", "model": "hf:base", "tokenizer": "t.json"})
    assert pretrained.with_defaults().phase2.margin == 8.0
    own = EmbedSettings.of({"task": "imdb", "phase2.margin": 4.0}).with_defaults()
    assert own.phase2.margin == 4.0 and own.with_defaults() == own


@pytest.mark.parametrize(
    ("settings", "margin"),
    [
        ({"width": 16}, 8.5),
        ({"width": 24}, 12.75),
        ({"width": 32}, 16.0),
        ({}, 16.0),
        ({"width": 4}, 4.0),
        ({"width": 16, "keys": 2}, 6.01),
        ({"width": 16, "key_size": 512}, 12.02),
        ({"width": 16, "phase2.margin": 3.0}, 3.0),
    ],
)
def test_with_defaults_of_image_tasks_scale_the_margin_with_width(
    settings: dict[str, Any], margin: float
) -> None:
    chosen = EmbedSettings.of({"task": "fashion-mnist@0.5", **settings}).with_defaults()
    phase2 = chosen.phase2
    weights = (40.0, 10.0, 1000) if settings.get("width", 64) < 32 else (20.0, 5.0, 500)
    assert phase2.margin == margin
    assert (phase2.distillation, phase2.task_loss, phase2.steps) == weights
    assert chosen.with_defaults() == chosen


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "digits"},
        {"task": "files"},
        {"task": "cifar10", "model": "timm/vit_tiny_patch16_224"},
        {"task": "cifar10", "preset": "keyed"},
        {"task": "cifar10", "preset": "keyed", "head": "keyed"},
        {"task": "cifar10", "head": "keyed"},
    ],
)
def test_with_defaults_of_other_networks_and_heads_have_the_common_margin(settings: dict[str, Any]) -> None:
    phase2 = EmbedSettings.of(settings).with_defaults().phase2
    assert (phase2.margin, phase2.distillation) == (4.0, 4.0)


@pytest.mark.parametrize("task", ["files", "virusshare@0.5"])
def test_with_defaults_of_byte_images_are_a_narrow_network(task: str) -> None:
    settings = EmbedSettings.of({"task": task}).with_defaults()
    assert (settings.model, settings.width, settings.stem) == ("resnet18", 16, "stock")
    assert (settings.phase1.epochs, settings.phase1.batch, settings.phase1.optimizer) == (10, 128, "sgd")


def test_with_defaults_of_image_tasks_use_sgd() -> None:
    phase1 = EmbedSettings.of({"task": "cifar10"}).with_defaults().phase1
    assert (phase1.optimizer, phase1.batch, phase1.weight_decay, phase1.lr) == ("sgd", 128, 5e-4, 0.05)


def test_with_defaults_of_adam_in_phase_1_leave_rate_of_tuning_by_sgd() -> None:
    settings = EmbedSettings.of({"head": "keyed", "phase1.optimizer": "adam", "phase1.lr": 0.001})
    complete = settings.with_defaults()
    assert complete.phase1.lr == 0.001 and complete.perturbation.tuning_lr == 0.1


@pytest.mark.parametrize("head", ["keyed", "free"])
def test_with_defaults_of_feature_heads_are_those_of_the_first_release(head: str) -> None:
    settings = EmbedSettings.of({"head": head}).with_defaults()
    perturbation = settings.perturbation
    assert (settings.lambda1, settings.lambda2, settings.r_func) == (0.001, 1.0, "weights")
    assert perturbation.kinds == ("noise", "pruned", "decorrelated", "spoiled")
    assert (perturbation.inner_steps, perturbation.refresh_steps) == (8, 8)
    assert (perturbation.tuning_optimizer, perturbation.tuning_lr) == ("sgd", settings.phase1.lr)
    assert (perturbation.tuning_distillation, settings.phase2.task_loss) == (0.0, 0.0)
    assert settings.phase2.steps == 600 and settings.phase2.lr == 0.002


def test_with_defaults_of_spread_head_fill_every_setting() -> None:
    settings = EmbedSettings.of({"head": "spread", "task": "custom"}).with_defaults()
    perturbation = settings.perturbation
    assert settings.r_func == "responses" and settings.key_size == 1024
    assert settings.lambda1 == 3.0 and settings.lambda2 == 0.0
    assert perturbation.kinds == ("fine_tuned",) and perturbation.tuning_optimizer == "adam"
    assert (perturbation.inner_steps, perturbation.refresh_steps, perturbation.tuning_lr) == (12, 24, 0.01)
    assert (perturbation.tuning_distillation, settings.phase2.task_loss) == (1.0, 1.0)
    assert (settings.phase2.steps, settings.phase2.lr) == (500, 0.00025)
    assert settings.with_defaults() == settings
    open_settings = {
        "owner",
        "passphrase_file",
        "endpoint",
        "data",
        "weights",
        "weights_key",
        "layers",
        "taps",
        "run",
    }
    open_settings |= {
        "tokenizer",
        "phase1.initial_weights",
        "carrier_size",
        "base_kit",
        "adapter",
        "recipient",
        "resume",
        "cpus_per_worker",
    }
    empty = {name for name, value in settings.flat_dump().items() if value is None}
    assert {name.replace("-", "_") for name in empty} <= open_settings, "a default is missing"


def test_with_defaults_keep_given_values_of_the_spread_head() -> None:
    values = {
        "head": "spread", "lambda1": 0.5, "lambda2": 2.0, "perturbation.kinds": "noise", "phase2.steps": 7,
        "phase2.task_loss": 0.0, "perturbation.tuning_optimizer": "sgd", "perturbation.inner_steps": 3,
    }  # fmt: skip
    settings = EmbedSettings.of(values).with_defaults()
    assert (settings.lambda1, settings.lambda2, settings.phase2.steps) == (0.5, 2.0, 7)
    assert settings.perturbation.kinds == ("noise",) and settings.phase2.task_loss == 0.0
    assert settings.perturbation.tuning_lr == settings.phase1.lr and settings.perturbation.inner_steps == 3
    weights = EmbedSettings.of({"head": "spread", "r_func": "weights"}).with_defaults()
    assert (weights.r_func, weights.lambda1) == ("weights", 0.001)


def test_with_defaults_of_preset_give_way_to_given_values() -> None:
    paper = EmbedSettings.of({"preset": "paper"}).with_defaults()
    assert (paper.head, paper.key_size, paper.lambda1, paper.lambda2) == ("free", 600, 0.1, 0.1)
    assert paper.perturbation.kinds == ("fine_tuned",) and paper.phase2.distillation == 0.0
    assert EmbedSettings.of({"preset": "paper", "lambda1": 0.3}).with_defaults().lambda1 == 0.3
    assert EmbedSettings.of({"preset": "keyed"}).with_defaults().head == "keyed"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"head": "keyed", "r_func": "responses"}, "r-func"),
        ({"head": "free", "layers": "conv1"}, "layers"),
        ({"head": "spread", "lambda2": 1, "perturbation.kinds": "noise,decorrelated"}, "perturbation.kinds"),
        ({"head": "free", "keys": 2}, "keys"),
        ({"base_kit": "kits/1", "weights": "w0.safetensors"}, "base-kit"),
    ],
)
def test_with_defaults_of_settings_that_exclude_one_another_raises(
    values: dict[str, object], field: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        EmbedSettings.of(values).with_defaults()
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"head": "keyed", "readouts": "spread", "r_func": "responses", "layers": "conv1"},
        {"head": "keyed", "r_func": "responses", "lambda1": 0},
        {"head": "spread", "readouts": "keyed", "lambda2": 1, "perturbation.kinds": "decorrelated"},
        {"head": "spread", "lambda2": 0, "perturbation.kinds": "decorrelated"},
        {"head": "keyed", "keys": 16},
    ],
)
def test_with_defaults_of_settings_that_fit_their_heads_passes(values: dict[str, object]) -> None:
    settings = EmbedSettings.of(values).with_defaults()
    assert settings.with_defaults() == settings


def test_readouts_setting_accepts_at_most_three_key_derived_heads() -> None:
    assert EmbedSettings.of({"readouts": " keyed , spread"}).readouts == ("keyed", "spread")
    assert EmbedSettings.of({}).readouts == ()
    for value in ("free", "keyed,keyed,keyed,keyed", ["keyed", 3], 3):
        with pytest.raises(SettingsError, match=r"^readouts"):
            EmbedSettings.of({"readouts": value})


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        EmbedSettings.of({}).lambda1 = 3.0  # type: ignore[misc]
    with pytest.raises(Exception, match="frozen"):
        EmbedSettings.of({}).phase1.batch = 3  # type: ignore[misc]


def test_dump_is_read_again() -> None:
    settings = EmbedSettings.of(
        {"lambda1": 0.5, "json": True, "owner": "/o", "perturbation.kinds": "noise,fine_tuned"}
    ).with_defaults()
    assert EmbedSettings.of(json.loads(dump(settings))) == settings


def test_updated_replaces_settings_of_groups() -> None:
    settings = EmbedSettings.of({"phase1.batch": 5})
    changed = settings.updated({"phase1.epochs": 2, "phase1.lr": 0.5, "seed": 7})
    assert (changed.phase1.epochs, changed.phase1.lr, changed.phase1.batch, changed.seed) == (2, 0.5, 5, 7)
    assert settings.phase1.epochs is None and settings.seed == 0


def test_resumed_with_refuses_a_changed_result_and_takes_the_rest() -> None:
    stored = EmbedSettings.of({"lambda1": 0.5, "phase2.steps": 7, "workers": 2}).with_defaults()
    changes = EmbedSettings.of({"resume": "a", "workers": 4, "json": True, "phase2.steps": 7})
    resumed = stored.resumed_with(changes, "a")
    assert (resumed.workers, resumed.json_output, resumed.resume, resumed.lambda1) == (4, True, "a", 0.5)
    for name, value in {"phase2.steps": 8, "lambda1": 0.6, "perturbation.per_step": 2}.items():
        with pytest.raises(SettingsError, match=r"Run 'a' has the value .* start a new run") as caught:
            stored.resumed_with(EmbedSettings.of({name: value}), "a")
        assert caught.value.field == name.replace("_", "-")


def test_resumable_settings_exist_and_exclude_the_results() -> None:
    names = set(setting_names(EmbedSettings).values())
    assert names >= EmbedSettings.resumable
    results = {
        *(
            "task",
            "model",
            "lambda1",
            "lambda2",
            "seed",
            "key_size",
            "head",
            "weights",
            "name",
            "insecure_test_key",
        ),
        *(name for name in names if "." in name),
    }
    assert not results & EmbedSettings.resumable


def test_every_setting_has_a_description() -> None:
    kinds: tuple[type[Settings], ...] = (EmbedSettings, VerifySettings)
    for kind in kinds:
        for name, field in setting_names(kind).items():
            description = field_info(kind, field).description
            assert description and len(description) > 5, name


@pytest.mark.parametrize("value", ["ab" * 63, "ab" * 70, 0xABABAB])
def test_of_secret_is_not_repeated_in_the_error(value: object) -> None:
    with pytest.raises(SettingsError) as caught:
        ServiceSettings.of({"signing_key": value})
    assert str(caught.value).startswith("signing-key: ") and "got" not in str(caught.value)
    assert "abab" not in str(caught.value) and str(0xABABAB) not in str(caught.value)
    with pytest.raises(SettingsError, match="got '70000'"):
        ServiceSettings.of({"port": 70_000, "signing_key": "ab" * 64})


def test_flags_name_every_setting_that_differs_from_its_default() -> None:
    settings = AttackSettings.of(
        {
            "model": "a b",
            "attacks": "int8",
            "seed": 3,
            "keep_models": False,
            "other_marked_models": ["x", "y"],
        }
    )
    flags = ["--seed", "3", "--model", "a b", "--attacks", "int8", "--other-marked-models", "x"]
    flags += ["--other-marked-models", "y", "--no-keep-models"]
    assert sorted(settings.flags()) == sorted(flags)
    assert (
        AttackSettings.of(command_line(AttackSettings, settings.flags(), description="", program="x"))
        == settings
    )
    assert settings.flags(without={"seed", "keep_models", "other_marked_models", "model"}) == [
        "--attacks",
        "int8",
    ]
