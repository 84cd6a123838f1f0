"""Settings of `mtlsign reproduce`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from mtlsign.config import renamed
from mtlsign.config.base import Settings, Texts
from mtlsign.config.embed import MAX_WIDTH
from mtlsign.config.mixins import RESUMABLE, RunPlacement, RunStorage, TaskData

Study = Literal[
    "ablation",
    "overwriting",
    "random_keys",
    "attacks",
    "perturbation_ablation",
    "schemes",
    "fig6",
    "false_claims",
    "table1",
    "property_inference",
    "new_label",
]

#: Studies of a figure or table of the paper for its own scheme.
PAPER_STUDIES = ("ablation", "overwriting")
#: Studies of schemes of other authors.
SCHEME_STUDIES = ("schemes", "fig6", "table1", "false_claims", "property_inference", "new_label")
#: Studies that run in this process, without Ray.
LOCAL_STUDIES = ("random_keys", *SCHEME_STUDIES)


class ReproduceSettings(RunStorage, RunPlacement, TaskData, Settings):
    """Settings of a study of the paper, repeated with several seeds."""

    renamed: ClassVar[Mapping[str, str]] = renamed.REPRODUCE
    common: ClassVar[tuple[str, ...]] = (
        "study",
        "task",
        "data",
        "width",
        "heads",
        "seeds",
        "set",
        "workers",
        "storage",
        "resume",
    )
    resumable: ClassVar[frozenset[str]] = Settings.resumable | RESUMABLE

    # fmt: off
    study: Study = Field(description="ablation (Fig. 5), overwriting (Table 3), random_keys (section 4.1), attacks (the whole table), perturbation_ablation (effect of each kind of perturbation), schemes (schemes of other authors and attacks), fig6 (Fig. 6), table1 (Table 1: the requirements that each scheme meets), false_claims (claims on unmarked networks), property_inference (are marked weights detectable without the key), new_label (curves and table of Zhong et al. 2020)")
    task: str = Field("fashion-mnist", min_length=1, max_length=1000, description="primary task, or several separated by commas; all: the data sets of the paper, all@0.1 a tenth of each")
    model: str | None = Field(None, min_length=1, max_length=200, description="model [resnet18, texts bilstm]")
    width: int | None = Field(16, ge=4, le=MAX_WIDTH, description="channels of the first stage; 64 is full size")
    heads: str = Field("free,keyed", pattern=r"^(free|keyed|spread|paper|free,keyed|keyed,free|paper,spread|spread,paper)$", description="heads to study: free, keyed, spread, free and keyed; ablation, overwriting: also paper (the preset of this name), or paper and spread")
    seeds: int = Field(3, ge=1, le=1000, description="repetitions, each with its own W0, key and attackers; property_inference: networks of each group")
    epochs: str = Field("50/150/250/350", pattern=r"^\d{1,4}(/\d{1,4}){0,9}$", description="overwriting: epochs")
    units: Literal["channels", "weights"] = Field("channels", description="ablation: units that NP and FP prune; the paper names neurons")
    keys: int = Field(5000, ge=10, le=1_000_000, description="random_keys: number of keys")
    attacks: str | None = Field(None, min_length=1, max_length=20_000, description="attacks, perturbation_ablation, overwriting, schemes, fig6, table1, new_label: attacks on every embedding, as for jobs/attack.py [those of the study]")
    schemes: str = Field("all", min_length=1, max_length=1000, description="schemes, fig6, table1, false_claims, property_inference: all, or names separated by commas")
    embed_steps: int | None = Field(None, ge=1, le=1_000_000, description="schemes, fig6, table1, property_inference, new_label: optimiser steps of every embedding [those of each scheme; property_inference 200]")
    embed_batch: int = Field(128, ge=2, le=65_536, description="schemes, fig6, table1, property_inference, new_label: primary samples in a step of the embedding")
    overrides: Texts = Field((), alias="set", max_length=200, description="further setting of every embedding, in studies of schemes of the training before it, NAME=VALUE such as phase1.epochs=6; repeat the flag")
    # resources
    workers: int | None = Field(None, ge=0, le=4096, description="concurrent embeddings [as many as the resources allow]; 0: this process alone, without Ray")
    cpus_per_worker: int = Field(1, ge=1, le=1024, description="CPUs of each embedding")
    # fmt: on

    @field_validator("study", mode="before")
    @classmethod
    def _current_name(cls, value: Any) -> Any:
        """Refuse the old name of a study with its new name."""
        if value in renamed.STUDIES:
            raise ValueError(f"{value!r} was renamed: use {renamed.STUDIES[value]!r}")
        return value
