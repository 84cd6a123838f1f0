from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.models.channel_groups import batch_norm_of_conv
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.verification.sketches import projection_matrix, random_projection
from tests.unit.attacks.helpers import changed_parameters, network, run


def test_unsketched_kernels_have_the_sketch_of_w0(
    marked_model: Any, marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    base = marked_model[0]
    attacked = run("unsketch", marked_module, tiny_task, key=key).model
    norms = batch_norm_of_conv(attacked, torch.zeros(1, 1, 24, 24))
    layers = key.detector.aligner.layers
    assert changed_parameters(marked_module, attacked) == set(layers)
    for name, layer in layers.items():
        before, after = (
            m.get_parameter(name).detach().double().flatten(1) for m in (marked_module, attacked)
        )
        gamma = attacked.get_parameter(f"{norms[name.removesuffix('.weight')]}.weight").detach()
        sign = torch.where(gamma < 0, -1.0, 1.0).double()[:, None]
        unit = sign * after / before.norm(dim=1, keepdim=True)
        matrix = torch.tensor(projection_matrix(unit.shape[1], layer.sketch.shape[1]))
        torch.testing.assert_close(unit @ matrix, torch.from_numpy(layer.sketch), rtol=0, atol=1e-5)
        # Directions that the sketch does not see are those of the marked model.
        hidden = torch.eye(unit.shape[1], dtype=torch.float64) - matrix @ torch.linalg.pinv(matrix)
        torch.testing.assert_close(after @ hidden, before @ hidden, rtol=0, atol=1e-5)
        w0 = base[name] * sign.float().reshape(-1, 1, 1, 1)
        assert float((random_projection(w0).double() - torch.from_numpy(layer.sketch)).abs().max()) < 1e-6


def test_unsketch_without_reference_or_with_other_kernels_is_not_applicable(
    marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    with pytest.raises(NotApplicableError, match="opened reference"):
        run("unsketch", marked_module, tiny_task)
    for text in ("dummy_channels+unsketch",):
        with pytest.raises(NotApplicableError, match="do not fit the reference"):
            run(text, marked_module, tiny_task, key=key)
    with pytest.raises(NotApplicableError, match="do not fit the reference"):
        run("unsketch", network("plain"), tiny_task, key=key)
