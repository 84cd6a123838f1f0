"""Zhong et al. 2020, "Protecting IP of Deep Neural Networks with Watermarking: A New Label Helps" (PAKDD).

Key samples are training images with a keyed perturbation. The marked model answers a further class, for
which the output layer is one wider, so that the borders between old classes stay. Verification uses newly
generated key samples. An unmarked model cannot answer the class, but a marked one may answer it to the
samples of every key, so that a claim needs a commitment.

With `label=old` the same key samples get one class of the task instead, as in Zhang et al. 2018. This is the
method that the paper compares with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.taps import last_layer
from mtlsign.schemes.trigger_marks import TriggerKey, TriggerMark, pixel_range, training_images
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


@dataclass(frozen=True)
class NewLabelKey(TriggerKey):
    """Key with samples for training besides those for verification.

    Attributes:
        training_inputs: [samples, C, H, W].
    """

    training_inputs: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(frozen=True)
class NewLabelScheme(TriggerMark[NewLabelKey]):
    """Scheme of Zhong et al.

    Attributes:
        intensity: size of the perturbation, beta of the paper, as a share of the range of pixel values. The
            paper's values (2.5e-6 and 0.001) have no stated unit, and a pattern of that share is invisible.
        training_share: key samples for training as a share of the training images, alpha of the paper.
        min_training_samples: smallest number of key samples for training. Alpha gives 60 for MNIST; with 16
            of them a small network does not answer the class to new key samples.
        label: "new" answers a further class; "old" answers a class of the key to images of other classes.
    """

    name: ClassVar[str] = "new_label"
    needs_commitment: ClassVar[bool] = True

    intensity: float = 0.2
    training_share: float = 0.001
    min_training_samples: int = 60
    label: Literal["new", "old"] = "new"

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Add an output to the last layer, unless it has one already; its weights are small.

        With an old label the layer stays.
        """
        if self.label == "old":
            return
        name = last_layer(model)
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer.out_features != task.classes:
            return
        wider = nn.Linear(layer.in_features, task.classes + 1, bias=layer.bias is not None)
        wider = wider.to(layer.weight)
        with torch.no_grad():
            wider.weight.zero_()
            wider.weight[:-1] = layer.weight
            if wider.bias is not None:
                wider.bias.fill_(-5.0)
                wider.bias[:-1] = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, wider)

    def draw_key(self, model: nn.Module, task: Task, seed: int) -> NewLabelKey:
        """Perturb training images: some to train with, and others for verification."""
        if self.label == "new":
            _require_new_output(model, task)
        generator = seeded_generator("mtlsign/new_label", seed)
        low, high = pixel_range(task)
        count = max(self.min_training_samples, round(self.training_share * task.size("train")))
        target, rate, except_class = task.classes, 1 / (task.classes + 1), None
        if self.label == "old":
            target = except_class = int(torch.randint(task.classes, (), generator=generator))
            rate = 1 / task.classes
        images, _ = training_images(task, count + self.key_size, generator, except_class=except_class)
        images, fresh = images[:count], images[count:]
        if len(fresh) < 2:
            raise ModelError("The task has too few training images for a key. Use more data.", field="task")
        signs = torch.randint(2, images[0].shape, generator=generator).float() * 2 - 1
        pattern = self.intensity * (high - low) * signs
        classes = torch.full((len(fresh),), target)
        return NewLabelKey(fresh + pattern, classes, rate, training_inputs=images + pattern)

    def training_samples(self, key: NewLabelKey, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Return key samples for training, in turn, all of one class."""
        rows = torch.arange(step * count, (step + 1) * count) % len(key.training_inputs)
        return key.training_inputs[rows], key.classes[:1].expand(len(rows))


def _require_new_output(model: nn.Module, task: Task) -> None:
    """Raise `ModelError` unless the last layer has one output more than the task has classes."""
    layer = model.get_submodule(last_layer(model))
    if not isinstance(layer, nn.Linear) or layer.out_features != task.classes + 1:
        raise ModelError(
            f"The last layer does not have {task.classes + 1} outputs. Use a classifier with a linear "
            "last layer.",
            field="model",
        )
