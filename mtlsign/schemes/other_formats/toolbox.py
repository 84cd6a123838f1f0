"""Files of the Watermark-Robustness-Toolbox (Lukas et al. 2022, arXiv 2108.04974).

Its `best.pth` is a dictionary of `torch.save`: `model` and `optimizer` (state dicts), the numpy arrays `x_wm`
and `y_wm`, and for Uchida's scheme `layer_idx`, a position in the list of parameters. The name of the scheme
stands in a YAML file next to it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.schemes.other_formats.marked_file import (
    MarkedFile,
    checked_bits,
    checked_matrix,
    kernel_of,
    state_dict_of,
)
from mtlsign.schemes.registry import make_scheme
from mtlsign.schemes.trigger_marks import TriggerKey
from mtlsign.schemes.weight_marks import WeightKey

#: Schemes of the toolbox whose files can be read, by the names of this package.
TOOLBOX_SCHEMES = (
    "uchida", "adi", "zhang_content", "zhang_noise", "zhang_unrelated", "frontier_stitching",
)  # fmt: skip
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NUMPY_NAMES = ("numpy.core.multiarray", "numpy._core.multiarray")


def read_toolbox_file(path: str | Path, scheme: str, *, classes: int = 10) -> MarkedFile:
    """Read a `best.pth` as data; no code of the file is executed.

    Args:
        path: the file.
        scheme: one of `TOOLBOX_SCHEMES`; the file does not name it.
        classes: outputs of the model, for the null rate of key samples.

    Raises:
        ModelError: the file is missing, damaged or of another format, or its scheme is not read.
    """
    if scheme not in TOOLBOX_SCHEMES:
        raise ModelError(
            f"Files of the scheme {scheme[:60]!r} are not read. Use one of {', '.join(TOOLBOX_SCHEMES)}.",
            field="scheme",
        )
    content = _load(Path(path).expanduser())
    tensors = state_dict_of(content.get("model"))
    samples, answers = _array(content, "x_wm"), _array(content, "y_wm")
    if scheme == "uchida":
        key = _weight_key(tensors, content.get("layer_idx"), samples, answers)
        return MarkedFile(tensors, make_scheme("uchida", key_size=len(key.bits)), key)
    rate = 0.5 if scheme == "frontier_stitching" else 1 / classes
    trigger = _trigger_key(samples, answers, classes, rate)
    return MarkedFile(tensors, make_scheme(scheme, key_size=len(trigger.classes)), trigger)


def _load(path: Path) -> Mapping[str, Any]:
    """Return the dictionary. Tensors, numbers, texts and arrays of numbers alone are accepted."""
    types = [
        type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.int32, np.uint8, np.bool_)
    ]
    rebuild: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    functions = [(rebuild, f"{module}._reconstruct") for module in _NUMPY_NAMES]
    functions += [(scalar, f"{module}.scalar") for module in _NUMPY_NAMES]
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([np.ndarray, np.dtype, *types, *functions]),
        ):
            warnings.simplefilter("ignore")  # torch warns about details that the user cannot change
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"The file {path} does not exist. Give its path.", field="file") from None
    except Exception as error:  # torch.load raises almost anything on damaged bytes
        raise ModelError(
            f"{path} is damaged, or holds other objects than tensors and arrays ({type(error).__name__}).",
            field="file",
        ) from None
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds no dictionary. Give the toolbox's best.pth.", field="file")
    return content


def _array(content: Mapping[str, Any], name: str) -> Tensor:
    value = content.get(name)
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        raise ModelError(f"The file has no array {name!r} of numbers. Give the toolbox's best.pth.",
                         field="file")  # fmt: skip
    return torch.from_numpy(np.ascontiguousarray(value))


def _weight_key(tensors: Mapping[str, Tensor], index: object, matrix: Tensor, message: Tensor) -> WeightKey:
    """Return the key of Uchida's scheme; `x_wm` is [n, values] there and [values, n] here."""
    names = _parameter_names(tensors)
    if not isinstance(index, int) or not -len(names) <= index < len(names):
        raise ModelError("The file's layer_idx is no position of a parameter. Save it again.", field="file")
    layer, weight = kernel_of(tensors, names[index])
    if weight.dim() != 4:
        raise ModelError(
            f"The key reads the whole matrix {names[index]!r}; only convolutions are read as here.",
            field="file",
        )
    bits = checked_bits(message)
    projection = checked_matrix(matrix, len(bits), weight[0].numel()).T.contiguous()
    return WeightKey(layer, tuple(weight.shape), projection, bits)


def _trigger_key(samples: Tensor, answers: Tensor, classes: int, rate: float) -> TriggerKey:
    """Return key samples; `y_wm` has classes or one-hot rows."""
    labels = answers.argmax(1) if answers.dim() == 2 and answers.shape[1] == classes else answers.flatten()
    if (
        samples.dim() != 4
        or not len(samples) == len(labels) >= 1
        or not bool(torch.isfinite(samples.float()).all())
        or not bool(((labels >= 0) & (labels < classes)).all())
    ):
        raise ModelError(f"The file has no key images with classes below {classes}.", field="file")
    return TriggerKey(samples.float(), labels.long(), rate)


def read_toolbox_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a `best.pth`, such as a model that the toolbox has attacked.

    Args:
        path: the file.

    Raises:
        ModelError: the file is missing, damaged or of another format.
    """
    return state_dict_of(_load(Path(path).expanduser()).get("model"))


def write_toolbox_file(
    path: str | Path, tensors: Mapping[str, Tensor], key: WeightKey | TriggerKey | None = None
) -> None:
    """Write a `best.pth` that the toolbox loads: the legacy form of `torch.save`, which every torch reads.

    The optimiser is SGD with momentum, in its first step.

    Args:
        path: the file to write.
        tensors: state dict with the names of the toolbox's architecture, such as torchvision's ResNets. With
            a key it must be in the network's order, because the toolbox counts parameters.
        key: key of `uchida` for a convolution, or key images; None for a model without a key. The toolbox's
            `embed.py` loads every such file as a pretrained model. `steal.py`, which runs its attacks, needs
            a key.

    Raises:
        ModelError: the key is for another network or no convolution.
    """
    names = _parameter_names(tensors)
    optimizer = torch.optim.SGD([nn.Parameter(tensors[name].float()) for name in names], 0.01, momentum=0.9)
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    content: dict[str, Any] = {"model": copies, "optimizer": optimizer.state_dict()}
    if isinstance(key, TriggerKey):
        content["x_wm"], content["y_wm"] = key.inputs.float().numpy(), key.classes.long().numpy()
    elif key is not None:
        if f"{key.layer}.weight" not in names or len(key.shape) != 4:
            raise ModelError("The key is for no convolution of this network. Pass its network.", field="key")
        content["layer_idx"] = names.index(f"{key.layer}.weight")
        content["x_wm"] = np.ascontiguousarray(key.projection.T.float().numpy())
        content["y_wm"] = key.bits.long().numpy()
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    # numpy 1 has no numpy._core; a legacy file stores no lengths of its pickles
    Path(path).write_bytes(buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))


def _parameter_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters in their order; statistics of batch norms are none."""
    return [name for name in tensors if name.rpartition(".")[2] not in _STATISTICS]
