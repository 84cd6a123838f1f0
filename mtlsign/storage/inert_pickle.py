"""Torch files with pickled objects of unknown classes, read as data: no class is imported and no code runs.

`torch.load(weights_only=True)` refuses a file that holds a whole module. Here every class and function that a
file names stands for an empty `Record`; calling it makes a record of its arguments, and its state is stored.
Tensors and ordered dictionaries alone are rebuilt.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError

#: Bytes of all entries of a file together, at most.
MAX_BYTES = 4 * 1024**3
_MAX_PICKLE, _MAX_DEPTH = 64 * 1024**2, 100
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class _Sealed(type):
    """Class whose attributes a file cannot set."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError("a record's class has no attributes to set")


class Record(metaclass=_Sealed):
    """Object of a class that is not imported.

    Attributes:
        state: what the file would set as the object's attributes.
    """

    state: dict[str, Any]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Ignore the arguments with which the file would make the object."""
        record = super().__new__(cls)
        record.state = {}
        return record

    def __init__(self, *_: Any, **__: Any) -> None:
        """Ignore them as well."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def append(self, value: Any) -> None:
        """Ignore an item, which lists of unknown classes add."""

    def extend(self, values: Any) -> None:
        """Ignore items."""


def module_tensors(module: object, prefix: str = "") -> dict[str, Tensor]:
    """Return parameters and buffers of a pickled `nn.Module` by their names in its state dict.

    Args:
        module: record of the module.
        prefix: text before each name, with a dot at its end.

    Raises:
        ModelError: the object is no record of a module, or its modules are nested too deeply, as in a module
            that contains itself.
    """
    if prefix.count(".") > _MAX_DEPTH:
        raise ModelError("The file's modules are nested too deeply. Save it again.", field="file")
    if not isinstance(module, Record) or not isinstance(module.state.get("_modules"), dict):
        raise ModelError("The file holds no network where one is expected. Save it again.", field="file")
    tensors: dict[str, Tensor] = {}
    for group in ("_parameters", "_buffers"):
        values = module.state.get(group)
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
    for name, child in module.state["_modules"].items():
        if child is not None:
            tensors |= module_tensors(child, f"{prefix}{name}.")
    return tensors


def read_torch_file(path: str | Path) -> Any:
    """Return the content of a file of `torch.save` (torch 1.6 or later) with records for unknown objects.

    Args:
        path: the file, a zip archive.

    Raises:
        ModelError: the file is missing, damaged, too large or of another format.
    """
    path = Path(path).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise ModelError(f"{path} is larger than {MAX_BYTES >> 30} GiB.", field="file")
            return _content(archive)
    except ModelError:
        raise
    except FileNotFoundError:
        raise ModelError(f"The file {path} does not exist. Give its path.", field="file") from None
    except Exception as error:  # damaged bytes raise almost anything
        raise ModelError(
            f"{path} is no readable file of torch.save ({type(error).__name__}). Save it with torch 1.6 or "
            "later.",
            field="file",
        ) from None


def _content(archive: zipfile.ZipFile) -> Any:
    (pickled,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if pickled.file_size > _MAX_PICKLE:
        raise ModelError("The file's structure is too large.", field="file")
    folder = pickled.filename.removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ModelError("The file has big-endian numbers. Save it on another machine.", field="file")
    return _Unpickler(archive.read(pickled), lambda key: archive.read(f"{folder}data/{key}")).load()


class _Storage:
    """Numbers of one or several tensors: flat, of one dtype."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class _Unpickler(pickle.Unpickler):
    """Unpickler that imports nothing."""

    def __init__(self, content: bytes, read: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(content))
        self._read, self._storages = read, {}  # type: ignore[var-annotated]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _Tensors() if name == "_rebuild_tensor_v2" else _Parameters()
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        return _Sealed(name.rpartition(".")[2], (Record,), {})

    def persistent_load(self, reference: Any) -> Any:
        kind, dtype, key, _, count = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("unknown storage")
        if key not in self._storages:
            content = bytearray(self._read(str(key)))
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            if len(values) < int(count):
                raise pickle.UnpicklingError("short storage")
            self._storages[key] = _Storage(values)
        return self._storages[key]


class _Tensors:
    """Callable that rebuilds a tensor as a copy. It has no attributes that a file could set."""

    __slots__ = ()

    def __call__(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        if any(not isinstance(number, int) or number < 0 for number in (offset, *size, *stride)):
            raise pickle.UnpicklingError("negative size")
        if math.prod(size) > max(1, len(storage.values)):  # strides of 0 would multiply the memory
            raise pickle.UnpicklingError("expanded tensor")
        return torch.as_strided(storage.values, size, stride, offset).clone()


class _Parameters:
    """Callable that rebuilds a parameter without gradients."""

    __slots__ = ()

    def __call__(self, data: Tensor, *_: Any) -> Tensor:
        return nn.Parameter(data, requires_grad=False)
