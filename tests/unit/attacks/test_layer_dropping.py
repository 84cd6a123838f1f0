from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.models.architectures import build
from mtlsign.models.transformer import Transformer
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import text_task
from tests.unit.attacks.transformer_examples import KINDS, architecture, marked_transformer


@pytest.mark.parametrize("kind", KINDS)
def test_drop_layers_removes_last_block_and_mark_of_others_remains(kind: str) -> None:
    model, result, _ = marked_transformer(kind)
    attacked = run("drop_layers:last=1", model, text_task()).model
    state = attacked.state_dict()
    assert isinstance(attacked, Transformer) and attacked.shape.layers == len(attacked.blocks) == 1
    assert len(model.get_submodule("blocks")) == 2  # type: ignore[arg-type]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    verdict = verify(state, MTLSignKey(detector_for_kit(result.kit)).detector)
    assert verdict.evidence_bits > 50 and verdict.missing_layers


@pytest.mark.parametrize(
    ("text", "remaining"), [("every=2,last=0", [0, 2, 4]), ("every=3,last=2", [0, 1, 3]), ("last=4", [0, 1])]
)
def test_drop_layers_renumbers_remaining_blocks(text: str, remaining: list[int]) -> None:
    torch.manual_seed(0)
    model = build(architecture("pre") | {"layers": 6}).eval()
    attacked = run(f"drop_layers:{text}", model, text_task()).model
    weights = [block.mlp.up.weight for block in attacked.block_list()]  # type: ignore[operator]
    own = [block.mlp.up.weight for block in model.block_list()]  # type: ignore[operator]
    assert len(weights) == len(remaining)
    assert all(torch.equal(w, own[number]) for w, number in zip(weights, remaining, strict=True))


@pytest.mark.parametrize("text", ["last=2", "last=0", "every=1,last=0", "every=7,last=0"])
def test_drop_layers_of_all_or_no_blocks_is_not_applicable(text: str) -> None:
    with pytest.raises(NotApplicableError, match="of 2 blocks would be removed"):
        run(f"drop_layers:{text}", marked_transformer("pre")[0], text_task())


def test_drop_layers_without_attention_is_not_applicable(marked_module: nn.Module, tiny_task: Task) -> None:
    with pytest.raises(NotApplicableError, match="no list of blocks"):
        run("drop_layers", marked_module, tiny_task)
