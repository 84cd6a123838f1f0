"""Weights from files: found under other libraries' names and prefixes, checked, brought to float32.

Two readers: `load_checkpoint` for the owner's own model (decision 7), which fails loudly, and `map_suspect`
for the verifier (decision 8), which reads only the tensors asked for and gives a reason instead of failing.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.storage.safetensors_io import parse_safetensors

MAX_BYTES = 4 * 1024**3
MAX_NAME = 512
COUNTER = "num_batches_tracked"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights", "params")
_PICKLES = (".pt", ".pth", ".bin")

_CONV = r"(convolution|normalization)"
#: transformers' ResNet names, after any prefix
_STEM = re.compile(rf"((?:.*\.)?)embedder\.embedder\.{_CONV}\.(\w+)")
_BLOCK = r"((?:.*\.)?)encoder\.stages\.([0-9])\.layers\.([0-9]+)"
_INNER = re.compile(rf"{_BLOCK}\.layer\.([0-9])\.{_CONV}\.(\w+)")
_SHORTCUT = re.compile(rf"{_BLOCK}\.shortcut\.{_CONV}\.(\w+)")
_HEAD = re.compile(r"((?:.*\.)?)classifier\.1\.(\w+)")


def torchvision_name(name: str) -> str | None:
    """The torchvision name of a transformers ResNet tensor, its prefix kept; None if it is no such name."""
    if match := _STEM.fullmatch(name):
        prefix, kind, leaf = match.groups()
        target = "conv1" if kind == "convolution" else "bn1"
    elif match := _INNER.fullmatch(name):
        prefix, stage, block, layer, kind, leaf = match.groups()
        target = f"layer{int(stage) + 1}.{block}.{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}"
    elif match := _SHORTCUT.fullmatch(name):
        prefix, stage, block, kind, leaf = match.groups()
        target = f"layer{int(stage) + 1}.{block}.downsample.{int(kind == 'normalization')}"
    elif match := _HEAD.fullmatch(name):
        prefix, leaf = match.groups()
        target = "fc"
    else:
        return None
    if prefix == "resnet." or prefix.endswith(".resnet."):
        prefix = prefix.removesuffix("resnet.")
    return f"{prefix}{target}.{leaf}"


def map_names(
    wanted: Iterable[str], available: Iterable[str], *, optional: Iterable[str] = (), strict: bool = False
) -> dict[str, str]:
    """Where each wanted name is to be found: wanted -> available, under one common prefix (possibly none).

    Tried in turn: the names as they are, then under the only prefix that has them all (`module.`,
    `_orig_mod.`, `model.`, ...), then the same with transformers' ResNet names. `optional` names and
    batch-norm counters may be missing. Raises ModelError, naming up to three, when some are missing or
    several prefixes fit; `strict` counts no prefix as one of them, so that a thief's file cannot lead a
    verifier to decoys beside the real weights.
    """
    wanted, optional = list(dict.fromkeys(wanted)), set(optional)
    required = [n for n in wanted if n not in optional and n.rpartition(".")[2] != COUNTER]
    names = [n for n in dict.fromkeys(available) if isinstance(n, str) and len(n) <= MAX_NAME]
    translated: dict[str, str] = {}
    for name in names:
        translated.setdefault(torchvision_name(name) or name, name)
    best: tuple[int, list[str]] = (-1, required)
    for table in ({name: name for name in names}, translated):
        prefixes = _prefixes(required, table)
        if len(prefixes) > 1 and (strict or "" not in prefixes):
            shown = ", ".join(repr(p[:80]) for p in sorted(prefixes)[:3])
            raise ModelError(
                f"the weights are there under several prefixes ({shown}): keep one of them in the file",
                field="checkpoint",
            )
        if prefixes:
            prefix = "" if "" in prefixes else next(iter(prefixes))
            return {name: table[prefix + name] for name in wanted if prefix + name in table}
        best = max(best, _nearest(required, table), key=lambda found: found[0])
    shown = ", ".join(name[:80] for name in best[1][:3])
    raise ModelError(
        f"{len(best[1])} of {len(required)} tensors are missing, such as {shown}: give a checkpoint of this "
        "architecture, or another --model",
        field="checkpoint",
    )


def _prefixes(required: Sequence[str], table: Mapping[str, str]) -> set[str]:
    if not required:
        return {""}
    detector = max(required, key=len)
    starts = {name[: -len(detector)] for name in table if name.endswith(detector)}
    return {p for p in starts if (not p or p.endswith(".")) and all(p + name in table for name in required)}


def _nearest(required: Sequence[str], table: Mapping[str, str]) -> tuple[int, list[str]]:
    """(tensors found, names missing) under the prefix that finds most of those the first names suggest."""
    starts = {""}
    for detector in required[:3]:
        starts |= {n[: -len(detector)] for n in table if n.endswith("." + detector)}
    results = [[name for name in required if p + name not in table] for p in sorted(starts, key=len)[:20]]
    missing = min(results, key=len)
    return len(required) - len(missing), missing


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file (or a folder's model.safetensors), or of a .pt/.pth/.bin of tensors.

    Nothing in the file is executed: torch.load runs with weights_only. Raises ModelError for a missing,
    oversized (over 4 GiB) or damaged file and for one that holds other objects.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ModelError(f"there is no file {path}: give the path of a checkpoint", field="checkpoint")
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path} is over {MAX_BYTES >> 30} GiB: give the weights alone", field="checkpoint")
    if path.suffix != ".safetensors" and path.suffix not in _PICKLES:
        raise ModelError(
            f"{path.name!r} has no known ending: use .safetensors, or {', '.join(_PICKLES)} of plain tensors",
            field="checkpoint",
        )
    try:
        if path.suffix == ".safetensors":
            return parse_safetensors(path.read_bytes(), max_bytes=MAX_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's doubts about a stranger's file are not the user's
            held = torch.load(path, map_location="cpu", weights_only=True)
    except ModelError as error:
        raise ModelError(f"{path} is refused ({error})", field="checkpoint") from None
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds objects other than tensors: save its state_dict as safetensors", field="checkpoint"
        ) from None
    except Exception as error:  # torch.load raises almost anything on damaged bytes
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}): save the state_dict again, best as safetensors",
            field="checkpoint",
        ) from None
    return _unwrap_state_dict(held, path)


def _unwrap_state_dict(held: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(held, Mapping):
            break
        tensors = {k: v for k, v in held.items() if isinstance(k, str) and isinstance(v, Tensor)}
        inner = next((held[key] for key in _CONTAINERS if isinstance(held.get(key), Mapping)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        held = inner
    raise ModelError(
        f"{path} holds no state_dict: save model.state_dict() as safetensors", field="checkpoint"
    )


def load_checkpoint(path: str | Path, model: nn.Module, *, classes_may_differ: bool = False) -> None:
    """Fill the owner's `model` from a checkpoint; other floats are converted to the model's.

    With `classes_may_differ` a last layer that is absent or of another shape keeps its random values. Raises
    ModelError as `read_checkpoint` and `map_names`, and for wrong shapes, numbers that are not finite, and
    tensors of layers that the model does not have; the model is then unchanged.
    """
    tensors = read_checkpoint(path)
    own = model.state_dict()
    head = _head(model) if classes_may_differ else ""
    loose = {name for name in own if head and name.startswith(head + ".")}
    names = map_names(own, tensors, optional=loose)
    _reject_unexpected_tensors(names, tensors, head)
    loaded: dict[str, Tensor] = {}
    for name, source in names.items():
        given, target = tensors[source], own[name]
        if given.shape != target.shape:
            if name in loose:
                continue
            raise ModelError(
                f"{source[:80]!r} is {list(given.shape)} and should be {list(target.shape)}: give a "
                "checkpoint of this architecture, or another --model, --width or --stem",
                field="checkpoint",
            )
        if target.is_floating_point():
            if given.dtype not in FLOATS:
                raise ModelError(f"{source[:80]!r} is {given.dtype}: save it as float32", field="checkpoint")
            given = given.to(target.dtype)
            if not bool(torch.isfinite(given).all()):
                raise ModelError(
                    f"{source[:80]!r} holds NaN or infinity: give a checkpoint that was trained to the end",
                    field="checkpoint",
                )
        elif given.is_floating_point() or given.is_complex():
            raise ModelError(
                f"{source[:80]!r} is {given.dtype}: save it as {target.dtype}", field="checkpoint"
            )
        loaded[name] = given
    with torch.no_grad():
        for name, given in loaded.items():
            own[name].copy_(given)


def _head(model: nn.Module) -> str:
    """Name of the last linear layer, which holds the classes."""
    return next((n for n, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), "")


def _reject_unexpected_tensors(names: Mapping[str, str], tensors: Mapping[str, Tensor], head: str) -> None:
    """Refuse a deeper network's checkpoint, which would otherwise fill this model with its first layers."""
    used = set(names.values())
    first = next(iter(names), "")
    prefix = names[first][: -len(first)] if first and names[first].endswith(first) else None
    if prefix is None:  # transformers' names
        strangers = [n for n in tensors if n not in used and torchvision_name(n) is not None]
    else:
        strangers = [n for n in tensors if n not in used and n.startswith(prefix)]
    strangers = [n for n in strangers if n.rpartition(".")[2] != COUNTER]
    if head and not any(name.startswith(head + ".") for name in names):
        owners = {n.rpartition(".")[0] for n in strangers}
        strangers = strangers if len(owners) > 1 else []  # one foreign layer: the other head
    if strangers:
        raise ModelError(
            f"the checkpoint has {len(strangers)} tensors that the model has not, such as "
            f"{', '.join(n[:80] for n in strangers[:3])}: give another --model, or a file without them",
            field="checkpoint",
        )


@dataclass(frozen=True)
class MappedTensors:
    """A suspect's tensors under the wanted names, float32 on the CPU; or none and the reason in `problem`."""

    tensors: Mapping[str, Tensor]
    problem: str | None


def select_tensors_untrusted(
    wanted: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    *,
    optional: Mapping[str, Sequence[int]] | None = None,
) -> MappedTensors:
    """Read from a hostile suspect only the tensors `wanted` (name -> shape), and `optional` ones if present.

    Half, bfloat16 and double become float32; NaN, infinity, other dtypes, wrong shapes, missing or ambiguous
    names are a `problem`. Never raises.
    """
    shapes = {**(optional or {}), **wanted}
    found: dict[str, Tensor] = {}
    try:
        names = map_names(shapes, tensors, optional=set(optional or {}) - set(wanted), strict=True)
        for name, source in names.items():
            problem, value = _validated_tensor(tensors[source], tuple(shapes[name]))
            if value is None:
                return MappedTensors({}, f"{source[:80]!r} {problem}")
            found[name] = value
    except ModelError as error:
        return MappedTensors({}, str(error))
    except Exception as error:  # whatever else a hostile object can do
        return MappedTensors({}, f"the tensors cannot be read ({type(error).__name__})")
    return MappedTensors(found, None)


def _validated_tensor(tensor: Tensor, shape: tuple[int, ...]) -> tuple[str, Tensor | None]:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return "is no plain tensor", None
    if tuple(tensor.shape) != shape:
        return f"is {list(tensor.shape)} and should be {list(shape)}", None
    if tensor.dtype not in FLOATS:
        return f"is {tensor.dtype}, only float16, bfloat16, float32 and float64 are read", None
    value = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(value).all()):
        return "holds NaN or infinity", None
    return "", value


def load_pretrained(model: nn.Module, graph: Mapping[str, object]) -> None:
    """Copy timm's pretrained weights into a network built from `graph`; the owner's side only asks the hub.

    Raises ModelError when the model is not timm's, or its weights cannot be had.
    """
    arch = str(graph["arch"])
    if not arch.startswith("timm/"):
        raise ModelError("'pretrained' is for timm/NAME models: give a checkpoint file", field="init")
    try:
        import timm

        trained = timm.create_model(
            arch[5:], pretrained=True, in_chans=graph["channels"], num_classes=graph["classes"]
        )
        model.load_state_dict(trained.state_dict())
    except Exception as error:
        raise ModelError(
            f"timm's weights of {arch[5:]!r} cannot be had ({type(error).__name__}): download them and "
            "give the file",
            field="init",
        ) from None
