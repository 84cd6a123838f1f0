"""Mixed channels that no activation separates: the linear bottlenecks of MobileNetV2 (arXiv 1801.04381)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.channel_symmetries import channels_of
from mtlsign.attacks.equal_function import attacker_images, change_where_preserved, preserved_outcome
from mtlsign.attacks.training import trainable_copy
from mtlsign.models import channel_groups
from mtlsign.models.batch_norms import batch_norm_values, is_batch_norm
from mtlsign.models.channel_sets import ChannelSet
from mtlsign.models.linear_channels import is_mixable
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

#: Deviation of the logarithms of a mix's singular values.
_SPREAD = 0.5


def mix_linear_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Multiply channels by a random invertible matrix where they are written, and by its inverse where read.

    This preserves the function where only additions stand between the batch norms that write the channels
    and the kernels that read them. The batch norms are folded and remain without effect.
    """
    images = attacker_images(model, task, resources, seed)
    sets = channels_of(model, images).sets
    batch_norms = channel_groups.batch_norm_of_conv(model, images[:1])
    generator = seeded_generator("mtlsign/attack/linear", seed)
    chosen = [index for index, channels in enumerate(sets) if is_mixable(model, channels, batch_norms)]
    if not chosen:
        raise NotApplicableError("The network has no channels between two kernels.", field="model")
    mixes = {index: _mix(sets[index].size, generator) for index in chosen}

    def change(parts: Sequence[int]) -> nn.Module:
        changed = trainable_copy(model)
        for index in parts:
            _mix_channels(changed, sets[index], mixes[index], batch_norms)
        return changed

    changed = change_where_preserved(model, change, chosen, images)
    return preserved_outcome(model, changed, task, resources, seed)


def _mix(size: int, generator: Generator) -> Tensor:
    """Return a random invertible matrix, float64 [size, size]."""
    left, right = torch.randn((2, size, size), generator=generator, dtype=torch.float64)
    scales = torch.exp(_SPREAD * torch.randn(size, generator=generator, dtype=torch.float64))
    matrix: Tensor = torch.linalg.qr(left).Q @ torch.diag(scales) @ torch.linalg.qr(right).Q
    return matrix


@torch.no_grad()
def _mix_channels(
    model: nn.Module, channels: ChannelSet, mix: Tensor, batch_norms: Mapping[str, str]
) -> None:
    """Mix the channels of one set, in place."""
    for name, rows in channels.rows.items():
        layer = name.rpartition(".")[0]
        norm = model.get_submodule(batch_norms[layer])
        assert is_batch_norm(norm)
        values = batch_norm_values(norm)
        mean, var = (getattr(norm, leaf).detach().double().cpu() for leaf in ("running_mean", "running_var"))
        factors = values.gamma.double() / (var + values.eps).sqrt()
        bias = getattr(model.get_submodule(layer), "bias", None)
        offset = (-mean if bias is None else bias.detach().double().cpu() - mean) * factors
        offset = offset + values.beta.double()
        order, kernel = torch.from_numpy(rows), channel_groups.tensors_of(model)[name]
        folded = kernel.double().cpu().flatten(1) * factors[:, None]
        mixed = torch.empty_like(folded)
        mixed[order] = mix @ folded[order]
        kernel.copy_(mixed.reshape(kernel.shape))
        shift = torch.empty_like(offset)
        shift[order] = mix @ offset[order]
        if bias is not None:
            bias.zero_()
        for leaf, numbers in (
            ("weight", torch.full_like(shift, (1 + values.eps) ** 0.5)), ("bias", shift),
            ("running_mean", torch.zeros_like(shift)), ("running_var", torch.ones_like(shift)),
        ):  # fmt: skip
            tensor = getattr(norm, leaf)
            if tensor is None:
                raise NotApplicableError("A batch norm has no offset to fold into.", field="model")
            tensor.copy_(numbers)
    inverse = torch.linalg.inv(mix)
    for name, places in channels.columns.items():
        kernel = channel_groups.tensors_of(model)[name]
        for part in range(places.shape[1]):
            columns = torch.from_numpy(places[:, part]).to(kernel.device)
            old = kernel[:, columns].double()
            new = torch.einsum("oc...,cd->od...", old, inverse.to(kernel.device))
            kernel[:, columns] = new.to(kernel.dtype)
