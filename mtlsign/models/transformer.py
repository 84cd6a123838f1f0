"""Transformer networks of texts: one module for encoders and decoders of the common kinds.

Its matrices have plain names, so that the weights of other libraries can be renamed to them
(`families/transformer.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

NORM_EPS = ("1e-12", "1e-8", "1e-6", "1e-5")
#: Standard deviation of new position vectors; those of GloVe have about 0.4.
_POSITION_SD = 0.1


@dataclass(frozen=True)
class TransformerShape:
    """Sizes and kinds of a transformer's parts.

    Attributes:
        vocabulary: number of token ids; 0 is padding after the last token.
        embedding: numbers of the residual stream.
        heads: attention heads.
        kv_heads: heads of keys and values; several query heads share one.
        head_size: numbers of one head.
        inner: neurons of an MLP.
        layers: blocks.
        length: tokens of the longest sequence.
        classes: outputs of the network.
        norm: "layer" or "rms".
        order: "pre" (norm before each sub-layer) or "post" (after the residual addition).
        activation: a key of `ACTIVATIONS`.
        gated: 1 for an MLP with a gate (SwiGLU).
        positions: "learned" or "rotary".
        rotary_base: base of the angles of rotary positions.
        causal: 1 for attention to earlier tokens only.
        bias: 1 for matrices with biases.
        pooling: "mean" over tokens, "first" or "last" token; "tokens" for outputs at every token.
        tied: 1 if the token vectors are the matrix of the outputs.
        norm_eps: added by norms to the variance, one of `NORM_EPS`.
    """

    vocabulary: int
    embedding: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    layers: int
    length: int
    classes: int
    norm: Literal["layer", "rms"] = "layer"
    order: Literal["pre", "post"] = "pre"
    activation: str = "gelu"
    gated: int = 0
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: int = 10_000
    causal: int = 0
    bias: int = 1
    pooling: Literal["mean", "first", "last", "tokens"] = "mean"
    tied: int = 0
    norm_eps: str = "1e-5"


class Attention(nn.Module):
    """Multi-head attention with separate matrices; several query heads may share keys and values."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = shape.heads, shape.kv_heads, shape.head_size
        self.causal, bias = bool(shape.causal), bool(shape.bias)
        self.rotary_base = shape.rotary_base if shape.positions == "rotary" else None
        self.query = nn.Linear(shape.embedding, shape.heads * shape.head_size, bias)
        self.key = nn.Linear(shape.embedding, shape.kv_heads * shape.head_size, bias)
        self.value = nn.Linear(shape.embedding, shape.kv_heads * shape.head_size, bias)
        self.output = nn.Linear(shape.heads * shape.head_size, shape.embedding, bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the attention's output.

        Args:
            x: float [n, L, embedding].
            mask: bool [n, L], true at tokens.
        """
        query, key, value = (
            part(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if self.rotary_base is not None:
            angles = rotary_angles(x.shape[1], self.head_size, self.rotary_base, x.device)
            query, key = rotate(query, angles), rotate(key, angles)
        shared = self.heads // self.kv_heads
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        visible = mask[:, None, None, :]
        if self.causal:
            visible = visible & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


def rotary_angles(length: int, head_size: int, base: int, device: torch.device) -> Tensor:
    """Return the angles of rotary positions, float32 [L, head_size / 2]."""
    frequencies = base ** (-torch.arange(0, head_size, 2, device=device).float() / head_size)
    return torch.arange(length, device=device).float()[:, None] * frequencies


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_size / 2) of each head by the angles of its position."""
    first, second = heads.chunk(2, -1)
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class MLP(nn.Module):
    """Two linear layers with an activation between them, or three with a gate."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        bias = bool(shape.bias)
        self.activation = ACTIVATIONS[shape.activation]
        self.gate = nn.Linear(shape.embedding, shape.inner, bias) if shape.gated else None
        self.up = nn.Linear(shape.embedding, shape.inner, bias)
        self.down = nn.Linear(shape.inner, shape.embedding, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the MLP, [n, L, embedding]."""
        if self.gate is None:
            inner = self.activation(self.up(x))
        else:
            inner = self.activation(self.gate(x)) * self.up(x)
        output: Tensor = self.down(inner)
        return output


def _norm(shape: TransformerShape) -> nn.Module:
    kind = nn.LayerNorm if shape.norm == "layer" else nn.RMSNorm
    return kind(shape.embedding, eps=float(shape.norm_eps))


class Block(nn.Module):
    """Attention and MLP, each with a norm and a residual addition."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.is_pre = shape.order == "pre"
        self.attention, self.attention_norm = Attention(shape), _norm(shape)
        self.mlp, self.mlp_norm = MLP(shape), _norm(shape)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the residual stream after the block, [n, L, embedding]."""
        if self.is_pre:
            x = x + self.attention(self.attention_norm(x), mask)
            stream: Tensor = x + self.mlp(self.mlp_norm(x))
            return stream
        x = self.attention_norm(x + self.attention(x, mask))
        stream = self.mlp_norm(x + self.mlp(x))
        return stream


class Transformer(nn.Module):
    """Token vectors, blocks, and a linear layer on pooled or on all tokens.

    The token vectors are frozen.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.embedding, padding_idx=0)
        self.embedding.weight.requires_grad_(False)
        learned = shape.positions == "learned"
        self.positions = nn.Embedding(shape.length, shape.embedding) if learned else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=_POSITION_SD)
        self.embedding_norm = _norm(shape) if shape.order == "post" else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_norm = _norm(shape) if shape.order == "pre" else nn.Identity()
        has_bias = shape.pooling != "tokens"
        self.fc = None if shape.tied else nn.Linear(shape.embedding, shape.classes, bias=has_bias)

    def block_list(self) -> list[Block]:
        """Return the blocks."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def untie_outputs(self) -> None:
        """Give the outputs a matrix with the values of the token vectors, unless they have one."""
        if self.fc is None:
            vectors = self.embedding.weight
            self.fc = nn.Linear(vectors.shape[1], vectors.shape[0], bias=False)
            self.fc.to(vectors.device).load_state_dict({"weight": vectors.detach().clone()})
            self.shape = replace(self.shape, tied=0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of token ids.

        Args:
            tokens: int64 [n, L]; 0 is padding after the last token.

        Returns:
            [n, classes], or [n, L, classes] if every token has outputs.
        """
        outputs = self.encode(tokens)
        if self.shape.pooling == "tokens":
            return self._logits(outputs)
        mask = _mask(tokens)
        if self.shape.pooling == "mean":
            pooled = (outputs * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        elif self.shape.pooling == "first":
            pooled = outputs[:, 0]
        else:
            pooled = outputs[torch.arange(len(outputs), device=outputs.device), mask.sum(1) - 1]
        return self._logits(pooled)

    def _logits(self, vectors: Tensor) -> Tensor:
        if self.fc is None:
            return F.linear(vectors, self.embedding.weight)
        logits: Tensor = self.fc(vectors)
        return logits

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the residual stream after the last block and its norm, [n, L, embedding]."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x, mask = self.embedding_norm(x), _mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        outputs: Tensor = self.final_norm(x)
        return outputs


def _mask(tokens: Tensor) -> Tensor:
    """Return where there are tokens, bool [n, L]; an empty text is one padding token."""
    mask = tokens != 0
    mask[:, 0] = True
    return mask
