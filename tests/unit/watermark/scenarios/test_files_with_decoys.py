"""Suspect files with the marked weights and decoys: every reading is tested, in any order of the names."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from tests.unit.models.network import transformers_name
from tests.unit.watermark.scenarios.hostile_files import DECOY_FILES, decoys, renamed

Tensors = dict[str, Tensor]
Marked = tuple[nn.Module, "object"]


@pytest.fixture(scope="module")
def tapped(marked_model: tuple[object, object], detector: WatermarkDetector) -> Tensors:
    """Return the marked weights that the detector reads, γ included."""
    names = {*detector.weight_shapes, *detector.optional_shapes}
    return {name: t for name, t in marked_model[1].tensors.items() if name in names}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DECOY_FILES)
def test_verify_of_marked_weights_with_decoys_is_accepted_less_the_price_of_decoys(
    name: str, tapped: Tensors, detector: WatermarkDetector
) -> None:
    single = verify(tapped, detector, bits=40)
    tensors = DECOY_FILES[name](tapped)
    for file in (tensors, dict(reversed(tensors.items()))):
        verdict = verify(file, detector, bits=40)
        assert verdict.accepted and verdict.matches == single.matches
        # The decoys are read twice: in their own order, and aligned. If only their γ differs, once.
        assert verdict.to_json()["readings"] == verdict.readings and verdict.readings in (2, 3)
        price = math.log2(verdict.readings)
        assert verdict.evidence_bits == pytest.approx(single.evidence_bits - price)
    assert "readings" not in single.to_json()


def test_verify_with_decoys_of_γ_alone_reads_γ_of_each_spelling(
    tapped: Tensors, detector: WatermarkDetector
) -> None:
    gammas = {name: -torch.ones_like(tapped[name]) for name in detector.optional_shapes}
    verdict = verify(renamed(tapped, transformers_name) | gammas, detector, bits=40)
    assert verdict.accepted and verdict.readings == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_verify_with_one_damaged_γ_is_not_ended(
    value: float, tapped: Tensors, detector: WatermarkDetector
) -> None:
    name = next(iter(detector.optional_shapes))
    assert verify({**tapped, name: torch.full_like(tapped[name], value)}, detector).status != "not_verifiable"
    assert verify({**tapped, name: torch.ones(1)}, detector).status != "not_verifiable"


def test_verify_of_unmarked_weights_in_two_places_pays_for_both(
    tapped: Tensors, detector: WatermarkDetector
) -> None:
    unmarked = decoys(tapped)
    verdict = verify(unmarked | decoys(tapped, "a.{}".format), detector)
    assert verdict.status == "unrelated" and verdict.readings == 4 and verdict.evidence_bits < 20
    damaged = unmarked | {f"a.{name}": t[:1] for name, t in tapped.items()}
    verdict = verify(damaged, detector)
    assert verdict.status == "not_verifiable" and verdict.reason is not None
    assert "in 3 ways" in verdict.reason and "do not fit" in verdict.reason


def test_verify_of_weights_in_many_places_is_not_verifiable(
    tapped: Tensors, detector: WatermarkDetector
) -> None:
    many = {f"p{i}.{name}": t for i in range(9) for name, t in decoys(tapped).items()}
    verdict = verify(many, detector)
    assert verdict.status == "not_verifiable" and "over 8 places" in (verdict.reason or "")


MAPPING_SCRIPT = """
import sys
from mtlsign.models.tensor_names import suspect_mappings
from mtlsign.storage.safetensors_io import parse_safetensors
names = sys.argv[2:]
print(suspect_mappings(names, parse_safetensors(open(sys.argv[1], "rb").read())))
"""


def test_mappings_in_processes_with_other_hash_seeds_are_equal(tmp_path: Path, tapped: Tensors) -> None:
    """The library returns tensors in the order of a hash map, which each process chooses by itself."""
    tensors = DECOY_FILES["two transformers spellings"](tapped)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "m.safetensors")
    command = [sys.executable, "-c", MAPPING_SCRIPT, str(tmp_path / "m.safetensors"), *tapped]
    outputs = {
        subprocess.run(
            command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs != {""}
