"""Suspect files with names of no meaning: the verdict is that of the network in them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks.residual_blocks import insert_residual_blocks
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from tests.unit.watermark.scenarios.exchanged_files import anonymous, exchanged
from tests.unit.watermark.scenarios.hostile_files import decoys

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def marked(marked_model: tuple[object, Any]) -> Tensors:
    """Return the state dict of the marked network."""
    return dict(marked_model[1].tensors)


HOSTILE: dict[str, Callable[[], Tensors]] = {
    "NaN": lambda: {f"nan{i}": torch.full((8, 8, 3, 3), math.nan) for i in range(50)},
    "zeros": lambda: {f"zero{i}": torch.zeros(8, 8, 3, 3) for i in range(50)},
    "huge shapes": lambda: {f"huge{i}": torch.ones(1).expand(2**30, 2**10) for i in range(50)},
    "decoys": lambda: {f"d{i}": torch.randn(8, 8, 3, 3, generator=_generator(i)) for i in range(200)},
    "names of numbers": lambda: {"9" * 5000 + str(i): torch.ones(3) for i in range(200)},
    "many scalars": lambda: {f"s{i}": torch.ones(1) for i in range(3000)},
    "equal tensors": lambda: dict.fromkeys((f"e{i}" for i in range(100)), torch.ones(8, 8, 3, 3)),
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", HOSTILE)
def test_verify_of_renamed_network_among_hostile_tensors_is_accepted_in_bounded_time(
    name: str, marked: Tensors, detector: WatermarkDetector
) -> None:
    expected, start = verify(marked, detector, bits=40), time.process_time()
    verdict = verify(anonymous(marked) | HOSTILE[name](), detector, bits=40)
    assert time.process_time() - start < 30
    assert verdict.accepted and verdict.matches >= expected.matches - 2
    assert verdict.readings <= 3


def test_verify_of_renamed_network_with_decoys_under_its_names_is_accepted(
    marked: Tensors, detector: WatermarkDetector
) -> None:
    verdict = verify(anonymous(marked) | decoys(marked), detector, bits=40)
    assert verdict.accepted and verdict.readings <= 5


def test_verify_of_network_with_a_separate_adapter_is_accepted(
    marked: Tensors, detector: WatermarkDetector
) -> None:
    file = dict(marked)
    for name, kernel in marked.items():
        if kernel.dim() > 1:
            down, up = torch.randn(2, *kernel.shape[1:]), torch.randn(len(kernel), 2)
            product = (up @ down.flatten(1)).reshape(kernel.shape)
            up = up * float(kernel.norm() / product.norm())
            layer = name.removesuffix("weight")
            file |= {f"{layer}lora_A.weight": down, f"{layer}lora_B.weight": up}
            file[name] = kernel - (up @ down.flatten(1)).reshape(kernel.shape)
    assert verify(file, detector, bits=40).accepted


def transposed(tensors: Tensors) -> Tensors:
    """Store square kernels with input and output axes exchanged, which their shapes do not show."""
    square = [name for name, t in tensors.items() if t.dim() == 4 and t.shape[0] == t.shape[1]]
    return tensors | {name: tensors[name].transpose(0, 1).contiguous() for name in square}


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_verify_of_network_with_exchanged_names_has_every_bit(
    seed: int, noise: float, marked: Tensors, detector: WatermarkDetector
) -> None:
    file = {
        name: t + noise * t.std() * torch.randn(t.shape, generator=_generator(seed)) if t.dim() == 4 else t
        for name, t in marked.items()
    }
    expected, verdict = verify(file, detector), verify(exchanged(file, seed), detector)
    assert verdict.matches >= expected.matches - 2 and verdict.readings <= 4
    assert verdict.evidence_bits >= expected.evidence_bits - 10


def test_verify_of_network_with_transposed_square_kernels_has_every_bit(
    marked: Tensors, detector: WatermarkDetector
) -> None:
    verdict = verify(transposed(marked), detector)
    assert verdict.matches >= verify(marked, detector).matches - 2


def test_verify_of_network_with_inserted_blocks_has_every_bit(
    marked: Tensors, tiny_model: Callable[..., nn.Module], detector: WatermarkDetector
) -> None:
    longer = copy.deepcopy(tiny_model(0)).eval()
    longer.load_state_dict(marked)
    insert_residual_blocks(longer, torch.randn(2, 1, 24, 24, generator=_generator(1)), _generator(0))
    verdict = verify(longer.state_dict(), detector)
    assert verdict.matches >= verify(marked, detector).matches - 2


@pytest.mark.parametrize("seed", [11, 12])
def test_verify_of_independent_network_is_unrelated_under_any_names(
    seed: int, tiny_model: Callable[..., nn.Module], detector: WatermarkDetector
) -> None:
    state = dict(tiny_model(seed).state_dict())
    for file in (state, exchanged(state, seed), transposed(state)):
        verdict = verify(file, detector)
        assert verdict.status == "unrelated" and verdict.readings <= 2


@pytest.mark.parametrize("seed", [11, 12])
def test_verify_of_renamed_independent_network_has_no_reading(
    seed: int, tiny_model: Callable[..., nn.Module], detector: WatermarkDetector
) -> None:
    verdict = verify(anonymous(tiny_model(seed).state_dict()), detector)
    assert verdict.status == "not_verifiable" and verdict.matches == 0 and verdict.readings == 1


def test_verify_of_hostile_tensors_alone_is_not_verifiable(detector: WatermarkDetector) -> None:
    file = {key: tensor for make in HOSTILE.values() for key, tensor in make().items()}
    verdict = verify(file, detector)
    assert verdict.status == "not_verifiable" and not verdict.accepted
