"""Values that the paper prints, to stand next to measured ones.

Sources: Li et al. (2022), Tables 1 and 3; Zhong et al. (2020), the table of fine-tuning. Their figures are
drawings without numbers, so that the ablation, Fig. 6 and the curves have no such values.
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
#: Judgements of Table 1 by the names of `mtlsign.schemes`.
TABLE_1: Mapping[str, Mapping[str, bool]] = {
    scheme: dict(zip(("unambiguity", "functionality", "robustness", "flexibility"), ticks, strict=True))
    for scheme, ticks in {
        "uchida": (False, True, False, True),
        "deepsigns": (True, True, True, False),
        "li2019": (True, True, True, False),
        "zhu2020": (True, True, True, False),
        "reversible": (True, True, False, False),
        "frontier_stitching": (False, True, True, True),
        "ipr_gan": (False, True, True, False),
        "passports": (True, True, True, False),
        "greedy_residuals": (False, True, True, False),
        "mtlsign_paper": (True, True, True, True),
    }.items()
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


#: Data set -> label -> (normal, key) before and after fine-tuning, in per cent (Zhong et al. 2020).
NEW_LABEL: Mapping[str, Mapping[str, tuple[tuple[float, float], tuple[float, float]]]] = {
    "mnist": {"new": ((97.94, 99.89), (99.09, 99.92)), "old": ((97.88, 99.61), (99.07, 99.88))},
    "cifar10": {"new": ((87.46, 99.78), (91.92, 99.09)), "old": ((86.62, 99.95), (92.36, 68.28))},
    "cifar100": {"new": ((59.32, 100.0), (77.14, 98.08)), "old": ((59.09, 100.0), (77.80, 87.04))},
}


def new_label_values(task: str, label: str) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Return the accuracies that Zhong et al. print for a task.

    Args:
        task: name of the task, which a share such as `@0.1` may follow.
        label: "new" or "old".

    Returns:
        (normal, key) before and after fine-tuning, in per cent; None for a task that they do not have.
    """
    values = NEW_LABEL.get(task.partition("@")[0])
    return (None, None) if values is None else values[label]
