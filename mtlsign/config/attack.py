"""Settings of `mtlsign attack`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mtlsign.config import renamed
from mtlsign.config.base import Settings, Texts, named_values
from mtlsign.config.embed import MAX_WIDTH
from mtlsign.config.mixins import (
    KIT_PASSPHRASE_FILE,
    MIN_EVIDENCE_BITS,
    POLICY_BITS,
    RESOURCE_TIMEOUT_S,
    RESUMABLE,
    TRUSTED_FACTORY,
    RunPlacement,
    RunStorage,
    TaskData,
)
from mtlsign.errors import SettingsError

#: Settings of the unmarked network's training that `--set` gives.
_TRAINING = (
    "stem", "amp", "phase1.epochs", "phase1.batch", "phase1.optimizer", "phase1.lr", "phase1.weight_decay",
    "phase1.initial_weights",
)  # fmt: skip


class AttackSettings(RunStorage, RunPlacement, TaskData, Settings):
    """Settings of an attack run. `min_evidence_bits` is the policy of the verifier.

    With `scheme`, the run trains and marks its own target, and the key is derived from `seed`.
    """

    renamed: ClassVar[Mapping[str, str]] = renamed.ATTACK
    common: ClassVar[tuple[str, ...]] = (
        "model",
        "kit",
        "scheme",
        "attacks",
        "task",
        "data",
        "extra_data_fraction",
        "workers",
        "storage",
        "resume",
        "seed",
    )
    resumable: ClassVar[frozenset[str]] = (
        Settings.resumable | RESUMABLE | {"kit_passphrase_file", "keep_models"}
    )

    # fmt: off
    model: str | None = Field(None, min_length=1, max_length=4096, description="marked model: folder or .safetensors file, local or s3://")
    kit: str | None = Field(None, min_length=1, max_length=4096, description="owner kit folder")
    kit_passphrase_file: Path | None = Field(None, description=KIT_PASSPHRASE_FILE)
    attacks: str = Field("fast", min_length=1, max_length=20_000, description="list (prints them), all, fast, standard, or names with parameters: ftal:lr=quarter/full,epochs=3,prune:ratio=0.5+ftal")
    pairs: int = Field(0, ge=0, le=500, description="then also run so many pairs of these attacks, those first that should leave the fewest bits for an accepted loss of accuracy")
    task: str | None = Field(None, min_length=1, max_length=200, description="primary task [that of the model]; required where it is code, package.module:factory")
    split_seed: int | None = Field(None, ge=0, lt=2**31, description="seed of the data splits of the embedding [that of the kit, else 0]")
    extra_data_fraction: float = Field(0.0, ge=0, le=1, description="fraction of the owner's training split that attackers have in addition to their tenth")
    lr: float | None = Field(None, gt=0, le=100, description="peak learning rate of the model's training [that of the kit, else by task and width]")
    other_marked_models: Texts = Field((), max_length=100, description="average_models: other models marked from the same W0; repeat the flag")
    public_base: str | None = Field(None, min_length=1, max_length=4096, description="subtract_public_base, merge_models: public model from which the marked one was fine-tuned (Hugging Face folder, GGUF or checkpoint)")
    transfer_task: str | None = Field(None, min_length=1, max_length=200, description="transfer:to=task: task of the attacker's own data, such as fashion-mnist@0.1; images are scaled to the size of the model's")
    trusted_factory: str | None = Field(None, max_length=200, description=TRUSTED_FACTORY)
    min_evidence_bits: float = Field(POLICY_BITS, ge=0, le=4096, description=MIN_EVIDENCE_BITS)
    # a scheme of other authors
    scheme: str | None = Field(None, min_length=1, max_length=60, description="train an unmarked network, mark it with this scheme (such as uchida, neuralmark, adi, mtlsign) and attack it; without --model and --kit")
    scheme_options: Texts = Field((), max_length=40, description="--scheme: option of the scheme, NAME=VALUE such as key_size=128 [those of its paper]; repeat the flag")
    network: str | None = Field(None, min_length=1, max_length=200, description="--scheme: network to train, as --model of jobs/embed.py [that of the task]")
    width: int | None = Field(None, ge=4, le=MAX_WIDTH, description="--scheme: channels of the network's first stage")
    weights: str | None = Field(None, min_length=1, max_length=4096, description="--scheme: trained checkpoint of the unmarked network; skips its training")
    overrides: Texts = Field((), alias="set", max_length=40, description="--scheme: further setting of the unmarked network's training, NAME=VALUE such as stem=stock or phase1.epochs=6; repeat the flag")
    embed_steps: int | None = Field(None, ge=1, le=1_000_000, description="--scheme: optimiser steps of the embedding [those of the scheme]")
    embed_batch: int = Field(128, ge=2, le=65_536, description="--scheme: primary samples in a step of the embedding")
    # resources
    workers: int = Field(1, ge=0, le=4096, description="concurrent attacks, each a Ray task; 0: this process alone, without Ray")
    resource_timeout_s: int = Field(0, ge=0, le=86_400, description=RESOURCE_TIMEOUT_S)
    # outputs
    keep_models: bool = Field(True, description="write each attacked model to models/DIGEST of the run, as jobs/verify.py reads them")
    # fmt: on

    @property
    def training(self) -> dict[str, str]:
        """Settings of the unmarked network's training, by dotted name. Raises `SettingsError`."""
        values = named_values(self.overrides)
        for name in values:
            if name not in _TRAINING:
                raise SettingsError(
                    f"{name[:60]!r} does not belong to the training of the unmarked network. Use "
                    f"{', '.join(_TRAINING)}.",
                    field="set",
                )
        return values
