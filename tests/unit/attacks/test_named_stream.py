"""Free changes of the residual stream of another library's vision transformer."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mtlsign
from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.equal_function import TOLERANCE, function_change
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import VISION_OPTIONS, run

FREE = "rotate_stream+permute_channels+attention_symmetries+dummy_block:place=1"


def vit(pool: str = "token") -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = VisionTransformer(
        img_size=24, patch_size=8, in_chans=1, num_classes=4, embed_dim=24, depth=2, num_heads=3,
        global_pool=pool, fc_norm=False,
    )  # fmt: skip
    with torch.no_grad():  # gains and biases of norms that have to be moved
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module")
def marked(tiny_task: Task) -> tuple[nn.Module, MTLSignKey]:
    model = vit()
    result = mtlsign.embed(model, tiny_task, trained=True, identity=Identity.generate(), **VISION_OPTIONS)
    detector = detector_for_kit(result.kit, "tests.unit.attacks.test_named_stream:vit")
    return model, MTLSignKey(detector)


@pytest.mark.parametrize("text", ["rotate_stream", "dummy_block", "dummy_block:place=2", FREE])
def test_free_change_of_a_vision_transformer_keeps_function_and_bits(
    text: str, marked: tuple[nn.Module, MTLSignKey], tiny_task: Task
) -> None:
    model, key = marked
    before = verify(model.state_dict(), key.detector)
    attacked = run(text, model, tiny_task, seed=5).model
    images = tiny_task.splits["test"].batch(torch.arange(8)).inputs
    assert function_change(model, attacked, images) < TOLERANCE
    state, own = attacked.state_dict(), model.state_dict()
    assert state.keys() != own.keys() or any(not torch.equal(t, own[name]) for name, t in state.items())
    after = verify(state, key.detector)
    assert before.matches == after.matches and before.accepted and after.accepted
    assert after.evidence_bits >= before.evidence_bits - 2


def test_rotate_stream_of_averaged_tokens_keeps_the_function(tiny_task: Task) -> None:
    model = vit("avg")
    attacked = run("rotate_stream", model, tiny_task).model
    before, after = model.state_dict(), attacked.state_dict()
    assert float((before["head.weight"] - after["head.weight"]).norm()) > 0.1
    assert torch.equal(after["norm.weight"], torch.ones(24)) and not after["norm.bias"].any()


def test_rotate_stream_with_scaled_sub_layers_is_not_applicable(tiny_task: Task) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=24, patch_size=8, in_chans=1, num_classes=4, embed_dim=24, depth=1, num_heads=3,
        init_values=0.5,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(torch.rand(24))
    with pytest.raises(NotApplicableError):
        run("rotate_stream", model.eval(), tiny_task)
