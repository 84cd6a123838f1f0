"""Entries of the registry for networks of texts and transformers."""

from __future__ import annotations

from mtlsign.attacks import attention_symmetries, recurrent_symmetries
from mtlsign.attacks.base import Attack

TEXT_ATTACKS = (
    Attack(
        "recurrent_symmetries",
        recurrent_symmetries.recurrent_symmetries,
        "word vectors in other coordinates, units permuted and negated",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "permute_vocabulary",
        recurrent_symmetries.permute_vocabulary,
        "words and tokens renumbered",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "attention_symmetries",
        attention_symmetries.attention_symmetries,
        "numbers inside attention heads mixed, heads permuted",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "rotate_stream",
        attention_symmetries.rotate_stream,
        "gains of norms moved, residual stream of a transformer turned",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "reorder_joint_matrices",
        attention_symmetries.reorder_joint_matrices,
        "queries, keys and values of joint matrices saved in another order",
        "function_preserving",
        variants=("layout=thirds/heads",),
        fast=("",),
    ),
    Attack(
        "dummy_block",
        attention_symmetries.dummy_block,
        "a block without effect inserted into a transformer, or into every stage of a residual network",
        "function_preserving",
        fast=("",),
    ),
)
