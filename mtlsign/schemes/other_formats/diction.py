"""Files of the code of DICTION (Bellafqira and Coatrieux 2022, arXiv 2210.15745): Uchida, RIGA and DICTION.

A file is a dictionary of `torch.save`: `net` (state dict), `acc`, `epoch` and `supplementary`, which holds
the key and the model as a pickled module. Unknown classes are read as records, so that no code is executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.schemes.activation_marks import ActivationKey, ActivationMark, refused_samples
from mtlsign.schemes.other_formats.marked_file import (
    MarkedFile,
    checked_bits,
    checked_matrix,
    kernel_of,
    state_dict_of,
)
from mtlsign.schemes.registry import make_scheme
from mtlsign.schemes.riga import RigaKey
from mtlsign.schemes.training import evaluation_mode
from mtlsign.schemes.weight_marks import WeightKey
from mtlsign.storage.inert_pickle import Record, module_tensors, read_torch_file
from mtlsign.tasks import Task


@dataclass(frozen=True)
class DictionFileKey(ActivationKey):
    """Key of DICTION as its authors' code stores it.

    Attributes:
        layers: modules whose outputs are read, in order.
        chosen: positions of the features, int64.
        projection: two linear layers, each before a sigmoid; features -> n numbers from 0 to 1.
    """

    layers: tuple[str, ...] = ()
    chosen: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    projection: nn.Sequential = field(default_factory=nn.Sequential, repr=False)


@dataclass(frozen=True)
class DictionFileScheme(ActivationMark[DictionFileKey]):
    """Verification of DICTION as in its authors' code, with running statistics."""

    name = "diction_file"
    needs_commitment = True

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> DictionFileKey:
        """Refuse: keys of this form come from files. Raises `ModelError`."""
        raise ModelError("Keys of this scheme are read from files. Use the scheme 'diction'.", field="scheme")

    def scores(self, model: nn.Module, key: DictionFileKey) -> Tensor:
        """Return the mean outputs of the projection over the key samples, less one half, [n]."""
        features = _outputs(model, key.layers, key.inputs)
        if int(key.chosen.max()) >= features.shape[1]:
            raise ModelError(
                f"The layers have {features.shape[1]:,} features. Pass a copy of the marked model.",
                field="model",
            )
        outputs: Tensor = key.projection.to(features.device)(features[:, key.chosen.to(features.device)])
        return outputs.mean(0) - 0.5

    def bit_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross-entropy of the mean outputs."""
        outputs = (scores + 0.5).clamp(1e-6, 1 - 1e-6)
        return nn.functional.binary_cross_entropy(outputs, labels.to(outputs))


def _outputs(model: nn.Module, layers: Sequence[str], inputs: Tensor) -> Tensor:
    """Return the outputs of modules side by side, maps as means over channels: [samples, features]."""
    modules = dict(model.named_modules())
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise ModelError(f"The model has no layer {missing[0]!r}. Pass a copy of the marked model.",
                         field="model")  # fmt: skip
    outputs: dict[str, Tensor] = {}
    handles = [
        modules[layer].register_forward_hook(
            lambda module, arguments, output, layer=layer: outputs.__setitem__(layer, output)
        )
        for layer in layers
    ]
    try:
        with evaluation_mode(model):
            model(inputs.to(next(model.parameters()).device))
    except RuntimeError as error:
        raise refused_samples(error) from None
    finally:
        for handle in handles:
            handle.remove()
    parts = [outputs[layer] for layer in layers]
    return torch.cat([(part.mean(1) if part.dim() == 4 else part).flatten(1) for part in parts], 1)


def read_diction_file(path: str | Path) -> MarkedFile:
    """Read a marked model with its key as data; the scheme follows from the entries of the key.

    Files of the schemes Uchida, RIGA and DICTION are read. Those of DeepSigns hold a data loader, and those
    of ResEncrypt a network of another form.

    Args:
        path: a file below `results/watermarked_models` of that code.

    Raises:
        ModelError: the file is missing, damaged or of another format, or its scheme is not read.
    """
    content = read_torch_file(path)
    key = content.get("supplementary") if isinstance(content, Mapping) else None
    if not isinstance(key, Mapping) or not isinstance(key.get("watermark"), Tensor):
        raise ModelError(f"{path} holds no key. Give a file of a watermarked model.", field="file")
    tensors = state_dict_of(content.get("net"))
    bits = checked_bits(key["watermark"])
    if "model_ext" in key:
        return MarkedFile(tensors, make_scheme("riga", key_size=len(bits)), _riga_key(tensors, key, bits))
    if "x_key" in key:
        return MarkedFile(tensors, DictionFileScheme(key_size=len(bits)), _diction_key(key, bits))
    if isinstance(key.get("matrix_a"), Tensor) and isinstance(key.get("layer_name"), str):
        layer, weight = kernel_of(tensors, key["layer_name"])
        projection = checked_matrix(key["matrix_a"], weight[0].numel(), len(bits))
        uchida = WeightKey(layer, tuple(weight.shape), projection, bits)
        return MarkedFile(tensors, make_scheme("uchida", key_size=len(bits)), uchida)
    raise ModelError(f"{path} is of a scheme that is not read. Use Uchida, RIGA or DICTION.", field="file")


def read_diction_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a file of that code, marked or not.

    Args:
        path: the file.

    Raises:
        ModelError: the file is missing, damaged or of another format.
    """
    content = read_torch_file(path)
    return state_dict_of(content.get("net") if isinstance(content, Mapping) else None)


def _riga_key(tensors: Mapping[str, Tensor], key: Mapping[str, Any], bits: Tensor) -> RigaKey:
    """Return the key of RIGA; the extractor's last sigmoid is omitted, which changes no bit."""
    layer, weight = kernel_of(tensors, str(key.get("layer_name")))
    count = weight[0].numel()
    first, second = _linear(key["model_ext"], "fc1"), _linear(key["model_ext"], "fc2")
    if first.in_features != count or second.out_features != len(bits):
        raise ModelError("The file's extractor does not fit its layer. Save it again.", field="file")
    extractor = nn.Sequential(first, nn.Sigmoid(), second)
    return RigaKey(layer, tuple(weight.shape), torch.empty(0), bits, extractor)


def _diction_key(key: Mapping[str, Any], bits: Tensor) -> DictionFileKey:
    inputs, names, chosen = key["x_key"], key.get("layer_name"), key.get("indices")
    layers = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, list) else ()
    first, second = _linear(key.get("matrix_a"), "fc1"), _linear(key.get("matrix_a"), "fc2")
    if (
        not isinstance(inputs, Tensor)
        or not layers
        or not all(isinstance(name, str) for name in layers)
        or not isinstance(chosen, list)
        or len(chosen) != first.in_features
        or not all(isinstance(position, int) and position >= 0 for position in chosen)
        or second.out_features != len(bits)
    ):
        raise ModelError("The file's key is incomplete. Save it again.", field="file")
    projection = nn.Sequential(first, nn.Sigmoid(), second, nn.Sigmoid())
    return DictionFileKey(
        inputs.float(), bits, layers=layers, chosen=torch.tensor(chosen), projection=projection
    )


def _linear(network: object, name: str) -> nn.Linear:
    """Return a linear layer of a pickled network. Raises `ModelError` if it has none of that name."""
    tensors = module_tensors(network) if isinstance(network, Record) else {}
    weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    if weight is None or weight.dim() != 2 or not bool(torch.isfinite(weight).all()):
        raise ModelError(f"The file's key has no layer {name!r}. Save it again.", field="file")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(False)


def write_diction_file(path: str | Path, tensors: Mapping[str, Tensor], *, accuracy: float = 0.0) -> None:
    """Write a model as that code stores unmarked ones, for `path_model` of its configurations.

    Its embeddings start from such a file, and so write a second mark over a first one. Its other attacks
    read a pickled module of that code's classes from `supplementary`, which is empty here.

    Args:
        path: the file to write.
        tensors: state dict with the names of one of that code's architectures.
        accuracy: task accuracy in percent, which that code prints.
    """
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    torch.save({"net": copies, "acc": accuracy, "epoch": 0, "supplementary": None}, path)
