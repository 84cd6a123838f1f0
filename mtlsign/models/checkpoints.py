"""Checkpoint files of the owner: read, matched to a model by tensor names, checked and loaded."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.families import translation_of
from mtlsign.models.tensor_names import is_counter, map_names
from mtlsign.storage.safetensors_io import parse_safetensors

MAX_BYTES = 4 * 1024**3
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights", "params")
_PICKLES = (".pt", ".pth", ".bin")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a .safetensors file, a model folder, or a .pt/.pth/.bin file of tensors.

    No code in the file is executed, because torch.load runs with weights_only. Raises `ModelError` for a
    missing or damaged file, one over 4 GiB, and one that holds other objects.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"The file {path} does not exist. Give the path of a checkpoint.", field="checkpoint"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(
            f"{path} is larger than {MAX_BYTES >> 30} GiB. Give the weights alone.", field="checkpoint"
        )
    if path.suffix != ".safetensors" and path.suffix not in _PICKLES:
        raise ModelError(
            f"{path.name!r} has an unknown ending. Use .safetensors, or {', '.join(_PICKLES)} with tensors.",
            field="checkpoint",
        )
    try:
        if path.suffix == ".safetensors":
            return parse_safetensors(path.read_bytes(), max_bytes=MAX_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns about details of the file that the user cannot change
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ModelError as error:
        raise ModelError(f"{path} is invalid ({error}). Save it again.", field="checkpoint") from None
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds objects other than tensors. Save its state_dict as safetensors.",
            field="checkpoint",
        ) from None
    except Exception as error:  # torch.load raises almost anything on damaged bytes
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}). Save the state_dict again as safetensors.",
            field="checkpoint",
        ) from None
    return _unwrap_state_dict(content, path)


def _unwrap_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        content = inner
    raise ModelError(
        f"{path} holds no state_dict. Save model.state_dict() as safetensors.", field="checkpoint"
    )


def load_checkpoint(path: str | Path, model: nn.Module, *, classes_may_differ: bool = False) -> None:
    """Load a checkpoint into the owner's model; floating-point tensors are converted to the model's types.

    Args:
        path: file or model folder.
        model: changed in place, or left unchanged if an error is raised.
        classes_may_differ: keep the random values of a last layer that is absent or of another shape.

    Raises:
        ModelError: as `read_checkpoint` and `map_names`; also for wrong shapes, values that are not finite,
            and tensors of layers that the model does not have.
    """
    tensors = read_checkpoint(path)
    state = model.state_dict()
    head = _head(model) if classes_may_differ else ""
    optional = {name for name in state if head and name.startswith(head + ".")}
    names = map_names(state, tensors, optional=optional)
    _reject_unexpected_tensors(names, tensors, head)
    values = {
        name: _converted(source, tensors[source], state[name])
        for name, source in names.items()
        if _fits(source, tensors[source], state[name], name in optional)
    }
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def _fits(source: str, value: Tensor, target: Tensor, optional: bool) -> bool:
    """Return whether shapes are equal. Raises `ModelError` if they are not and the tensor is required."""
    if value.shape != target.shape and not optional:
        raise ModelError(
            f"{source[:80]!r} is {list(value.shape)} and should be {list(target.shape)}. "
            "Give a checkpoint of this architecture, or another --model, --width or --stem.",
            field="checkpoint",
        )
    return value.shape == target.shape


def _converted(source: str, value: Tensor, target: Tensor) -> Tensor:
    """Return the value in the type of `target`. Raises `ModelError` for unsuitable types and values."""
    if target.is_floating_point():
        if value.dtype not in FLOATS:
            raise ModelError(f"{source[:80]!r} is {value.dtype}. Save it as float32.", field="checkpoint")
        value = value.to(target.dtype)
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"{source[:80]!r} holds NaN or infinity. Give a checkpoint whose training converged.",
                field="checkpoint",
            )
    elif value.is_floating_point() or value.is_complex():
        raise ModelError(f"{source[:80]!r} is {value.dtype}. Save it as {target.dtype}.", field="checkpoint")
    return value


def _head(model: nn.Module) -> str:
    """Return the name of the last linear layer, whose outputs are the classes."""
    return next((n for n, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), "")


def _reject_unexpected_tensors(names: Mapping[str, str], tensors: Mapping[str, Tensor], head: str) -> None:
    """Reject the checkpoint of a deeper network, whose first layers would otherwise fill this model."""
    unexpected = _unexpected(names, tensors, set(names.values()))
    if head and not any(name.startswith(head + ".") for name in names):
        layers = {n.rpartition(".")[0] for n in unexpected}
        unexpected = unexpected if len(layers) > 1 else []  # a single foreign layer is the other head
    if unexpected:
        raise ModelError(
            f"The checkpoint has {len(unexpected)} tensors that the model has not, such as "
            f"{', '.join(n[:80] for n in unexpected[:3])}. Give another --model, or a file without them.",
            field="checkpoint",
        )


def _unexpected(names: Mapping[str, str], tensors: Mapping[str, Tensor], used: Set[str]) -> list[str]:
    first = next(iter(names), "")
    prefix = names[first][: -len(first)] if first and names[first].endswith(first) else None
    if prefix is None:  # names of another library
        unexpected = [n for n in tensors if n not in used and translation_of(n) is not None]
    else:
        unexpected = [n for n in tensors if n not in used and n.startswith(prefix)]
    return [n for n in unexpected if not is_counter(n)]
