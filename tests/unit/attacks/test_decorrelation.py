from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlsign.attacks import AttackerResources, decorrelation
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import correlation_loss
from tests.unit.attacks.helpers import run


def test_decorrelate_reduces_correlation_over_unseen_codes(module: nn.Module, tiny_task: Task) -> None:
    data = attacker_view(module, tiny_task, AttackerResources(), 0)
    verifier, pool = decorrelation._verifier_model(module, data, 99, 1)  # other codes than the attack's

    def correlation(model: nn.Module) -> float:
        def features(net: nn.Module) -> Tensor:
            kernels = verifier.select_weights({n: p.detach() for n, p in net.named_parameters()})
            return verifier.features(verifier.canonicalize(kernels), pool[:256]).standardised

        with torch.no_grad():
            return float(correlation_loss(features(module), features(model)))

    done = run("decorrelate:steps=8,lr=0.003,codes=64,batch=16", module, tiny_task)
    assert correlation(module) > 0.98 and correlation(done.model) < 0.7
