"""Adapters of low rank in folders of the library peft, merged into the model that they change.

The rules are those of peft for LoRA: W + B·A·alpha/r, or alpha/√r. Nothing of the library is executed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.models.checkpoints import FLOATS, read_checkpoint
from mtlsign.models.derived_weights.low_rank import adapter_product
from mtlsign.models.families import translation_of
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.safetensors_io import serialize_safetensors

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
#: Largest rank and alpha.
_MAX_RANK, _MAX_ALPHA = 65_536, 1e6
_DOWN, _UP = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class LowRankAdapter:
    """Adapter of low rank for the matrices of a network: W + scale·B·A.

    Attributes:
        factors: name of a weight in the network -> A float [r, in] and B float [out, r].
        complete: name in the network -> tensor of a layer that was trained as a whole.
        sources: name in the network -> name in the adapter's file, without `.lora_A.weight` for factors.
        scale: factor of the products.
        config: content of adapter_config.json.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    complete: Mapping[str, Tensor] = field(repr=False)
    sources: Mapping[str, str] = field(repr=False)
    scale: float
    config: bytes = field(repr=False)

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a network that holds the base, with the adapter merged into them.

        Raises:
            ModelError: the adapter does not fit the network.
        """
        merged = {**tensors, **self.complete}
        for name, (down, up) in self.factors.items():
            merged[name] = _sum(merged[name], down, up, self.scale)
        return merged

    def files(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, bytes]:
        """Return the files of an adapter folder with other factors of the same shapes, by name."""
        tensors = {self.sources[name]: tensor for name, tensor in self.complete.items()}
        for name, (down, up) in factors.items():
            for suffix, factor, original in zip((_DOWN, _UP), (down, up), self.factors[name], strict=True):
                stored = factor.detach().cpu().to(original.dtype).contiguous()
                tensors[f"{self.sources[name]}.{suffix}"] = stored
        return {CONFIG: self.config, _WEIGHTS[0]: serialize_safetensors(tensors)}


def read_adapter(folder: Path, names: Collection[str]) -> LowRankAdapter:
    """Read an adapter of the library peft for a network.

    Args:
        folder: with `adapter_config.json` and the adapter's weights.
        names: names of the network's tensors; the adapter may have those of other libraries.

    Raises:
        ModelError: a file is missing or damaged, or the adapter is of another kind or another model.
    """
    folder = folder.expanduser()
    if not is_adapter(folder):
        raise ModelError(f"{folder} has no {CONFIG}. Give the folder of an adapter.", field="adapter")
    try:
        config = (folder / CONFIG).read_bytes()
        scale = _scale(read_json_object(config, CONFIG), folder)
    except (ArtifactError, OSError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error}).", field="adapter") from None
    tensors = dict(read_checkpoint(_weights_file(folder)).tensors)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    complete: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(f".{_DOWN}")
        if name.endswith(_UP):
            continue
        if layer == name:
            target = _network_name(name, names)
            complete[target] = tensor
        elif f"{layer}.{_UP}" in tensors:
            target = _network_name(f"{layer}.weight", names)
            factors[target] = (tensor, tensors[f"{layer}.{_UP}"])
        else:
            raise ModelError(f"{name[:80]!r} has no second factor. Save the adapter again.", field="adapter")
        sources[target] = layer
    if not factors:
        raise ModelError(f"{folder} has no factors of low rank. Save the adapter again.", field="adapter")
    return LowRankAdapter(factors, complete, sources, scale, config)


def _network_name(name: str, names: Collection[str]) -> str:
    """Return the network's name of a tensor that an adapter changes, as it is or in another spelling."""
    plain = name.removeprefix(_PREFIX)
    translation = translation_of(plain)
    translated = plain if translation is None else translation.target
    return _target(plain if _matches(plain, names) else translated, names)


def _weights_file(folder: Path) -> Path:
    """Return the file with an adapter's weights. Raises `ModelError` if there is none."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} has no {_WEIGHTS[0]}. Fetch the adapter again.", field="source")
    return path


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
    _weights_file(folder)
    if base is None and not any(folder.glob("model*.safetensors*")):
        raise ModelError(
            f"{folder} holds an adapter alone. Pass the model that it changes with --base.", field="base"
        )
    tensors = read_checkpoint(base or folder).tensors
    try:
        return read_adapter(folder, tensors).merged(tensors)
    except ModelError as error:
        field = "source" if error.field == "adapter" else error.field
        raise ModelError(error.detail, field=field) from None


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


def _target(name: str, tensors: Collection[str]) -> str:
    """Return the name of a model's tensor, which can have a prefix in one of the two files."""
    matches = _matches(name, tensors)
    if len(matches) != 1:
        raise ModelError(
            f"The model has {len(matches)} tensors for {name[:80]!r} of the adapter. Pass the model that it "
            "changes.",
            field="base",
        )
    return matches[0]


def _matches(name: str, tensors: Collection[str]) -> list[str]:
    """Return the names that equal `name` or, if there is none, differ from it by a prefix."""
    if name in tensors:
        return [name]
    return [other for other in tensors if other.endswith(f".{name}") or name.endswith(f".{other}")]


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
