"""The paper's studies: what they run, and how rows become the paper's tables."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from mtlsign.attacks import ATTACKS, parse_attacks
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import SettingsError
from mtlsign.experiments.paper_studies import definitions, random_keys, run
from mtlsign.experiments.sweeps.space import cells_of, load_space
from mtlsign.tasks import Task

FIXED = "width=8,key_size=128,epochs=1,steps=12,batch=16,primary_batch=16,inner_steps=1"


def of(**values: Any) -> ReproduceSettings:
    return ReproduceSettings.of({"study": "ablation", **values})


def test_the_ablation_crosses_both_regularisers_heads_and_seeds() -> None:
    s = definitions.sweep_settings(of())
    cells = [cell.settings for cell in cells_of(load_space(s), s)]
    assert len(cells) == 4 * 2 * 3 and {c.snapshots for c in cells} == {"tuned"}
    assert {(c.lambda1, c.lambda2) for c in cells} == {(a, b) for a in (0, 0.1) for b in (0, 0.1)}
    orders = [order.name for order in parse_attacks(s.attacks)]
    assert orders == ["prune_channels"] * 9 + ["fine_prune_channels"]
    orders = [order.name for order in parse_attacks(definitions.sweep_settings(of(units="weights")).attacks)]
    assert orders == ["prune"] * 9 + ["fine_prune"]


def test_overwriting_meets_the_papers_epochs_with_both_adversaries() -> None:
    s = definitions.sweep_settings(of(study="overwriting", heads="keyed", seeds=2))
    cells = [cell.settings for cell in cells_of(load_space(s), s)]
    assert [(c.head, c.seed) for c in cells] == [("keyed", 0), ("keyed", 1)]
    settings = [dict(order.links[0].settings) for order in parse_attacks(s.attacks)]
    assert [(x["epochs"], x["head"]) for x in settings] == [(e, "keyed") for e in (50, 150, 250, 350)]


def ablation_row(
    ratio: float | None, seed: int = 0, how: str = "prune_channels", **changes: Any
) -> dict[str, Any]:
    """A mark that falls below γ from pruning ratio `ratio` on; a ratio r costs 10·r points."""
    row: dict[str, Any] = {
        "status": "ok", "head": "keyed", "lambda1": 0.1, "lambda2": 0.1, "seed": seed,
        "primary_marked": 0.9 + seed / 100, f"wm fine_{how} ratio=0.5 epochs=5": 0.95,
    }  # fmt: skip
    for r in definitions.RATIOS:
        gone = ratio is not None and r >= ratio
        row[f"wm {how} ratio={r:g} bn=kept"] = 0.69 if gone else 0.7
        row[f"points lost {how} ratio={r:g} bn=kept"] = 10 * r
    return row | changes


@pytest.mark.parametrize("how", ["prune", "prune_channels"])
def test_the_ablations_table(how: str) -> None:
    rows = [
        ablation_row(0.4, how=how),
        ablation_row(0.6, 1, how),
        ablation_row(None, 2, how),
        ablation_row(0.1, how=how, status="diverged"),
    ]
    (found,) = definitions.table(of(), rows)
    assert found["n"] == 3 and found["R_func"] and found["R_DA"] and found["NP never does"] == 1
    assert found["primary"] == pytest.approx(0.91) and found["sd primary"] == pytest.approx(0.01)
    assert found["points lost until NP takes the mark below gamma"] == pytest.approx((4 + 6 + 9) / 3)
    assert found["wm accuracy after FP"] == pytest.approx(0.95)
    text = definitions.markdown([found])
    assert "0.91 ± 0.01" in text and "| with |" in text and len(text.splitlines()) == 3


def test_overwritings_table_stands_beside_the_papers() -> None:
    columns = {f"wm overwrite epochs={e} head=free n=0": 1 - e / 10_000 for e in (50, 350)}
    columns |= {f"bits overwrite epochs={e} head=free n=0": 600.0 - e for e in (50, 350)}
    rows = [{"status": "ok", "head": "free", "wm_accuracy": 1.0, "seed": i, **columns} for i in range(2)]
    found = definitions.table(of(study="overwriting"), rows)
    assert [(r["epochs"], r["the paper"], r["n"]) for r in found] == [(50, 2.0, 2), (350, 2.5, 2)]
    assert found[1]["points of wm accuracy lost"] == pytest.approx(3.5) and found[1]["bits left"] == 250


def test_the_table_of_attacks_has_both_heads_with_and_without_r_da() -> None:
    s = definitions.sweep_settings(of(study="attacks"))
    cells = [cell.settings for cell in cells_of(load_space(s), s)]
    assert {(c.head, c.lambda2) for c in cells} == {(a, b) for a in ("keyed", "free") for b in (0, 1)}
    assert len(cells) == 12
    left_out = set(ATTACKS) - {order.name for order in parse_attacks(s.attacks)}
    assert left_out == {"none", "average"}


def test_the_controls_differ_in_their_copies_alone() -> None:
    s = definitions.sweep_settings(of(study="controls", heads="keyed", seeds=1, attacks="int8"))
    assert s.attacks == "int8"
    rows = [{"lambda2": c.lambda2, "snapshots": c.snapshots, "noise": c.noise, "head": c.head}
            for c in (cell.settings for cell in cells_of(load_space(s), s))]  # fmt: skip
    kinds = [definitions.variant_of(row)["R_DA"] for row in rows]
    mixed = "noise,pruned,scrubbed,spoiled"
    assert (
        definitions.variant_of({"lambda2": 1, "snapshots": "noise", "noise": "0"})["R_DA"]
        == "the model itself"
    )
    assert sorted(kinds) == sorted(["tuned", "noise", "pruned", mixed, "the model itself", "none"])


def test_what_the_caller_fixes_leaves_fewer_arms() -> None:
    s = definitions.sweep_settings(of(study="controls", heads="keyed", fixed="lambda2=0.5", seeds=1))
    found = [cell.settings for cell in cells_of(load_space(s), s)]
    assert {c.lambda2 for c in found} == {0.5} and len({c.noise for c in found}) == 2


def test_the_table_of_attacks_has_means_per_arm() -> None:
    rows = [
        {"status": "ok", "lambda2": 1.0, "seed": i, "wm_accuracy": 1.0, "evidence_bits": 1000.0 + i,
         "primary_clean": 0.91, "primary_marked": 0.9, "wm int8": 0.9, "bits int8": 500.0 + 100 * i,
         "points lost int8": 0.5}
        for i in range(3)
    ]  # fmt: skip
    found, mixed = definitions.table(of(study="attacks"), rows), "noise,pruned,scrubbed,spoiled"
    assert [(r["head"], r["R_DA"], r["attack"], r["n"]) for r in found] == [
        ("keyed", mixed, "none", 3), ("keyed", mixed, "int8", 3),
    ]  # fmt: skip
    assert found[0]["points lost"] == pytest.approx(1.0)
    assert found[1]["bits"] == 600 and found[1]["sd bits"] == 100 and found[1]["fewest bits"] == 500


def test_the_band_tells_fair_coins_from_loaded_ones() -> None:
    draw = random.Random(1)

    def keys(p: float) -> list[float]:
        return [sum(draw.random() < p for _ in range(600)) / 600 for _ in range(400)]

    fair, loaded = (
        random_keys.compare_with_binomial(keys(0.5), 600),
        random_keys.compare_with_binomial(keys(0.51), 600),
    )
    assert fair["p"] > 0.001 > loaded["p"] and fair["keys"] == 400
    assert fair["sd of Binomial(N, 1/2)"] == pytest.approx(0.0204, abs=1e-4)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch, tiny_task: Task) -> None:
    for module in ("sweep", "sweep_run", "campaign", "embedding", "guesses"):
        monkeypatch.setattr(f"mtlsign.{module}.load_task", lambda *_, **__: tiny_task)


@pytest.mark.usefixtures("_tiny")
def test_a_study_runs_and_keeps_its_table(tmp_path: Path) -> None:
    s = of(study="overwriting", seeds=1, epochs="1", fixed=FIXED, storage=str(tmp_path), run="o", workers=0)
    answer = run.run_study(s)
    table = list(csv.DictReader(io.StringIO((tmp_path / "runs/o/study.csv").read_text())))
    assert {(r["owner's head"], r["adversary's head"]) for r in table} == {
        (a, b) for a in ("free", "keyed") for b in ("free", "keyed")
    }
    assert answer["text"] in (tmp_path / "runs/o/study.md").read_text()
    assert (tmp_path / "runs/o/cells.csv").exists()


@pytest.mark.usefixtures("_tiny")
def test_a_study_is_resumed_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"study": "attacks", "storage": str(tmp_path), "workers": 0}
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr("mtlsign.experiments.sweeps.run.LocalSweepBackend.sweep", _killed)
        run.run_study(of(**given, heads="keyed", seeds=1, attacks="int8", fixed=FIXED, run="a"))
    for other, field in (({"study": "controls"}, "space"), ({"seeds": 2}, "num-samples")):
        with pytest.raises(SettingsError, match=field):
            run.run_study(of(**{**given, **other}, resume="a"))
    answer = run.run_study(of(**given, resume="a"))
    assert [(r["R_DA"], r["attack"], r["n"]) for r in answer["rows"]] == [
        (copies, attack, 1)
        for copies in ("noise,pruned,scrubbed,spoiled", "none")
        for attack in ("none", "int8")
    ]


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("_tiny")
def test_random_keys_are_resumed_and_end_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = of(study="thresholds", width=8, keys=120, seeds=2, heads="keyed", storage=str(tmp_path), run="t")
    real, calls = random_keys.random_key_accuracies, []

    def cut(*args: Any, **options: Any) -> list[float]:
        calls.append(len(options["done"]))
        if len(calls) == 1:
            tick = options["tick"]

            def die(found: list[float]) -> None:
                tick(found)
                raise KeyboardInterrupt

            options["tick"] = die
        return real(*args, **options)

    monkeypatch.setattr(random_keys, "random_key_accuracies", cut)
    monkeypatch.setattr("mtlsign.experiments.sweeps.space.Cell.settings", _short)
    with pytest.raises(KeyboardInterrupt):
        run.run_study(s)
    answer = run.run_study(of(study="thresholds", storage=str(tmp_path), resume="t"))
    assert calls == [0, 100, 0] and answer["rows"][0]["keys"] == 240
    kept = [(tmp_path / f"runs/t/keyed-{seed}-guesses.json").read_text() for seed in (0, 1)]
    assert kept[0] != kept[1], "each seed has its own W0 and keys"
    assert 0.4 < answer["rows"][0]["mean"] < 0.6
    with pytest.raises(SettingsError, match="finished"):
        run.run_study(of(study="thresholds", storage=str(tmp_path), resume="t"))


@property  # type: ignore[misc]
def _short(cell: Any) -> Any:
    from mtlsign.config.embed import EmbedSettings

    return EmbedSettings.of({**cell.config, "epochs": 1, "batch": 16, "workers": 0}).resolved()
