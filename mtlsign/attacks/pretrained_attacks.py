"""Entries of the registry for fine-tuned transformers and networks with a public base."""

from __future__ import annotations

from mtlsign.attacks import activation_pruning, adapter_tuning, layer_dropping, model_merging
from mtlsign.attacks.base import Attack

PRETRAINED_ATTACKS = (
    Attack(
        "lora_tune",
        adapter_tuning.lora_tune,
        "low-rank factors of the linear layers tuned and merged (LoRA)",
        variants=("rank=8/64",),
        fast=("epochs=1",),
    ),
    Attack(
        "prune_activations",
        activation_pruning.prune_activations,
        "weights with the smallest product of size and input norm set to 0 (Wanda)",
        variants=("ratio=0.3/0.5/0.7",),
        fast=("ratio=0.5",),
    ),
    Attack(
        "drop_layers",
        layer_dropping.drop_layers,
        "whole blocks of a transformer removed",
        variants=("last=1/2", "every=3,last=0"),
        fast=("last=1",),
    ),
    Attack(
        "merge_models",
        model_merging.merge_models,
        "weights merged with another fine-tune of the copy or of a public base (--public-base)",
        variants=("weight=0.5/1", "start=base,mode=average/arithmetic"),
        fast=("epochs=1",),
    ),
    Attack(
        "subtract_public_base",
        model_merging.subtract_public_base,
        "change from a public base scaled, pruned or reduced in rank (--public-base)",
        variants=("mode=scale/prune/low_rank,keep=0.25/0.5",),
        fast=("keep=0.5",),
    ),
)
