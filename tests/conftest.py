"""Shared fixtures: one published test owner, one synthetic task, one tiny marked network.

The tests run in two processes (pytest-xdist). Tests of one file stay in one process, because they share
fixtures. Tests with a Ray cluster or a server form one group, because they share one cluster and its CPUs.
The process that distributes the tests needs no torch, so this module imports it in the fixtures.
"""

from __future__ import annotations

import fcntl
import html
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from mtlsign.watermark.keys.identity import Identity
from tests.helpers.job_harness import baseline_run, jobs  # noqa: F401  (fixtures)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mtlsign.config.embed import EmbedSettings
    from mtlsign.tasks import Task

hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")

SIDE = 24
#: PUBLISHED TEST OWNER: never mark a model with it.
OWNER = Identity(bytes(range(32)), bytes(range(32, 64)))
#: Settings of every tiny embedding; a test overrides those that it examines.
TINY: dict[str, Any] = {
    "task": "custom",
    "model": "resnet18",
    "width": 8,
    "head": "keyed",
    "key_size": 128,
    "phase2.steps": 120,
    "lambda2": 0,
    "phase1.epochs": 1,
    "phase1.batch": 16,
    "phase2.batch": 16,
    "phase2.lr": 0.01,
    "perturbation.inner_steps": 2,
    "insecure_test_key": True,
}


#: Folders whose tests share one process: they start Ray clusters and servers.
CLUSTER_FOLDERS = {"ray", "e2e", "services"}


def scheduling_group(nodeid: str) -> str:
    """Return "cluster" for a test with a Ray cluster or a server, otherwise the file of the test."""
    file = nodeid.partition("::")[0]
    return "cluster" if Path(file).parts[1:2] and Path(file).parts[1] in CLUSTER_FOLDERS else file


class GroupScheduling(LoadScopeScheduling):
    """Scheduler of pytest-xdist that keeps each group in one process.

    `--dist=loadgroup` does not group with pytest 9.2, whose node ids ignore the suffix of
    pytest-xdist 3.8.
    """

    def _split_scope(self, nodeid: str) -> str:
        return scheduling_group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """Return the scheduler for `--dist=loadscope`."""
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the clusters, the longest group."""
    items.sort(key=lambda item: scheduling_group(item.nodeid) != "cluster")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Let torch compute with one thread, because two processes share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set a separate home folder, so that no test reads or creates an identity in the user's."""
    monkeypatch.setenv("MTLSIGN_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def owner() -> Identity:
    return OWNER


@pytest.fixture(scope="session")
def tiny_task() -> Task:
    """Return a task of 120 noisy 24x24 images in four classes."""
    import torch

    from mtlsign.tasks import from_tensors

    gen = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.rand(4, 1, SIDE, SIDE, generator=gen)[y] + 0.3 * torch.randn(120, 1, SIDE, SIDE, generator=gen)
    return from_tensors(x, y)


@pytest.fixture(scope="session")
def tiny_graph() -> dict[str, object]:
    from mtlsign.models import architectures

    return architectures.architecture_for("resnet18", channels=1, classes=4, width=8, stem="stock")


@pytest.fixture(scope="session")
def tiny_settings() -> Callable[..., EmbedSettings]:
    """Return a function that completes TINY with overrides."""
    from mtlsign.config.embed import EmbedSettings

    return lambda **overrides: EmbedSettings.of({**TINY, **overrides}).with_defaults()


@pytest.fixture(scope="session")
def tiny_model(tiny_graph: dict[str, object]) -> Callable[..., nn.Module]:
    """Return a function that makes a ResNet-18 of width 8 by seed, with random BatchNorms."""
    import torch
    from torch import nn

    from mtlsign.models import architectures

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


def share_between_processes(factory: pytest.TempPathFactory, name: str, make: Callable[[], Any]) -> Any:
    """Return a copy of `make()`, which the first process of the test run calls."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / f"{name}.pickle"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="session")
def marked_model(
    tiny_task: Task, tiny_graph: dict[str, object], tiny_model: Callable[..., nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:  # fmt: skip
    """Embed a watermark into a network of `tiny_model`; return W0's tensors and the result."""

    def embed() -> Any:
        import mtlsign

        model = tiny_model()
        base_weights: dict[str, Tensor] = {name: t.clone() for name, t in model.state_dict().items()}
        options = {k: v for k, v in TINY.items() if k not in ("task", "model", "width")}
        result = mtlsign.embed(
            model, tiny_task, trained=True, identity=OWNER, architecture=tiny_graph, **options
        )
        return base_weights, result

    return share_between_processes(tmp_path_factory, "marked_model", embed)


def empty_figure(name: str, description: str, painter: object, size: object = None) -> str:
    """Return a figure without curves, with the signature of `mtlsign.reports.plotting.render_svg`."""
    return f'<svg role="img" aria-label="{html.escape(description)}"></svg>'


def replace_figures(patch: pytest.MonkeyPatch) -> None:
    """Draw no curves in reports; they take longer than a tiny run. `tests/unit/reports` draws them."""
    for module in ("attacks", "comparison", "figures", "sweeps"):
        patch.setattr(f"mtlsign.reports.{module}.render_svg", empty_figure)


@pytest.fixture
def empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no curves in the reports of the test's runs."""
    replace_figures(monkeypatch)


@pytest.fixture
def store_dir(tmp_path: Path) -> str:
    return str(tmp_path / "store")
