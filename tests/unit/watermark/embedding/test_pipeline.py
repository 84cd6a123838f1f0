"""Tests of the whole of embedding on a network that takes seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mtlsign
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import KeyMaterialError, ModelError, MTLSignError, SettingsError
from mtlsign.models import loading
from mtlsign.models.architectures import build
from mtlsign.storage.locations import open_storage
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import phase2, pipeline
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import detector_for_kit, verify_with_kit
from mtlsign.watermark.verification.algorithm import verify

Maker = Callable[..., nn.Module]


FAST: dict[str, Any] = {
    "head": "keyed",
    "key_size": 128,
    "lambda2": 0,
    "phase1.epochs": 1,
    "phase1.batch": 16,
    "phase2.batch": 16,
    "phase2.lr": 0.01,
    "insecure_test_key": True,
}


ARCH = re.compile(r"[A-Za-z0-9_/.:-]{1,128}")


@pytest.fixture
def owner_file(tmp_path: Path, owner: Identity) -> Path:
    path = tmp_path / "owner" / "identity.json"
    path.parent.mkdir(mode=0o700)
    owner.save(path, None)
    return path


def test_embed_returns_marked_model_verdict_and_metrics(
    marked_model: tuple[dict[str, Tensor], Any], tiny_model: Maker
) -> None:
    base_weights, done = marked_model
    r = done.result
    assert r["wm_accuracy"] >= 0.95 and done.verdict.accepted and r["status"] == "accepted"
    assert 0.3 < r["wm_accuracy_on_clean"] < 0.7 and all(0.3 < a < 0.7 for a in r["wm_accuracy_wrong_keys"])
    assert len(r["wm_accuracy_wrong_keys"]) == 5
    weights = [n for n, p in base_weights.items() if p.is_floating_point() and "running_" not in n]
    moved = torch.cat([(done.tensors[n].double() - base_weights[n].double()).flatten() for n in weights])
    assert r["deviation_l2"] == pytest.approx(float(moved.norm())) and r["deviation_l2"] > 0.1
    assert {
        "primary_clean",
        "primary_marked",
        "seconds_phase1",
        "seconds_phase2",
        "p_value",
        "kit",
    } <= r.keys()
    assert json.loads(json.dumps(r, allow_nan=False))["model_digest"] == done.verdict.model_digest
    assert done.history["phase2"][-1]["wm_accuracy"] > 0.9 and done.history["phase1"] == []
    assert len(done.scores["marked"]) == 128 == len(done.scores["w0"])
    assert done.report().lstrip().lower().startswith("<!doctype html")
    model = tiny_model()
    model.load_state_dict(done.tensors)  # the architecture is unchanged, the public model holds no head


def test_saved_kit_verifies_saved_model(
    marked_model: tuple[dict[str, Tensor], Any], store_dir: str, owner: Identity, owner_file: Path
) -> None:
    _, done = marked_model
    done.save(open_storage(store_dir), EncryptionSecret.from_kit_key(owner.kit_key))
    stored = b"".join(p.read_bytes() for p in Path(store_dir).rglob("*") if p.is_file())
    spec = done.kit.opening.spec
    assert spec not in stored and done.kit.opening.signature.hex().encode() not in stored
    place, kit = str(done.result["model_path"]), str(done.result["kit"])
    bare = str(Path(place) / "model.safetensors")
    settings = VerifySettings.of({"model": [place, bare], "kit": kit, "owner": owner_file, "control_keys": 2})
    verdicts = verify_with_kit(settings)
    assert [v.status for v in verdicts] == ["accepted", "accepted"] and verdicts[0] == verdicts[1]
    assert (
        verdicts[0].matches == done.verdict.matches
        and verdicts[0].model_digest == done.result["model_digest"]
    )
    assert len(verdicts[0].controls["wrong_keys"]) == 2 and len(verdicts[0].controls["w0"]) == 1
    other_owner = owner_file.with_name("other_owner.json")
    Identity.generate().save(other_owner, None)
    with pytest.raises(KeyMaterialError, match=f"belongs to identity {owner.public_key.hex()}, not to"):
        verify_with_kit(settings.model_copy(update={"owner": other_owner}))
    sealed = settings.model_copy(update={"owner": other_owner, "kit": str(Path(kit) / "kit.sealed")})
    (Path(kit) / "owner.json").unlink()
    with pytest.raises(KeyMaterialError, match="wrong, or the sealed file is damaged"):
        verify_with_kit(sealed)


def test_embed_with_free_head_needs_commitment(
    tiny_task: Task, tiny_graph: dict[str, object], tiny_model: Maker, owner: Identity
) -> None:
    done = mtlsign.embed(
        tiny_model(),
        tiny_task,
        trained=True,
        identity=owner,
        architecture=tiny_graph,
        hidden=16,
        features="pooled",
        **(FAST | {"head": "free", "phase2.lr": 0.02}),
        **{"phase2.steps": 30},
    )
    assert done.kit.head is not None and done.result["wm_accuracy"] > 0.7
    assert done.verdict.status in ("needs_commitment", "rejected") and not done.verdict.accepted
    again = verify(done.tensors, detector_for_kit(done.kit), bits=5.0)
    assert (again.status, again.matches) == ("needs_commitment", done.verdict.matches)
    assert not any("w1" in name for name in done.tensors)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 5, stride=2), nn.BatchNorm2d(12), nn.ReLU())
        self.rest = nn.Sequential(nn.Flatten(), nn.Linear(1200, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(self.stem(x))
        return out


def test_embed_of_clean_model_at_chance_warns_before_the_first_step(
    tiny_model: Maker, tiny_task: Task, tiny_graph: dict[str, object], owner: Identity
) -> None:
    rows: list[Mapping[str, Any]] = []
    done = mtlsign.embed(
        tiny_model(), tiny_task, trained=True, identity=owner, architecture=tiny_graph,
        on_progress=rows.append, **FAST, **{"phase2.steps": 2},
    )  # fmt: skip
    assert (rows[0]["phase"], rows[0]["step"]) == ("mark", 0) and all(row["step"] > 0 for row in rows[1:])
    assert "which is chance for 4 classes" in rows[0]["warning"]
    assert any("which is chance" in warning for warning in done.result["warnings"])


def test_embed_accepts_local_class_and_loaders(owner: Identity) -> None:
    """Use embed as in a notebook: a class inside a function, loaders, and phase 1."""

    class Inner(Small):
        pass

    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(3, 1, 24, 24)[y] + 0.2 * torch.randn(60, 1, 24, 24)
    loaders = {
        "train": DataLoader(TensorDataset(x, y), 8),
        "test": DataLoader(TensorDataset(x[:9], y[:9]), 8),
    }
    shown: list[str] = []
    done = mtlsign.embed(
        Inner(),
        loaders,
        identity=owner,
        taps="stem",
        on_progress=lambda row: shown.append(str(row["phase"])),
        **(FAST | {"phase1.epochs": 3, "phase1.lr": 0.02}),
        **{"phase2.steps": 100},
    )
    assert done.result["wm_accuracy"] >= 0.95 and done.result["primary_clean"] > 0.6
    assert set(shown) == {"clean", "mark"} and len(done.history["phase1"]) == 3
    arch = str(done.kit.opening.parse().architecture["arch"])
    assert ARCH.fullmatch(arch) and arch.startswith("custom/") and arch.endswith("Inner")
    with pytest.raises(ModelError, match="--trusted-factory"):
        detector_for_kit(
            done.kit
        )  # a custom architecture is code, which is imported only if the caller trusts it


@pytest.mark.parametrize(
    ("module", "qualname"),
    [
        ("__main__", "Net"),
        ("a.b", "f.<locals>.Net"),
        ("<run path>", "Net"),
        ("a" * 80 + ".1x", "O.I" * 60),
        ("münch", "Ü"),
    ],
)
def test_custom_architecture_name_fits_spec_and_builds(module: str, qualname: str) -> None:
    kind = type("Net", (Small,), {"__module__": module, "__qualname__": qualname})
    arch = loading.custom_architecture_name(kind)
    assert ARCH.fullmatch(arch)
    assert isinstance(build({"arch": arch}, factories={arch.removeprefix("custom/"): Small}), Small)


def test_embed_of_other_architecture_or_unknown_option_raises(
    tiny_task: Task, tiny_graph: dict[str, object], owner: Identity
) -> None:
    before = Small()
    with pytest.raises(ModelError, match="architecture: The architecture differs"):
        mtlsign.embed(before, tiny_task, trained=True, identity=owner, architecture=tiny_graph, **FAST)
    with pytest.raises(ModelError, match="taps"):
        mtlsign.embed(Small(), tiny_task, trained=True, identity=owner, taps="stemm", **FAST)
    with pytest.raises(SettingsError, match="lambda1"):
        mtlsign.embed(Small(), tiny_task, trained=True, identity=owner, lamda1=1)


FACTORY = """
import torch
from mtlsign.tasks import from_tensors
def task(seed):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.rand(4, 1, 24, 24, generator=g)[y] + 0.3 * torch.randn(120, 1, 24, 24, generator=g)
    return from_tensors(x, y, seed=seed)
def network(channels: int, classes: int, width: int = 4):
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner_file: Path, store_dir: str) -> dict[str, Any]:
    (tmp_path / "tinyfactory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(phase2, "CHECKPOINT_STEPS", 4)
    return {
        **FAST,
        "task": "tinyfactory:task",
        "width": 8,
        "phase2.steps": 10,
        "workers": 0,
        "storage": store_dir,
        "run": "one",
        "owner": owner_file,
        "lambda2": 1.0,
        "perturbation.kinds": "noise,fine_tuned",
        "perturbation.inner_steps": 2,
        "phase1.epochs": 2,
        "phase1.lr": 0.02,
    }


def start(job: dict[str, Any], on_progress: Any = None, **changes: Any) -> EmbeddingResult:
    values = {k: v for k, v in (job | changes).items() if v is not None}
    return pipeline.run_embedding_job(EmbedSettings.of(values), pipeline.LocalEmbeddingBackend(on_progress))


class SimulatedKill(BaseException):
    pass


def kill_at(phase: str, at: int) -> Callable[[Any], None]:
    def show(row: Any) -> None:
        if row["phase"] == phase and row.get("step", row.get("epoch", 0)) >= at:
            raise SimulatedKill

    return show


@pytest.mark.usefixtures("empty_figures")
def test_job_with_a_factory_that_needs_channels_and_classes_is_verified(job: dict[str, Any]) -> None:
    result = start(job, model="tinyfactory:network", taps="3", width=None, lambda2=0.0)
    arch = result.kit.opening.parse().architecture
    assert (arch["arch"], arch["channels"], arch["classes"]) == ("custom/tinyfactory:network", 1, 4)
    detector = detector_for_kit(result.kit, "tinyfactory:network")
    assert verify(result.tensors, detector).matches == result.verdict.matches


@pytest.mark.usefixtures("empty_figures")
def test_resumed_job_after_kill_gives_same_digest(job: dict[str, Any], store_dir: str) -> None:
    job |= {"width": 4, "phase1.epochs": 2}
    whole = start(job)
    runs = Path(store_dir) / "runs"
    for name, phase, at, steps in (("two", "clean", 2, {1, 2, 5, 4, 8, 10}), ("three", "mark", 10, {10})):
        with pytest.raises(SimulatedKill):
            start(job, kill_at(phase, at), run=name)
        assert not (runs / name / "manifest.json").exists()
        rows: list[dict[str, Any]] = []
        again = start(job, rows.append, run=None, resume=name)
        assert again.result["model_digest"] == whole.result["model_digest"]
        assert again.kit.opening == whole.kit.opening and again.result["run"] == name
        seen = {row.get("step", row.get("epoch")) for row in rows if "warning" not in row}
        assert seen == steps - {1}  # steps before the checkpoint are not repeated
        assert [row["phase"] for row in rows if "warning" in row] == ["mark"] * (name == "two")
        left = {p.name for p in (runs / name).iterdir()}
        assert left == {"settings.json", "result.json", "metrics.json", "report.html", "manifest.json"}
        result = json.loads((runs / name / "result.json").read_text())
        assert result["model_digest"] == whole.result["model_digest"] and Path(result["kit"]).is_dir()


def test_run_embedding_job_with_invalid_input_writes_no_files(
    job: dict[str, Any], store_dir: str, tmp_path: Path
) -> None:
    bad: list[dict[str, Any]] = [
        {"taps": "layer9"},
        {"task": "tinyfactory:nothing"},
        {"weights": str(tmp_path / "none.pt")},
        {"model": "resnet19"},
        {"carrier_size": 21, "model": "x" * 120 + ":f"},
        {"owner": tmp_path / "missing.json"},
    ]
    for changes in bad:
        with pytest.raises(MTLSignError) as caught:
            start(job, **changes)
        assert len(str(caught.value).splitlines()) == 1
    assert [p for p in Path(store_dir).rglob("*") if p.is_file()] == []


def test_run_embedding_job_with_identity_inside_storage_raises(job: dict[str, Any], store_dir: str) -> None:
    with pytest.raises(KeyMaterialError, match="owner: The identity file is inside --storage"):
        start(job, owner=Path(store_dir) / "identity.json")


@pytest.mark.usefixtures("empty_figures")
def test_run_embedding_job_with_weights_skips_phase1(
    job: dict[str, Any], tmp_path: Path, tiny_model: Maker
) -> None:
    path = tmp_path / "trained.pt"
    torch.save({"state_dict": {f"module.{n}": t for n, t in tiny_model().state_dict().items()}}, path)
    done = start(job, **{"weights": str(path)})
    assert done.history["phase1"] == [] and done.result["seconds_phase1"] == 0
    assert torch.equal(done.tensors["bn1.bias"], tiny_model().state_dict()["bn1.bias"])
