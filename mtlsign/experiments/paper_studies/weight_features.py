"""Features of weights, and how well a classifier of them separates two groups of networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Quantiles of a tensor's standardised values.
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
#: Folds of the cross-validation, at most.
_FOLDS = 5
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Separation:
    """Cross-validated accuracy of a classifier over two groups of networks.

    Attributes:
        correct: networks whose group the classifier, trained on other networks, predicts.
        n: networks of both groups.
        low: lower end of the exact 95 % interval of the accuracy, 0 to 1 (Clopper and Pearson).
        high: upper end.
    """

    correct: int
    n: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return self.correct / self.n


def weight_features(tensors: Mapping[str, Tensor]) -> list[float]:
    """Return statistics of every floating-point tensor of a model, in the order of their names.

    Per tensor: the mean and the logarithm of the standard deviation, skewness and excess kurtosis, and the
    `QUANTILES` of the standardised values. Their number depends on neither shapes nor the order of channels.

    Args:
        tensors: content of a model's file.

    Returns:
        Features; counters and tensors of one value are omitted.
    """
    features: list[float] = []
    for name in sorted(tensors):
        values = tensors[name].detach().double().flatten().cpu()
        if tensors[name].is_floating_point() and len(values) > 1:
            features += _statistics(values)
    return features


def _statistics(values: Tensor) -> list[float]:
    mean, deviation = float(values.mean()), float(values.std()) + 1e-12
    standardised = (values - mean) / deviation
    moments = [float(standardised.pow(3).mean()), float(standardised.pow(4).mean()) - 3]
    quantiles = torch.quantile(standardised, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return [mean, math.log(deviation), *moments, *quantiles]


def separation(
    negatives: Sequence[Sequence[float]], positives: Sequence[Sequence[float]], *, seed: int = 0
) -> Separation:
    """Return how well logistic regression on standardised features separates two groups.

    Each network is predicted by a classifier that was trained without it, in stratified folds. The interval
    treats predictions as independent, although classifiers of different folds share training networks.

    Args:
        negatives: features of one group, at least two networks.
        positives: features of the other group, at least two networks.
        seed: seed of the folds.

    Raises:
        ValueError: a group has fewer than two networks.
    """
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    smaller = min(len(negatives), len(positives))
    if smaller < 2:
        raise ValueError("each group needs at least two networks")
    features = [*negatives, *positives]
    groups = [0] * len(negatives) + [1] * len(positives)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2_000))
    folds = StratifiedKFold(min(_FOLDS, smaller), shuffle=True, random_state=seed)
    predicted = cross_val_predict(classifier, features, groups, cv=folds)
    correct = sum(int(p) == group for p, group in zip(predicted, groups, strict=True))
    interval = binomtest(correct, len(groups)).proportion_ci(_CONFIDENCE, method="exact")
    return Separation(correct, len(groups), float(interval.low), float(interval.high))
