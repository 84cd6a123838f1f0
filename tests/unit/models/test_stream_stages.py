from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from mtlsign.models.residual_stream import residual_stream
from tests.unit.models.swin_examples import timm_swin, torchvision_swin

IMAGES = torch.zeros(2, 1, 24, 24)


@pytest.mark.parametrize(
    ("model", "tap", "start", "first_norm", "merging", "blocks"),
    [
        (timm_swin(), "layers.1", "patch_embed.proj", "patch_embed.norm", "layers.1.downsample",
         ("layers.0.blocks", "layers.1.blocks")),
        (torchvision_swin(), "features.3", "features.0.0", "features.0.2", "features.2",
         ("features.1", "features.3")),
    ],
    ids=["timm", "torchvision"],
)  # fmt: skip
def test_stages_have_their_own_sizes_sources_readers_and_writers(
    model: nn.Module, tap: str, start: str, first_norm: str, merging: str, blocks: tuple[str, str]
) -> None:
    stream = residual_stream(model, (tap,), IMAGES)
    assert stream is not None and stream.parts == stream.stages and stream.subtracts_mean
    first, second = stream.stages
    fc1, fc2 = ("mlp.fc1", "mlp.fc2") if tap == "layers.1" else ("mlp.0", "mlp.3")
    reduction = f"{merging}.reduction.weight"
    assert (first.size, second.size, stream.size) == (16, 32, 16)
    assert (first.first_norm, second.first_norm) == (first_norm, None)
    assert (first.sources, second.sources) == ((f"{start}.weight",), (reduction,))
    assert stream.sources == (f"{start}.weight", reduction) and stream.mergings == (reduction,)
    for stage, prefix in zip(stream.stages, blocks, strict=True):
        numbered = [f"{prefix}.{number}" for number in range(2)]
        assert [layer.module for layer in stage.attentions] == [f"{block}.attn" for block in numbered]
        assert [stream.size_of(layer) for layer in stage.attentions] == [stage.size] * 2
        read = {f"{block}.{part}.weight" for block in numbered for part in ("attn.qkv", fc1)}
        assert stage.readers == read | ({reduction} if stage is first else set())
        assert stage.writers == {
            f"{block}.{part}.weight" for block in numbered for part in ("attn.proj", fc2)
        }
    assert stream.gains[reduction] == f"{merging}.norm.weight"
    assert stream.gains[f"{blocks[1]}.0.attn.qkv.weight"] == f"{blocks[1]}.0.norm1.weight"
    assert stream.norms[f"{blocks[1]}.1.attn.value_output"] == f"{blocks[1]}.1.norm1"


def test_stream_without_stages_has_the_first_size_alone() -> None:
    stream = residual_stream(timm_swin(), ("layers.1",), IMAGES, staged=False)
    assert stream is not None and stream.stages == () and stream.mergings == ()
    assert [layer.module for layer in stream.attentions] == [f"layers.0.blocks.{i}.attn" for i in range(2)]
    (whole,) = stream.parts
    assert (whole.size, whole.readers, whole.first_norm) == (16, stream.readers, None)


def test_one_stage_before_the_tap_is_no_stream_with_stages() -> None:
    stream = residual_stream(timm_swin(), ("layers.0",), IMAGES)
    assert stream is not None and stream.stages == () and len(stream.attentions) == 2


def test_norms_after_the_sub_layers_make_no_stages() -> None:
    model = SwinTransformer(
        [3, 3], 16, [1, 1], [2, 2], [4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    )
    stream = residual_stream(model, ("features.3",), torch.zeros(2, 3, 24, 24))
    assert stream is not None and stream.stages == ()


def test_matrix_between_stages_of_contradicting_width_makes_no_stages() -> None:
    model = timm_swin()
    downsample = model.get_submodule("layers.1.downsample")
    downsample.norm, downsample.reduction = nn.Identity(), nn.Linear(64, 32, bias=False)
    stream = residual_stream(model, ("layers.1",), IMAGES)
    assert stream is not None and stream.stages == () and stream.size == 16
