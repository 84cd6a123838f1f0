"""Free changes of transformers: inside heads, their order, gains of norms, and the basis of the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.equal_function import preserved_outcome
from mtlsign.attacks.named_stream import insert_named_block, turn_named_stream
from mtlsign.attacks.recurrent_symmetries import random_invertible_matrix
from mtlsign.attacks.residual_blocks import insert_residual_blocks
from mtlsign.attacks.training import trainable_copy
from mtlsign.models.attention_layers import AttentionLayer, MatrixRows
from mtlsign.models.loading import cpu_state
from mtlsign.models.residual_stream import ResidualStream, residual_stream
from mtlsign.models.taps import last_layer
from mtlsign.models.transformer import Transformer
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.verification.alignment.joint_matrices import PartOrder, is_joint

#: Parameter of windowed attention in timm and torchvision: relative positions [..., heads].
_POSITION_TABLE = "relative_position_bias_table"


def attention_symmetries(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Mix the numbers inside every head by random invertible matrices, and put heads into another order.

    Queries and keys with rotary positions are turned and scaled in pairs.

    Raises:
        NotApplicableError: the network has no attention layers, or its function changes.
    """
    stream = _stream(model, task, resources, seed)
    attacked = trainable_copy(model)
    parameters: dict[str, Tensor] = dict(attacked.named_parameters())
    generator = seeded_generator("mtlsign/attack/attention", seed)
    with torch.no_grad():
        for layer in stream.attentions:
            is_rotary = getattr(attacked.get_submodule(layer.module), "rotary_base", None) is not None
            _change_heads(layer, parameters, generator, is_rotary=is_rotary)
    return preserved_outcome(model, attacked, task, resources, seed)


def rotate_stream(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Move the gains of norms into the matrices after them, and turn the residual stream.

    With norms before the sub-layers the stream is multiplied with a random orthogonal matrix, which keeps the
    mean of each vector if the norms subtract it (Ashkboos et al. 2024). Otherwise its numbers are permuted.
    A matrix of outputs that was tied to the token vectors becomes one by itself.

    Raises:
        NotApplicableError: the network has no attention layers, its matrices have no biases that could take
            those of the norms, or its function changes.
    """
    attacked = trainable_copy(model)
    generator = seeded_generator("mtlsign/attack/stream", seed)
    if isinstance(attacked, Transformer):
        attacked.untie_outputs()
    if isinstance(attacked, Transformer) and attacked.shape.order == "post":
        with torch.no_grad():
            order = torch.randperm(attacked.shape.embedding, generator=generator)
            _turn(attacked, torch.eye(attacked.shape.embedding)[order])
    else:
        turn_named_stream(attacked, _stream(attacked, task, resources, seed), generator)
    return preserved_outcome(model, attacked, task, resources, seed)


def _stream(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> ResidualStream:
    sample = attacker_sample(attacker_view(model, task, resources, seed), 2)
    stream = residual_stream(model, (last_layer(model, sample),), sample)
    if stream is None:
        raise NotApplicableError("The network has no attention layers.", field="model")
    return stream


def _change_heads(
    layer: AttentionLayer, parameters: dict[str, Tensor], generator: Generator, *, is_rotary: bool
) -> None:
    """Change the heads of one layer: first inside them, then their order."""
    output = parameters[layer.output]
    size = output.shape[1] // layer.heads
    shared = layer.heads // layer.kv_heads
    for group in range(layer.kv_heads):
        inner = _scaled_rotation(size, generator) if is_rotary else random_invertible_matrix(size, generator)
        values = random_invertible_matrix(size, generator)
        heads = range(group * shared, (group + 1) * shared)
        for part in _parts(layer.key, parameters):
            _multiply(part[group * size : (group + 1) * size], torch.linalg.inv(inner).T)
        for part in _parts(layer.value, parameters):
            _multiply(part[group * size : (group + 1) * size], values)
        for head in heads:
            for part in _parts(layer.query, parameters):
                _multiply(part[head * size : (head + 1) * size], inner)
            columns = output[:, head * size : (head + 1) * size]
            columns.copy_(columns.double() @ torch.linalg.inv(values))
    _permute_heads(layer, parameters, generator, size)


def _permute_heads(
    layer: AttentionLayer, parameters: dict[str, Tensor], generator: Generator, size: int
) -> None:
    shared = layer.heads // layer.kv_heads
    groups = torch.randperm(layer.kv_heads, generator=generator)
    heads = torch.cat([g * shared + torch.randperm(shared, generator=generator) for g in groups])
    for rows, order in ((layer.query, heads), (layer.key, groups), (layer.value, groups)):
        for part in _parts(rows, parameters):
            part.copy_(part.unflatten(0, (-1, size))[order].flatten(0, 1))
    output = parameters[layer.output]
    output.copy_(output.unflatten(1, (-1, size))[:, heads].flatten(1))
    table = parameters.get(f"{layer.module}.{_POSITION_TABLE}")
    if table is not None and table.shape[-1] == layer.heads:
        table.copy_(table[..., heads])


def _parts(rows: MatrixRows, parameters: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield the rows of a matrix and of its bias, as views."""
    yield parameters[rows.weight][rows.start : rows.stop]
    bias = parameters.get(rows.weight.removesuffix("weight") + "bias")
    if bias is not None:
        yield bias[rows.start : rows.stop]


def _multiply(rows: Tensor, matrix: Tensor) -> None:
    """Multiply rows from the left, in place."""
    rows.copy_(matrix @ rows.double())


def _scaled_rotation(size: int, generator: Generator) -> Tensor:
    """Return a matrix that commutes with rotary positions: a scaled rotation of each pair of numbers."""
    half = size // 2
    angles = torch.rand(half, generator=generator, dtype=torch.float64) * 2 * torch.pi
    scales = 2 ** (torch.rand(half, generator=generator, dtype=torch.float64) - 0.5)
    cos, sin = torch.diag(scales * angles.cos()), torch.diag(scales * angles.sin())
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


def _turn(model: Transformer, matrix: Tensor) -> None:
    """Multiply the vectors of a stream with norms after the sub-layers: x becomes matrix @ x, in place."""
    matrix = matrix.to(model.embedding.weight.device, torch.float64)

    def read(weight: Tensor) -> None:
        weight.copy_(weight.double() @ matrix.T)

    def write(layer: nn.Linear) -> None:
        layer.weight.copy_(matrix @ layer.weight.double())
        if layer.bias is not None:
            layer.bias.copy_(matrix @ layer.bias.double())

    read(model.embedding.weight)
    if model.positions is not None:
        read(model.positions.weight)
    for block in model.block_list():
        for layer in (block.attention.query, block.attention.key, block.attention.value, block.mlp.up):
            read(layer.weight)
        if block.mlp.gate is not None:
            read(block.mlp.gate.weight)
        write(block.attention.output)
        write(block.mlp.down)
    if model.fc is not None:
        read(model.fc.weight)
    block_norms = (n for b in model.block_list() for n in (b.attention_norm, b.mlp_norm))
    for norm in (model.embedding_norm, *block_norms):
        for vector in norm.parameters():
            vector.copy_(matrix @ vector.double())


def reorder_joint_matrices(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    layout: Literal["thirds", "heads"] = "thirds",
) -> AttackOutcome:
    """Save joint matrices of attention layers with another order of queries, keys and values.

    `thirds` stores all values, then all queries and all keys; `heads` the key, value and query of each head.
    The user of the model brings them back.

    Raises:
        NotApplicableError: the network has no attention layers, or none with a joint matrix.
    """
    order = PartOrder((1, 2, 0), by_head=False) if layout == "thirds" else PartOrder((2, 0, 1), by_head=True)
    layers = [layer for layer in _stream(model, task, resources, seed).attentions if is_joint(layer)]
    if not layers:
        raise NotApplicableError(
            "The network has no joint matrix of queries, keys and values.", field="model"
        )
    tensors = cpu_state(model)
    for layer in layers:
        size = tensors[layer.output].shape[1] // layer.heads
        bias = f"{layer.query.weight.removesuffix('weight')}bias"
        for name in (layer.query.weight, bias):
            if name in tensors:
                tensors[name] = order.stored(tensors[name], size)
    return AttackOutcome(trainable_copy(model), tensors=tensors)


def dummy_block(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    place: Annotated[int, Field(ge=0, le=128)] = 0,
) -> AttackOutcome:
    """Insert a block of random weights whose output matrices are zero. Later blocks get other numbers.

    A residual network of convolutions gets one in every stage, before the first block that keeps the shape of
    its inputs; `place` has no effect there.

    Args:
        model: the marked model.
        task: the primary task.
        resources: resources of the attacker.
        seed: seed of the weights.
        place: number of the new block; at most the number of blocks.

    Raises:
        NotApplicableError: the network has no list of residual blocks, or its function changes, as with norms
            after the sub-layers.
    """
    attacked = trainable_copy(model)
    generator = seeded_generator("mtlsign/attack/block", seed)
    sample = attacker_sample(attacker_view(model, task, resources, seed), 2)
    stream = residual_stream(model, (last_layer(model, sample),), sample)
    if stream is None:
        insert_residual_blocks(attacked.eval(), sample, generator)
    else:
        insert_named_block(attacked, stream, generator, place)
    return preserved_outcome(model, attacked, task, resources, seed)
