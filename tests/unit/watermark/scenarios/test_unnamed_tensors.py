"""Suspect files with names of no meaning: the verdict is that of the network in them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from tests.unit.watermark.scenarios.hostile_files import decoys

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def marked(marked_model: tuple[object, Any]) -> Tensors:
    """Return the state dict of the marked network."""
    return dict(marked_model[1].tensors)


def anonymous(tensors: Tensors, seed: int = 0) -> Tensors:
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed)).tolist()
    return {f"t{number}": tensor for number, tensor in zip(order, tensors.values(), strict=True)}


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
