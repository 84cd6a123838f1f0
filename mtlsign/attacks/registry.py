"""Every attack by name, with the settings that `all` and `fast` run."""

from __future__ import annotations

from torch import nn

from mtlsign.attacks import (
    decorrelation,
    fine_tuning,
    head_forgery,
    layer_reinit,
    model_averaging,
    overwriting,
    pruning,
    quantisation,
    spoiling,
    symmetries,
    weight_noise,
)
from mtlsign.attacks.base import Attack, AttackerResources, AttackOutcome
from mtlsign.tasks import Task

_RATIOS = "ratio=0.1/0.2/0.3/0.4/0.5/0.6/0.7/0.8/0.9"


def _nothing(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    return AttackOutcome(model)


_ALL = (
    Attack("none", _nothing, "the model as it is: what every attack is compared with", "none", fast=("",)),
    Attack("ftll", fine_tuning.ftll, "fine-tune the last layer", fast=("epochs=1",)),
    Attack("ftal", fine_tuning.ftal, "fine-tune all layers", variants=("lr=quarter/full",), fast=("epochs=1",)),
    Attack("rtll", fine_tuning.rtll, "new last layer, tuned on the stolen model's labels"),
    Attack("rtal", fine_tuning.rtal, "new last layer, all layers tuned on the stolen model's labels"),
    Attack("annealed", fine_tuning.retrain, "retrain all layers at the training rate, falling to 0"),
    Attack("prune", pruning.prune, "smallest weights of each tensor set to 0",
           variants=(_RATIOS, "ratio=0.5/0.7/0.9,bn=recalibrated"), fast=("ratio=0.5",)),
    Attack("prune_channels", pruning.prune_channels, "least active channels of each convolution set to 0",
           variants=("ratio=0.1/0.2/0.3/0.4/0.5", "ratio=0.3/0.5,by=norm"), fast=("ratio=0.2",)),
    Attack("prune_until", pruning.prune_to_accuracy_drop, "prune as far as the task loses so many points",
           variants=("points=10", "points=10,bn=recalibrated", "points=10,units=channels")),
    Attack("fine_prune", pruning.fine_prune, "prune weights, then tune",
           variants=("ratio=0.3/0.5/0.7/0.9",)),
    Attack("fine_prune_channels", pruning.fine_prune_channels, "prune channels, then tune",
           variants=("ratio=0.2/0.3/0.5",)),
    Attack("overwrite", overwriting.overwrite, "a second key embedded over the owner's",
           variants=("epochs=50/150/250/350",)),
    Attack("spoil", spoiling.spoil, "wrong labels trained in, by somebody who knows the key and the head",
           variants=("steps=20/60/200",), fast=("steps=20",)),
    Attack("scrub", decorrelation.decorrelate, "the response to QR codes torn away, without the key",
           variants=("steps=40/100/300", "steps=100,stages=3"), fast=("steps=40",)),
    Attack("fresh_early", layer_reinit.reinit_early_layers, "first layers drawn anew and trained to the stolen features",
           variants=("stages=1/2/3",)),
    Attack("average", model_averaging.average_models, "mean of copies of one W0 with different marks (--copies)"),
    Attack("noise", weight_noise.noise, "Gaussian noise on the weights",
           variants=("sigma=0.1/0.2/0.4", "sigma=0.4,bn=recalibrated"), fast=("",)),
    Attack("int8", quantisation.int8, "weights rounded to 8 bits per channel", fast=("",)),
    Attack("int4", quantisation.int4, "weights rounded to 4 bits per channel", fast=("",)),
    Attack("bn_gauge", symmetries.bn_reparameterize, "batch norms re-gauged", "free", fast=("",)),
    Attack("bn_fold", symmetries.bn_fold, "batch norms folded away", "free",
           variants=("decoys=none/signs",), fast=("",)),
    Attack("scale_rows", symmetries.scale_filters, "rows before batch norms scaled and sign-flipped", "free",
           fast=("",)),
    Attack("scale_inner", symmetries.scale_inner_channels, "inner channels scaled", "free", fast=("",)),
    Attack("scale_stream", symmetries.scale_residual_channels, "residual streams scaled", "free", fast=("",)),
    Attack("permute_channels", symmetries.permute_channels, "channels permuted (undone from v1 on)",
           "free",
           variants=("which=inner/stream/both",), fast=("which=inner/both",)),
    Attack("transpose_input", symmetries.transpose_input, "kernels and images transposed (undone from v1 on)",
           "free", fast=("",)),
    Attack("negate_input", symmetries.negate_input, "first kernels and images negated (undone from v1 on)",
           "free", fast=("",)),
    Attack("forge_head", head_forgery.ambiguity_trained_head, "a free head fitted to somebody's model: forging, not removing",
           "forgery", fast=("",)),
)  # fmt: skip

ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ALL}

#: Sequences that `all` runs beside the single attacks.
CHAINS = (
    "scale_inner+scale_stream+bn_gauge+bn_fold",
    "prune:ratio=0.3+ftal:epochs=3+int8",
    "scale_inner+prune:ratio=0.5,bn=recalibrated+ftal:epochs=3",
)

#: What a default configuration has to outlive (issue 4), as an `--attacks` list.
STANDARD = (
    "none,ftal:lr=quarter/full,annealed,fine_prune:ratio=0.5,prune_until:points=10,overwrite:epochs=350,int8,"
    "spoil:steps=60,scrub:steps=40"
)
