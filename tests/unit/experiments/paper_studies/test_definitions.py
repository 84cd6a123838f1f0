"""Tests of the studies' search spaces and attacks."""

from __future__ import annotations

from typing import Any

from mtlsign.attacks import ATTACKS, parse_attacks
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.experiments.paper_studies import definitions, tables
from mtlsign.experiments.sweeps.space import cells_of, load_space

DEFAULT_KINDS = "noise,pruned,decorrelated,spoiled"


def study(**values: Any) -> ReproduceSettings:
    return ReproduceSettings.of({"study": "ablation", **values})


def embeddings_of(settings: ReproduceSettings) -> list[EmbedSettings]:
    sweep = definitions.sweep_settings(settings)
    return [cell.settings for cell in cells_of(load_space(sweep), sweep)]


def attack_names(settings: ReproduceSettings) -> list[str]:
    return [plan.name for plan in parse_attacks(definitions.sweep_settings(settings).attacks)]


def test_ablation_crosses_regularisers_heads_and_seeds() -> None:
    cells = embeddings_of(study())
    assert len(cells) == 4 * 2 * 3 and {cell.perturbation.kinds for cell in cells} == {("fine_tuned",)}
    assert {(c.lambda1, c.lambda2) for c in cells} == {(a, b) for a in (0, 0.1) for b in (0, 0.1)}
    assert attack_names(study()) == ["prune_channels"] * 9 + ["fine_prune_channels"]
    assert attack_names(study(units="weights")) == ["prune"] * 9 + ["fine_prune"]


def test_overwriting_runs_epochs_of_the_paper_with_both_adversaries() -> None:
    settings = study(study="overwriting", heads="keyed", seeds=2)
    assert [(cell.head, cell.seed) for cell in embeddings_of(settings)] == [("keyed", 0), ("keyed", 1)]
    plans = parse_attacks(definitions.sweep_settings(settings).attacks)
    parameters = [dict(word.split("=", 1) for word in plan.parameters.split()) for plan in plans]
    assert [(p["epochs"], p["head"]) for p in parameters] == [
        (str(epochs), "keyed") for epochs in (50, 150, 250, 350)
    ]
    both = parse_attacks(definitions.attacks(study(study="overwriting")))
    assert len(both) == 8


def test_ablation_of_preset_and_spread_head_switches_their_regularisers() -> None:
    cells = embeddings_of(study(heads="paper,spread", task="sst2", seeds=1))
    switched = [(c.preset, c.head, c.model, c.lambda1, c.lambda2) for c in cells]
    assert sorted(switched) == sorted(
        [("paper", "free", "bilstm", a, b) for a in (0, 0.1) for b in (0, 0.1)]
        + [("spread", "spread", "bilstm", a, b) for a in (0, 3) for b in (0, 1)]
    )
    assert {c.phase2.distillation for c in cells if c.head == "free"} == {0}
    assert {c.r_func for c in cells if c.head == "spread"} == {"responses"}
    assert [c.head for c in embeddings_of(study(heads="spread", seeds=1))] == ["spread"] * 4


def test_overwriting_of_preset_and_spread_head_equals_their_defaults() -> None:
    settings = study(study="overwriting", heads="paper,spread", task="files", seeds=1)
    cells = {cell.head: cell for cell in embeddings_of(settings)}
    for head, cell in cells.items():
        preset = "paper" if head == "free" else "spread"
        same = {"workers": 0, "insecure_test_key": True, "width": 16, "task": "files"}
        expected = EmbedSettings.of({**same, "preset": preset}).with_defaults()
        assert cell.flat_dump() == expected.flat_dump(), head
    plans = parse_attacks(definitions.sweep_settings(settings).attacks)
    assert [plan.name for plan in plans] == ["overwrite"] * 4
    assert all("head=same" in plan.parameters for plan in plans), "the attacker has the owner's head"


def test_attacks_study_runs_all_attacks_on_both_heads_with_and_without_r_da() -> None:
    settings = study(study="attacks")
    cells = embeddings_of(settings)
    assert {(c.head, c.lambda2) for c in cells} == {(a, b) for a in ("keyed", "free") for b in (0, 1)}
    assert len(cells) == 12
    assert set(ATTACKS) - set(attack_names(settings)) == {"none", "average_models"}


def test_perturbation_ablation_variants_differ_only_in_copies() -> None:
    settings = study(study="perturbation_ablation", heads="keyed", seeds=1, attacks="int8")
    assert definitions.sweep_settings(settings).attacks == "int8"
    rows = [
        {
            "lambda2": cell.lambda2,
            "perturbation.kinds": ",".join(cell.perturbation.kinds),
            "perturbation.noise_sigma": cell.perturbation.noise_sigma,
            "head": cell.head,
        }
        for cell in embeddings_of(settings)
    ]
    kinds = [tables.variant_of(row)["R_DA"] for row in rows]
    expected = ["fine_tuned", "noise", "pruned", DEFAULT_KINDS, "the model itself", "none"]
    assert sorted(kinds) == sorted(expected)
    from_csv = {"lambda2": 1, "perturbation.kinds": "noise", "perturbation.noise_sigma": "0"}
    assert tables.variant_of(from_csv)["R_DA"] == "the model itself"


def test_perturbation_ablation_with_fixed_setting_has_fewer_variants() -> None:
    settings = study(study="perturbation_ablation", heads="keyed", set=["lambda2=0.5"], seeds=1)
    cells = embeddings_of(settings)
    assert {cell.lambda2 for cell in cells} == {0.5}
    assert len({cell.perturbation.noise_sigma for cell in cells}) == 2


def test_sweep_settings_of_resumed_study_hold_only_explicit_settings() -> None:
    sweep = definitions.sweep_settings(study(resume="a", seeds=2))
    assert sweep.num_samples == 2 and sweep.model_fields_set == {
        "resume", "num_samples", "space", "json_output",
    }  # fmt: skip
