"""Trained read-outs of RIGA and DICTION: small networks that are part of the key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.tasks.splitting import seeded_generator


def seeded_network(domain: str, seed: int, build: Callable[[], nn.Sequential]) -> nn.Sequential:
    """Build a network whose initial weights follow from a seed; torch's own generator is unchanged.

    Args:
        domain: label of the use.
        seed: seed.
        build: makes the network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(domain, seed).initial_seed())
        return build()


def fit_to_bits(network: nn.Module, values: Tensor, bits: Tensor, *, steps: int = 100) -> int:
    """Train a read-out until it reads the bits from a stolen model's values, which makes a false claim.

    Args:
        network: trained in place.
        values: what it reads, [values].
        bits: [n] of 0 and 1.
        steps: steps at most.

    Returns:
        The number of steps.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(steps):
        scores = network(values)
        if bool(((scores > 0) == (bits > 0)).all()):
            return step
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(scores, bits).backward()
        optimizer.step()
    return steps
