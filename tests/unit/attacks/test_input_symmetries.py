from __future__ import annotations

import typing

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.attacker_data import TURNS, transform_inputs, transform_task
from mtlsign.attacks.base import ChannelMix, Turn
from mtlsign.attacks.equal_function import TOLERANCE
from mtlsign.attacks.input_symmetries import Mix
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task, from_tensors
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import changed_parameters, difference, network, run


@pytest.fixture(scope="module")
def colour_task() -> Task:
    gen = torch.Generator().manual_seed(0)
    return from_tensors(torch.randn(40, 3, 24, 24, generator=gen), torch.arange(40) % 4)


@pytest.mark.parametrize("kind", typing.get_args(Mix))
def test_mix_input_preserves_function_on_mixed_images(kind: str, colour_task: Task) -> None:
    model = network("depthwise", channels=3)
    outcome = run(f"mix_input:kind={kind}", model, colour_task, seed=2)
    assert changed_parameters(model, outcome.model) == {"stem.weight"}
    assert difference(model, outcome, channels=3) < TOLERANCE
    assert difference(model, run("none", model, colour_task), channels=3) == 0
    if kind == "negate":
        assert outcome.input_transforms == ("negated",)
    else:
        (mix,) = outcome.input_transforms
        assert isinstance(mix, ChannelMix) and str(mix).startswith("mixed[[") and len(mix.rows) == 3


def test_mix_of_bgr_reverses_the_channels(colour_task: Task) -> None:
    outcome = run("mix_input:kind=bgr", network("grouped", channels=3), colour_task)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(transform_inputs(x, outcome.input_transforms), x.flip(1))
    assert str(outcome.input_transforms[0]) == "mixed[[0.0,0.0,1.0],[0.0,1.0,0.0],[1.0,0.0,0.0]]"


@pytest.mark.parametrize("kind", ["yuv", "negate_one", "bgr", "random"])
def test_mix_of_one_channel_is_not_applicable(kind: str, tiny_task: Task) -> None:
    with pytest.raises(NotApplicableError, match=f"kind={kind} does not mix"):
        run(f"mix_input:kind={kind}", network("plain"), tiny_task)


def test_mix_without_kernel_that_reads_images_is_not_applicable(tiny_task: Task) -> None:
    layers = (nn.AvgPool2d(24), nn.Flatten(), nn.ReLU(), nn.Conv1d(1, 4, 1))
    for model in (nn.Sequential(nn.Sigmoid(), nn.Softmax2d(), *layers[:2], nn.Linear(1, 4)),):
        with pytest.raises(NotApplicableError):
            run("mix_input:kind=negate", model.eval(), tiny_task)


@pytest.mark.parametrize("kind", typing.get_args(Turn))
def test_turn_input_preserves_function_of_symmetric_geometry(kind: str, tiny_task: Task) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]).eval()
    outcome = run(f"turn_input:kind={kind}", model, tiny_task)
    assert outcome.input_transforms == (kind,) and changed_parameters(model, outcome.model) == {
        "0.weight",
        "2.weight",
    }
    assert difference(model, outcome) < TOLERANCE


def test_turn_of_unsymmetric_geometry_is_not_applicable(module: nn.Module, tiny_task: Task) -> None:
    """The windows of a convolution with stride 2 on an even size do not stand symmetrically."""
    for kind in ("flipped_rows", "flipped_columns", "rotated"):
        with pytest.raises(NotApplicableError, match="no symmetry of this architecture"):
            run(f"turn_input:kind={kind}", module, tiny_task)
    same = run("turn_input:kind=transposed", module, tiny_task).model.state_dict()
    other = run("transpose_input", module, tiny_task).model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in same.items())


def test_turned_images_change_height_and_width() -> None:
    task = from_tensors(torch.randn(40, 1, 6, 8), torch.arange(40) % 4)
    for transform in TURNS:
        turned = transform_task(task, (transform,))
        x = turned.splits["train"].batch(torch.arange(2)).inputs
        assert x.shape[2:] == (turned.input_spec.height, turned.input_spec.width)


def test_negated_input_leaves_every_bit(marked_module: nn.Module, tiny_task: Task, key: MTLSignKey) -> None:
    before = verify(marked_module.state_dict(), key.detector)
    for text in ("mix_input:kind=negate", "negate_input", "transpose_input"):
        after = verify(run(text, marked_module, tiny_task).model.state_dict(), key.detector)
        assert after.accepted and after.matches == before.matches, text
