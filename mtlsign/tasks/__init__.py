"""Primary tasks: data, loss and metric behind one class, with splits fixed by a seed.

Names are "digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imdb", "sst2", "sst5", "virusshare",
"files", "lm", "camvid", "pennfudan", "voc", "gan-digits" and others of `generation`, and
`package.module:factory`.
`"fashion-mnist@0.2"` is a fifth of both official parts, for studies on small machines.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mtlsign.config.embed_defaults import TEXT_TASKS
from mtlsign.errors import DataError
from mtlsign.tasks.base import Split, Task
from mtlsign.tasks.batch import Batch
from mtlsign.tasks.byte_images import NAMES as BYTE_IMAGE_NAMES
from mtlsign.tasks.byte_images import load_byte_images
from mtlsign.tasks.digits import load_digits
from mtlsign.tasks.generation import NAMES as GENERATION_NAMES
from mtlsign.tasks.generation import load_generation
from mtlsign.tasks.metrics import MeanMetric, Metric
from mtlsign.tasks.segmentation import NAMES as SEGMENTATION_NAMES
from mtlsign.tasks.segmentation import load_segmentation
from mtlsign.tasks.splitting import SPLITS
from mtlsign.tasks.tensor_split import InputTransform
from mtlsign.tasks.text import NAMES as TEXT_NAMES
from mtlsign.tasks.text import load_text
from mtlsign.tasks.text.language_model import NAME as LANGUAGE_MODEL
from mtlsign.tasks.text.language_model import load_language_model
from mtlsign.tasks.torchvision_datasets import SOURCES, load_images
from mtlsign.tasks.user_task import from_loaders, from_tensors, load_user_task

#: Name of a task that a caller makes of tensors or loaders. `load_task` cannot load it.
CUSTOM, _RENAMED_CUSTOM = "custom", "own"
NAMES = (
    *("digits", *SOURCES, *TEXT_NAMES, *BYTE_IMAGE_NAMES, LANGUAGE_MODEL, *SEGMENTATION_NAMES),
    *GENERATION_NAMES,
)

__all__ = [
    "NAMES",
    "SPLITS",
    "Batch",
    "InputTransform",
    "MeanMetric",
    "Metric",
    "Split",
    "Task",
    "check_task_name",
    "data_root",
    "from_loaders",
    "from_tensors",
    "load_task",
]


def data_root(data: str | Path | None = None) -> Path:
    """Return the folder of data sets: `data`, or mtlsign/data in the user's cache folder."""
    if data is not None:
        return Path(data).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mtlsign" / "data"


def load_task(
    name: str,
    *,
    data: str | Path | None = None,
    download: bool = False,
    tokenizer: Path | None = None,
    seed: int = 0,
    options: Mapping[str, object] | None = None,
) -> Task:
    """Load a task by name.

    Args:
        name: see the module's docstring.
        data: folder of data sets.
        download: whether to download missing files; only those of torchvision's data sets are downloaded.
        tokenizer: tokenizer.json of a pretrained model, for text tasks; None for the words of GloVe.
        seed: division of the training part.
        options: further keyword arguments of a user's factory.

    Raises:
        DataError: unknown name, or missing or damaged data.
        ModelError: the factory cannot be imported.
    """
    if tokenizer is not None and name.partition("@")[0] not in TEXT_TASKS:
        raise DataError(
            f"The task {name[:80]!r} has no texts for a tokenizer. Use one of {', '.join(TEXT_TASKS)}.",
            field="tokenizer",
        )
    if name == "digits":
        return load_digits(seed=seed)
    base, at, text = name.partition("@")
    if base in GENERATION_NAMES:
        return load_generation(name, partial(load_task, data=data, download=download, seed=seed))
    if base in NAMES and base != "digits":
        root, share = data_root(data), _share(name, text) if at else 1.0
        if base == LANGUAGE_MODEL:
            return load_language_model(root, seed=seed, share=share, tokenizer=tokenizer)
        if base in TEXT_NAMES:
            return load_text(base, root, seed=seed, share=share, tokenizer=tokenizer)
        if base in BYTE_IMAGE_NAMES:
            return load_byte_images(base, root, seed=seed, share=share)
        if base in SEGMENTATION_NAMES:
            return load_segmentation(base, root, seed=seed, share=share)
        return load_images(base, root, download=download, seed=seed, share=share)
    if ":" in name:
        return load_user_task(
            name, seed=seed, options={"data": data, "download": download, **(options or {})}
        )
    if name == CUSTOM:
        raise DataError("The task is that of a caller's own data. Use package.module:factory.", field="task")
    if name == _RENAMED_CUSTOM:
        raise DataError(f"The task {name!r} was renamed. Use {CUSTOM!r}.", field="task")
    raise _unknown_task(name)


def check_task_name(name: str) -> None:
    """Raise `DataError` with the field `task` for an unknown name or an invalid share; read no data."""
    base, at, text = name.partition("@")
    if base in NAMES and base != "digits":
        if at:
            _share(name, text)
    elif name != "digits" and ":" not in name:
        raise _unknown_task(name)


def _unknown_task(name: str) -> DataError:
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}?" if near else f"Use {', '.join(NAMES)} or package.module:factory."
    return DataError(f"Unknown task {name[:80]!r}. {hint}", field="task")


def _share(name: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.001 <= share <= 1:
        raise DataError(
            f"{name[:80]!r} has no valid share of the data. Write NAME@SHARE with a share from 0.001 to 1.",
            field="task",
        )
    return share
