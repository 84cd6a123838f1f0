"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from torchvision.datasets, in memory as uint8."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from mtlsign.errors import DataError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.tasks.base import Task
from mtlsign.tasks.splitting import share_of_rows, split_training_rows
from mtlsign.tasks.tensor_split import InputTransform, tensor_splits

_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


#: MD5 of the unpacked official files: data set, file. They show files in the folder of another data set.
OFFICIAL_FILES: dict[str, tuple[str, str]] = {
    "6bbc9ace898e44ae57da46a324031adb": ("mnist", "train-images-idx3-ubyte"),
    "a25bea736e30d166cdddb491f175f624": ("mnist", "train-labels-idx1-ubyte"),
    "2646ac647ad5339dbf082846283269ea": ("mnist", "t10k-images-idx3-ubyte"),
    "27ae3e4e09519cfbb04c329615203637": ("mnist", "t10k-labels-idx1-ubyte"),
    "f4a8712d7a061bf5bd6d2ca38dc4d50a": ("fashion-mnist", "train-images-idx3-ubyte"),
    "9018921c3c673c538a1fc5bad174d6f9": ("fashion-mnist", "train-labels-idx1-ubyte"),
    "8181f5470baa50b63fa0f6fddb340f0a": ("fashion-mnist", "t10k-images-idx3-ubyte"),
    "15d484375f8d13e6eb1aabb0c3f46965": ("fashion-mnist", "t10k-labels-idx1-ubyte"),
}

#: Errors of torchvision's readers for missing, truncated and altered files.
_DAMAGED = (RuntimeError, ValueError, OSError, EOFError, LookupError, AssertionError, pickle.PickleError)


@dataclass(frozen=True)
class Source:
    """Data set of torchvision.

    Attributes:
        dataset: torchvision's class.
        folder: folder below the data root.
        files: files in that folder.
        channels: image channels.
        side: image height and width in pixels.
        classes: number of classes.
        transform: normalisation and augmentation.
    """

    dataset: Any
    folder: str
    files: tuple[str, ...]
    channels: int
    side: int
    classes: int
    transform: InputTransform


SOURCES: dict[str, Source] = {
    "mnist": Source(
        datasets.MNIST, "MNIST/raw", _IDX, 1, 28, 10, InputTransform((0.1307,), (0.3081,), pad=2)
    ),
    "fashion-mnist": Source(
        datasets.FashionMNIST,
        "FashionMNIST/raw",
        _IDX,
        1,
        28,
        10,
        InputTransform((0.2860,), (0.3530,), pad=2, flip=True),
    ),
    "cifar10": Source(
        datasets.CIFAR10,
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        3,
        32,
        10,
        InputTransform((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True),
    ),
    "cifar100": Source(
        datasets.CIFAR100,
        "cifar-100-python",
        ("train", "test", "meta"),
        3,
        32,
        100,
        InputTransform((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), pad=4, flip=True),
    ),
}


def load_images(name: str, root: Path, *, download: bool, seed: int, share: float = 1.0) -> Task:
    """Load a task of `SOURCES`; its test split is the official test part.

    Args:
        name: key of `SOURCES`.
        root: data root with torchvision's folders.
        download: whether to download missing files.
        seed: division of the training part.
        share: part of the data to keep, 0 to 1: the same samples for every seed, classes in proportion.

    Raises:
        DataError: files are missing or damaged, or a download failed.
    """
    source = SOURCES[name]
    missing = [file for file in source.files if not (root / source.folder / file).is_file()]
    if missing and not download:
        raise DataError(_missing_files_message(name, source, root, missing), field="data")
    x, y = _read(name, source, root, train=True, download=bool(missing))
    test = _read(name, source, root, train=False, download=False)
    _require_own_files(name, root / source.folder, source.files)
    if share < 1:
        name, (x, y), test = f"{name}@{share:g}", _part(name, x, y, share), _part(name, *test, share)
    splits = tensor_splits(x, y, split_training_rows(y, seed), source.transform, test)
    return Task(name, ImageSpec(source.channels, source.side, source.side, source.classes), splits)


def _part(name: str, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    rows = share_of_rows(name, y, share)
    return x[rows].contiguous(), y[rows]


def _require_own_files(name: str, folder: Path, files: tuple[str, ...]) -> None:
    """Raise `DataError` if an official file of another data set, or of another part, has a file's name."""
    for file in files:
        digest = hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
        official_name, official_file = OFFICIAL_FILES.get(digest, (name, file))
        if (official_name, official_file) != (name, file):
            raise DataError(
                f"{folder / file} is {official_file} of {official_name}. Put the files of {name} there.",
                field="data",
            )


def _missing_files_message(name: str, source: Source, root: Path, missing: list[str]) -> str:
    return (
        f"{name} is incomplete: {', '.join(missing)} missing in {root / source.folder} (unpacked). "
        "Add --download to fetch it, put the files there, or give another folder with --data."
    )


def _read(name: str, source: Source, root: Path, *, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    try:
        data = source.dataset(str(root), train=train, download=download)
        x, y = torch.as_tensor(np.asarray(data.data)), torch.as_tensor(np.asarray(data.targets))
    except _DAMAGED as error:
        if name == "cifar100" and not download:
            x, y = _read_unofficial(root / source.folder / ("train" if train else "test"))
        elif download:
            raise DataError(
                f"{name} could not be downloaded to {root} ({type(error).__name__}). Check the network, or "
                f"put {', '.join(source.files)} into {root / source.folder}.",
                field="data",
            ) from None
        else:
            raise DataError(
                f"The files of {name} in {root / source.folder} are damaged ({str(error)[:120]}). Remove "
                "them and add --download, or put complete files there.",
                field="data",
            ) from None
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    y = y.long()
    _check_samples(name, source, root, x, y)
    return x.contiguous(), y


def _check_samples(name: str, source: Source, root: Path, x: Tensor, y: Tensor) -> None:
    shape = (source.channels, source.side, source.side)
    if x.dtype != torch.uint8 or tuple(x.shape[1:]) != shape or len(x) != len(y) or not len(y):
        raise DataError(
            f"The images of {name} in {root} are not {shape}. Put complete files there.", field="data"
        )
    if int(y.min()) < 0 or int(y.max()) >= source.classes:
        raise DataError(
            f"The labels of {name} in {root} are out of range. Put complete files there.", field="data"
        )


class _ArraysOnly(pickle.Unpickler):
    """Unpickler of numpy arrays and plain containers only, so that a data file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer"}
        if module.split(".")[0] == "numpy" and name in allowed:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")


def _read_unofficial(path: Path) -> tuple[Tensor, Tensor]:
    """Read CIFAR-100 in its layout without the official MD5 sum, such as a copy in another order."""
    try:
        entry = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        x = np.asarray(entry["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        y = np.asarray(entry["fine_labels"], dtype=np.int64)
    except Exception as error:
        raise DataError(
            f"{path} is damaged ({str(error)[:120]}). Remove it and add --download, or put a complete file "
            "there.",
            field="data",
        ) from None
    warnings.warn(
        f"{path} is not the official CIFAR-100 file (its MD5 differs). Mention this with every result.",
        stacklevel=2,
    )
    return torch.from_numpy(x.copy()), torch.from_numpy(y)
