"""Settings of `mtlsign convert`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mtlsign.config.base import Settings


class ConvertSettings(Settings):
    """Settings of a conversion to safetensors."""

    common: ClassVar[tuple[str, ...]] = ("source", "output", "base", "original", "weights_key", "json")

    # fmt: off
    source: Path = Field(description=".pt, .pth, .bin, .ckpt, .onnx, .gguf or .npz file, or folder of a Hugging Face model or of a LoRA adapter")
    output: Path = Field(description="new .safetensors file")
    base: Path | None = Field(None, description="checkpoint of the model that the adapter in the source changes [the model in the same folder]")
    original: Path | None = Field(None, description="folder or .gguf file of the pretrained transformer that was marked; the weights are written under its names, with its other tensors")
    weights_key: str | None = Field(None, min_length=1, max_length=200, description="entry of the checkpoint with the weights, such as state_dict_ema, or the prefix of their names [the weights as trained]")
    # fmt: on
