from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError, parse_attacks
from mtlsign.attacks.equal_function import TOLERANCE
from mtlsign.errors import SettingsError
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import NETWORKS, difference, network, run

TEXTS = ("dummy_channels", "split_channels", "split_channels:kind=random", "clique_channels")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("text", TEXTS)
def test_wider_network_runs_and_computes_the_same(text: str, name: str, tiny_task: Task) -> None:
    model = network(name)
    outcome = run(text, model, tiny_task)
    assert difference(model, outcome) < TOLERANCE
    before, after = model.state_dict(), outcome.model.state_dict()
    assert list(before) == list(after)
    first = "0.weight" if name == "plain" else "stem.weight"
    assert len(after[first]) == len(before[first]) + 16
    for module in outcome.model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert len(module.weight) == len(module.running_var) == module.num_features  # type: ignore[arg-type]
    # The network can still be trained and its statistics estimated.
    outcome.model.train()(torch.randn(4, 1, 24, 24)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in outcome.model.parameters())


def test_blocks_of_grouped_convolution_stay_and_depthwise_groups_grow(tiny_task: Task) -> None:
    grouped = run("dummy_channels:count=3", network("grouped"), tiny_task).model
    assert grouped.grouped.weight.shape == (12, 2, 3, 3) and grouped.stem.out_channels == 9  # type: ignore[union-attr]
    depthwise = run("clique_channels:count=4", network("depthwise"), tiny_task).model
    assert depthwise.depthwise.groups == 16 == depthwise.excite.out_channels  # type: ignore[union-attr]


def unread(kernel: torch.Tensor, rows: int) -> int:
    """Number of input columns that are zero in at least `rows` rows."""
    return int(((kernel.reshape(*kernel.shape[:2], -1).norm(dim=2) == 0).sum(0) >= rows).sum())


def test_old_rows_read_no_dummy_channel(tiny_task: Task) -> None:
    kernels = run("dummy_channels:count=5", network("plain"), tiny_task).model.state_dict()
    assert len(kernels["3.weight"]) == 8 + 5 and unread(kernels["3.weight"], 8) == 5
    assert unread(kernels["7.weight"], 10) == 5 * 9, "nine positions of each flattened channel"
    assert unread(kernels["9.weight"], 4) == 5


def test_columns_of_copies_add_up_and_those_of_pairs_cancel(tiny_task: Task) -> None:
    model = network("plain")
    for text, channels in (("split_channels:count=6", 6), ("clique_channels:count=6", 6 + 3)):
        kernels = run(text, model, tiny_task).model.state_dict()
        rows, numbers = kernels["0.weight"].flatten(1).unique(dim=0, return_inverse=True)
        assert len(rows) == channels
        last = kernels["9.weight"]  # its rows are those of the marked model
        merged = torch.zeros(4, len(kernels["7.weight"].unique(dim=0)))
        classes = kernels["7.weight"].unique(dim=0, return_inverse=True)[1]
        merged.index_add_(1, classes, last)
        if text.startswith("clique"):
            assert int((merged.abs().amax(0) < 1e-6).sum()) >= 3
        assert torch.isfinite(rows).all() and numbers.max() == channels - 1


@pytest.mark.parametrize(
    "text",
    [
        "dummy_channels:count=0",
        "split_channels:count=2000",
        "clique_channels:count=3",
        "split_channels:kind=x",
    ],
)
def test_count_outside_limits_raises_settings_error(text: str) -> None:
    with pytest.raises(SettingsError, match="is invalid"):
        parse_attacks(text)


def test_network_with_norms_over_channels_is_not_applicable(tiny_task: Task) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 24), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 4)).eval()
    with pytest.raises(NotApplicableError, match="no channels of which the change"):
        run("dummy_channels", model, tiny_task)


@pytest.mark.parametrize("text", [*TEXTS, "dummy_channels:count=3+permute_channels+split_channels:count=2"])
def test_further_channels_leave_every_bit(
    text: str, marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    before = verify(marked_module.state_dict(), key.detector)
    after = verify(run(text, marked_module, tiny_task).model.state_dict(), key.detector)
    assert after.accepted and after.matches == before.matches
