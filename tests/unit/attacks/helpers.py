"""Helpers of the attack tests: run one expression on a tiny model, and compare models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.attacks import AttackerResources, AttackOutcome, parse_attacks
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.equal_function import function_change
from mtlsign.tasks import Task

Maker = Callable[..., nn.Module]
TRAINING_LR = 0.02
#: Settings that mark a tiny transformer for images in seconds.
VISION_OPTIONS: dict[str, Any] = {
    "key_size": 128,
    "insecure_test_key": True,
    "phase2.steps": 60,
    "phase2.lr": 2e-3,
    "phase2.batch": 16,
}


def run(text: str, model: nn.Module, task: Task, seed: int = 0, **resources: Any) -> AttackOutcome:
    (plan,) = parse_attacks(text)
    return plan.run(model, task, AttackerResources(**{"training_lr": TRAINING_LR, **resources}), seed)


def attacker_images(model: nn.Module, task: Task) -> Tensor:
    """All images of the attacker."""
    data = attacker_view(model, task, AttackerResources(), 0)
    (batch,) = data.batches("attacker", 256, shuffle=False)
    images: Tensor = batch.inputs
    return images


def changed_parameters(model: nn.Module, other: nn.Module) -> set[str]:
    original = dict(model.named_parameters())
    return {name for name, p in other.named_parameters() if not torch.equal(p, original[name])}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


def flat_network() -> nn.Module:
    """A network without batch norms, stages and channel groups; its last layer depends on positions."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 22 * 22, 4)).eval()


class Depthwise(nn.Module):
    """A MobileNet-like network: an expanded block with a depthwise convolution, a gate and a shortcut."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 6, 3, 2, bias=False), nn.BatchNorm2d(6)
        self.expand, self.norm1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.project, self.norm3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm2(self.depthwise(self.norm1(self.expand(x)).relu())).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        logits: Tensor = self.fc((x + self.norm3(self.project(y))).mean((2, 3)))
        return logits


class Grouped(nn.Module):
    """A ResNeXt-like network: a grouped convolution between two others, and a shortcut."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 6, 3, 2, bias=False), nn.BatchNorm2d(6)
        self.reduce, self.norm1 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 12, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(12)
        self.project, self.norm3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm2(self.grouped(self.norm1(self.reduce(x)).relu())).relu()
        logits: Tensor = self.fc((x + self.norm3(self.project(y))).relu().mean((2, 3)))
        return logits


def plain_network(channels: int = 1) -> nn.Module:
    """A VGG-like network: biases, no batch norms, a pooling and a flattened map."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 10), nn.ReLU(), nn.Linear(10, 4)),
    )


NETWORKS: dict[str, Maker] = {"plain": plain_network, "depthwise": Depthwise, "grouped": Grouped}


def network(name: str, channels: int = 1) -> nn.Module:
    """One of `NETWORKS` with random statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[name](channels).eval()
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                    m.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                    m.weight.uniform_(0.5, 1.5)
                    m.bias.normal_(0, 0.3)
    return model


def difference(model: nn.Module, outcome: AttackOutcome, channels: int = 1, side: int = 24) -> float:
    """Largest change of the outputs on random images, in float64."""
    x = torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(1))
    return function_change(model, outcome.model, x, outcome.input_transforms)
