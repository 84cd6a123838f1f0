"""What the tests share: one published test owner, one synthetic task, one tiny marked network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.models import architectures
from mtlsign.tasks import Task, from_tensors
from mtlsign.watermark.keys.identity import Identity
from tests.helpers.job_harness import baseline, jobs  # noqa: F401  (fixtures)

hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")
torch.set_num_threads(1)

SIDE = 24
#: PUBLISHED TEST OWNER: never mark a model with it.
OWNER = Identity(bytes(range(32)), bytes(range(32, 64)))
#: The settings of every tiny embedding; a test overrides what it is about.
TINY: dict[str, Any] = {
    "task": "own", "model": "resnet18", "width": 8, "key_size": 128, "steps": 120, "lambda2": 0, "epochs": 1,
    "batch": 16, "primary_batch": 16, "wm_lr": 0.01, "inner_steps": 2, "insecure_test_key": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or makes an identity in the home of whoever runs it."""
    monkeypatch.setenv("MTLSIGN_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def owner() -> Identity:
    return OWNER


@pytest.fixture(scope="session")
def tiny_task() -> Task:
    """Four classes of noisy 24x24 images, 120 of them."""
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.rand(4, 1, SIDE, SIDE, generator=gen)[y] + 0.3 * torch.randn(120, 1, SIDE, SIDE, generator=gen)
    return from_tensors(x, y)


@pytest.fixture(scope="session")
def tiny_graph() -> dict[str, object]:
    return architectures.architecture_for("resnet18", channels=1, classes=4, width=8, stem="stock")


@pytest.fixture(scope="session")
def tiny_settings() -> Callable[..., EmbedSettings]:
    """Complete settings: TINY with overrides."""
    return lambda **overrides: EmbedSettings.of({**TINY, **overrides}).resolved()


@pytest.fixture(scope="session")
def tiny_model(tiny_graph: dict[str, object]) -> Callable[..., nn.Module]:
    """A ResNet-18 of width 8 by seed; its batch norms are far from trivial, some γ negative."""

    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = architectures.build(tiny_graph).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5).mul_(
                        torch.where(torch.rand(module.num_features) < 0.3, -1.0, 1.0)
                    )
                    module.bias.normal_(0, 0.3)
                    module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                    module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        return model

    return make


@pytest.fixture(scope="session")
def marked(tiny_task: Task, tiny_graph: dict[str, object], tiny_model: Callable[..., nn.Module]) -> Any:
    """`mtlsign.embed` on a trained-looking network: (W0's tensors, Embedded)."""
    import mtlsign

    model = tiny_model()
    base_weights: dict[str, Tensor] = {name: t.clone() for name, t in model.state_dict().items()}
    options = {k: v for k, v in TINY.items() if k not in ("task", "model", "width")}
    done = mtlsign.embed(model, tiny_task, trained=True, identity=OWNER, graph=tiny_graph, **options)
    return base_weights, done


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "store")
