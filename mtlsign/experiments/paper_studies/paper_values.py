"""Values that the paper prints, to stand next to measured ones.

Source: Li et al. (2022), Table 3. Fig. 5 is a drawing without numbers, so the ablation has no such values.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Data set -> overwriting epochs -> decrease of the accuracy of f_WM in points (Table 3).
TABLE_3: Mapping[str, Mapping[int, float]] = {
    "MNIST": {50: 1.0, 150: 1.5, 250: 1.5, 350: 2.0},
    "Fashion-MNIST": {50: 2.0, 150: 2.5, 250: 2.5, 350: 2.5},
    "CIFAR-10": {50: 4.5, 150: 4.5, 250: 4.5, 350: 4.5},
    "CIFAR-100": {50: 0.0, 150: 0.5, 250: 0.9, 350: 0.9},
    "VirusShare": {50: 0.0, 150: 0.5, 250: 0.5, 350: 0.5},
    "IMDb": {50: 3.0, 150: 3.0, 250: 3.0, 350: 3.0},
    "SST": {50: 2.5, 150: 3.0, 250: 3.0, 350: 2.5},
    "PF-Pedestrian": {50: 0.5, 150: 1.0, 250: 1.0, 350: 1.0},
    "VOC": {50: 1.3, 150: 2.0, 250: 2.1, 350: 2.1},
}
#: Task -> the paper's data set. The paper's SST has five classes. `files` takes the place of VirusShare, with
#: harmless files.
DATASETS: Mapping[str, str] = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "virusshare": "VirusShare",
    "files": "VirusShare",
    "imdb": "IMDb",
    "sst2": "SST",
    "sst5": "SST",
    "pennfudan": "PF-Pedestrian",
    "voc": "VOC",
}


def table_3_row(task: str) -> tuple[str | None, Mapping[int, float]]:
    """Return the paper's data set for a task, and the points lost by number of epochs.

    Args:
        task: name of the task, which a share such as `@0.1` may follow.

    Returns:
        None and no values for a task that the paper does not have.
    """
    dataset = DATASETS.get(task.partition("@")[0])
    return (None, {}) if dataset is None else (dataset, TABLE_3[dataset])
