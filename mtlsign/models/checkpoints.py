"""Checkpoint files of the owner: read, matched to a model by tensor names, checked and loaded."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError, MTLSignError
from mtlsign.models.families import translation_of
from mtlsign.models.tensor_names import is_counter, map_names
from mtlsign.storage.file_formats import (
    INDEX_SUFFIX,
    MAX_INDEX_BYTES,
    PICKLES,
    conversion_hint,
    find_model_file,
    is_safetensors,
    read_shards,
)
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.local import LocalStorage
from mtlsign.storage.safetensors_io import parse_safetensors

MAX_BYTES = 4 * 1024**3
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights", "params")
#: Names under which training programs store averaged weights.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "averaged_model")
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_DEPTH = 4


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint.

    Attributes:
        tensors: the tensors by name.
        key: entry of the file that holds them; None if the file holds nothing else.
        other_keys: entries with further weights, such as averaged ones.
    """

    tensors: dict[str, Tensor]
    key: str | None = None
    other_keys: tuple[str, ...] = ()

    def statement(self) -> str | None:
        """Return a sentence on the chosen weights; None if there was no choice."""
        if self.key is None or (not self.other_keys and self.key.rpartition(".")[2] not in _AVERAGED):
            return None
        others = f" The file also has {', '.join(self.other_keys)}." if self.other_keys else ""
        choice = " Choose with --weights-key." if self.other_keys else ""
        return f"The weights are those of {self.key!r}.{others}{choice}"


def read_checkpoint(path: str | Path, *, key: str | None = None) -> Checkpoint:
    """Read the tensors of an owner's checkpoint. No code in the file is executed.

    Args:
        path: a .safetensors file, a model folder, a folder or index of a Hugging Face model, or a .pt, .pth,
            .bin or .ckpt file that `torch.load` reads with `weights_only`.
        key: entry with the weights, such as `state_dict_ema`, or the prefix of their names; by default the
            weights as trained, before averaged ones.

    Raises:
        ModelError: the file is missing, damaged, over 4 GiB or of another format, holds other objects, or has
            no such entry.
    """
    path = _existing_file(Path(path).expanduser())
    if path.name.endswith(".bin.index.json"):
        content: Any = _read_pickled_shards(path)
    elif path.name.endswith(INDEX_SUFFIX):
        content = _read_safetensors_shards(path)
    elif is_safetensors(path.name):
        content = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    return _select_state_dict(content, path, key)


def _existing_file(path: Path) -> Path:
    """Return the file, or the model's file in a folder. Raises `ModelError` for a missing or unknown one."""
    if path.is_dir():
        name = find_model_file(LocalStorage(path.absolute()))
        names = [name] if name is not None else [n for n in _PICKLE_FILES if (path / n).is_file()]
        path = path / (names[0] if names else "model.safetensors")
    if not path.is_file():
        raise ModelError(
            f"The file {path} does not exist. Give the path of a checkpoint.", field="checkpoint"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(
            f"{path} is larger than {MAX_BYTES >> 30} GiB. Give the weights alone.", field="checkpoint"
        )
    is_index = path.name.endswith((INDEX_SUFFIX, ".bin.index.json"))
    if is_safetensors(path.name) or is_index or path.suffix.lower() in PICKLES:
        return path
    raise ModelError(
        conversion_hint(str(path))
        or f"{path.name!r} has an unknown ending. Use .safetensors, or {', '.join(PICKLES)} with tensors.",
        field="checkpoint",
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return parse_safetensors(path.read_bytes(), max_bytes=MAX_BYTES)
    except ModelError as error:
        raise ModelError(f"{path} is invalid ({error}). Save it again.", field="checkpoint") from None


def _read_safetensors_shards(path: Path) -> dict[str, Tensor]:
    try:
        return read_shards(LocalStorage(path.parent.absolute()), path.name, MAX_BYTES)
    except MTLSignError as error:
        raise ModelError(
            f"The files of {path} are invalid ({error}). Fetch them again.", field="checkpoint"
        ) from None


def _read_pickled_shards(path: Path) -> dict[str, Tensor]:
    index = read_json_object(path.read_bytes(), path.name, limit=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    tensors: dict[str, Tensor] = {}
    for name in sorted(map(str, names)):
        tensors |= _select_state_dict(_read_pickle(path.with_name(Path(name).name)), path, None).tensors
    return tensors


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about details that the user cannot change
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} is damaged, or holds objects other than tensors. Save its state_dict as safetensors.",
            field="checkpoint",
        ) from None
    except Exception as error:  # torch.load raises almost anything on damaged bytes
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}). Save the state_dict again as safetensors.",
            field="checkpoint",
        ) from None


def _select_state_dict(content: Any, path: Path, key: str | None) -> Checkpoint:
    candidates = _state_dicts(content)
    if key is not None:
        names = [name for name in candidates if key in (name, name.rpartition(".")[2])]
        chosen = candidates[names[0]] if names else _with_prefix(content, key)
        if not chosen:
            raise ModelError(
                f"{path} has no weights under {key[:80]!r}. Use one of {', '.join(candidates) or 'its own'}.",
                field="weights-key",
            )
        others = tuple(name for name in candidates if name not in names[:1])
        return Checkpoint(chosen, names[0] if names else key, others)
    if not candidates:
        raise ModelError(
            f"{path} holds no state_dict. Save model.state_dict() as safetensors.", field="checkpoint"
        )
    first, *further = candidates
    return Checkpoint(candidates[first], first or None, tuple(further))


def _state_dicts(content: Any, depth: int = 0) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts in a checkpoint by their dotted keys, trained weights before averaged ones."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return {}
    candidates: dict[str, dict[str, Tensor]] = {}
    for key in (*_CONTAINERS, *_AVERAGED):
        for inner, tensors in _state_dicts(content.get(key), depth + 1).items():
            candidates[f"{key}.{inner}" if inner else key] = tensors
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return candidates or ({"": tensors} if tensors else {})


def _with_prefix(content: Any, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    start = prefix.rstrip(".") + "."
    tensors = next(iter(_state_dicts(content).values()), {})
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    classes_may_differ: bool = False,
    key: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Load a checkpoint into the owner's model; floating-point tensors are converted to the model's types.

    Args:
        path: see `read_checkpoint`.
        model: changed in place, or left unchanged if an error is raised.
        classes_may_differ: keep the random values of a last layer that is absent or of another shape.
        key: see `read_checkpoint`.
        log: called with a sentence on the chosen weights if the file holds several.

    Raises:
        ModelError: as `read_checkpoint` and `map_names`; also for wrong shapes, values that are not finite,
            and tensors of layers that the model does not have.
    """
    checkpoint = read_checkpoint(path, key=key)
    tensors = checkpoint.tensors
    state = model.state_dict()
    head = _head(model) if classes_may_differ else ""
    optional = {name for name in state if head and name.startswith(head + ".")}
    tied = _tied_names(state)
    names = map_names(state, tensors, optional=optional.union(*tied))
    _require_tied_weights(names, tied)
    _reject_unexpected_tensors(names, tensors, head)
    values = {
        name: converted(source, tensors[source], state[name])
        for name, source in names.items()
        if _fits(source, tensors[source], state[name], name in optional)
    }
    if (statement := checkpoint.statement()) is not None:
        log(statement)
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def _tied_names(state: Mapping[str, Tensor]) -> list[frozenset[str]]:
    """Return the groups of names that share one tensor; a file may have only one name of a group."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tuple(tensor.stride())), []).append(name)
    return [frozenset(names) for names in groups.values() if len(names) > 1]


def _require_tied_weights(names: Collection[str], tied: Sequence[Collection[str]]) -> None:
    for group in tied:
        if not any(name in names for name in group):
            raise ModelError(
                f"The tied weights {', '.join(sorted(group))[:200]} are missing. Give a checkpoint of this "
                "architecture, or another --model.",
                field="checkpoint",
            )


def _fits(source: str, value: Tensor, target: Tensor, optional: bool) -> bool:
    """Return whether shapes are equal. Raises `ModelError` if they are not and the tensor is required."""
    if value.shape != target.shape and not optional:
        raise ModelError(
            f"{source[:80]!r} is {list(value.shape)} and should be {list(target.shape)}. "
            "Give a checkpoint of this architecture, or another --model, --width or --stem.",
            field="checkpoint",
        )
    return value.shape == target.shape


def converted(source: str, value: Tensor, target: Tensor) -> Tensor:
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
