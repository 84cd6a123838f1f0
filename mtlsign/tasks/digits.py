"""The 1,797 handwritten digits of scikit-learn, scaled up: a task that needs no download."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from mtlsign.models.input_spec import ImageSpec
from mtlsign.tasks.base import Task
from mtlsign.tasks.splitting import seeded_generator, split_training_rows, stratified_permutation
from mtlsign.tasks.tensor_split import InputTransform, tensor_splits

SIDE = 32
TEST = 0.20
TRANSFORM = InputTransform((0.3053,), (0.3290,), pad=2)


def load_digits(*, seed: int) -> Task:
    """Load 10 classes of 1 x 32 x 32 pixels, scaled up bilinearly from 8 x 8.

    Test is a stratified fifth, the same for every seed. `seed` divides the rest as in the other tasks.
    """
    from sklearn.datasets import load_digits as read

    raw, labels = read(return_X_y=True)
    images = torch.from_numpy(np.asarray(raw, dtype=np.float32).reshape(-1, 1, 8, 8) / 16)
    x = (F.interpolate(images, size=(SIDE, SIDE), mode="bilinear") * 255).round().to(torch.uint8)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    order = stratified_permutation(y, seeded_generator("mtlsign/digits/test"))
    count = round(TEST * len(y))
    test, rest = order[:count], order[count:]
    x_rest, y_rest = x[rest], y[rest]
    rows = split_training_rows(y_rest, seed)
    splits = tensor_splits(x_rest, y_rest, rows, TRANSFORM, (x[test], y[test]))
    return Task("digits", ImageSpec(1, SIDE, SIDE, 10), splits)
