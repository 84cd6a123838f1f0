"""Adapters of low rank in folders of the library peft, merged into the model that they change.

The rules are those of peft for LoRA: W + B·A·alpha/r, or alpha/√r. Nothing of the library is executed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.checkpoints import FLOATS, read_checkpoint
from mtlsign.models.derived_weights.low_rank import adapter_product
from mtlsign.storage.json_io import read_json_object

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
#: Largest rank and alpha.
_MAX_RANK, _MAX_ALPHA = 65_536, 1e6
_DOWN, _UP = "lora_A.weight", "lora_B.weight"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of peft."""
    return (folder / CONFIG).is_file()


def merge_adapter(folder: Path, base: Path | None) -> dict[str, Tensor]:
    """Return the weights of a model with an adapter merged into them.

    Args:
        folder: with `adapter_config.json` and the adapter's weights.
        base: checkpoint of the model that the adapter changes; None if the folder holds it as well.

    Raises:
        ModelError: a file is missing or damaged, or the adapter is of another kind or another model.
    """
    scale = _scale(read_json_object((folder / CONFIG).read_bytes(), CONFIG), folder)
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} has no {_WEIGHTS[0]}. Fetch the adapter again.", field="source")
    if base is None and not any(folder.glob("model*.safetensors*")):
        raise ModelError(
            f"{folder} holds an adapter alone. Pass the model that it changes with --base.", field="base"
        )
    merged = dict(read_checkpoint(base or folder).tensors)
    adapter = {name.removeprefix(_PREFIX): t for name, t in read_checkpoint(path).tensors.items()}
    for name, tensor in adapter.items():
        layer = name.removesuffix(_DOWN)
        if name.endswith(_DOWN) and layer + _UP in adapter:
            target = _target(f"{layer}weight", merged)
            merged[target] = _sum(merged[target], tensor, adapter[layer + _UP], scale)
        elif not name.endswith((_DOWN, _UP)):
            merged[_target(name, merged)] = tensor  # a layer that was trained as a whole
    return merged


def _sum(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return W + scale·B·A in W's type."""
    if not {weight.dtype, down.dtype, up.dtype} <= set(FLOATS):
        raise ModelError(
            "The adapter or its model is not stored as floats. Convert it first.", field="source"
        )
    product = adapter_product(down.double(), up.double())
    if product.shape != weight.shape:
        raise ModelError("The adapter does not fit the model. Pass the model that it changes.", field="base")
    return (weight.double() + scale * product).to(weight.dtype)


def _target(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the name of a model's tensor, which can have a prefix in one of the two files."""
    if name in tensors:
        return name
    matches = [other for other in tensors if other.endswith(f".{name}") or name.endswith(f".{other}")]
    if len(matches) != 1:
        raise ModelError(
            f"The model has {len(matches)} tensors for {name[:80]!r} of the adapter. Pass the model that it "
            "changes.",
            field="base",
        )
    return matches[0]


def _scale(config: Mapping[str, Any], folder: Path) -> float:
    """Return the factor of the products."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        raise ModelError(f"{folder} holds no plain LoRA. Merge it with its library.", field="source")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ModelError(
            f"{folder} has ranks or alphas of single layers. Merge it with its library.", field="source"
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MAX_RANK:
        raise ModelError(f"r in {CONFIG} is no rank from 1 to {_MAX_RANK}. Correct it.", field="source")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= _MAX_ALPHA:
        raise ModelError(
            f"lora_alpha in {CONFIG} is no number from 0 to {_MAX_ALPHA:g}. Correct it.", field="source"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
