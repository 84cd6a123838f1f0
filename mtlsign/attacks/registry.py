"""Registry of attacks by name, with the parameters that `all` and `fast` run."""

from __future__ import annotations

from torch import nn

from mtlsign.attacks import (
    channel_symmetries,
    decorrelation,
    detector_tuning,
    distilled_tuning,
    extra_channels,
    file_rewriting,
    fine_tuning,
    head_forgery,
    input_symmetries,
    layer_reinit,
    linear_channels,
    model_averaging,
    overwriting,
    pruning,
    quantisation,
    response_space,
    spoiling,
    symmetries,
    unsketching,
    weight_noise,
)
from mtlsign.attacks.base import Attack, AttackerResources, AttackOutcome
from mtlsign.attacks.pretrained_attacks import PRETRAINED_ATTACKS
from mtlsign.attacks.text_attacks import TEXT_ATTACKS
from mtlsign.attacks.toolbox_attacks import TOOLBOX_ATTACKS
from mtlsign.tasks import Task

_RATIOS = "ratio=0.1/0.2/0.3/0.4/0.5/0.6/0.7/0.8/0.9"


def _no_attack(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    return AttackOutcome(model)


_ALL = (
    Attack("none", _no_attack, "unchanged model, the baseline of every attack", "none", fast=("",)),
    Attack("ftll", fine_tuning.ftll, "fine-tune the last layer", fast=("epochs=1",)),
    Attack(
        "ftal", fine_tuning.ftal, "fine-tune all layers", variants=("lr=quarter/full",), fast=("epochs=1",)
    ),
    Attack(
        "ftdet",
        detector_tuning.fine_tune_detector,
        "fine-tune a detector with the stem, the first stage and the batch norms frozen",
        variants=("lr=quarter/full",),
        fast=("epochs=1",),
    ),
    Attack("rtll", fine_tuning.rtll, "new last layer, trained on the marked model's predictions"),
    Attack("rtal", fine_tuning.rtal, "new last layer, all layers trained on the marked model's predictions"),
    Attack("retrain", fine_tuning.retrain, "retrain all layers at the training rate, falling to 0"),
    Attack(
        "prune",
        pruning.prune,
        "smallest weights of each tensor set to 0",
        variants=(_RATIOS, "ratio=0.5/0.7/0.9,bn=recalibrated"),
        fast=("ratio=0.5",),
    ),
    Attack(
        "prune_channels",
        pruning.prune_channels,
        "least active channels of each convolution, and units of each LSTM or GRU, set to 0",
        variants=("ratio=0.1/0.2/0.3/0.4/0.5", "ratio=0.3/0.5,by=norm"),
        fast=("ratio=0.2",),
    ),
    Attack(
        "prune_to_accuracy_drop",
        pruning.prune_to_accuracy_drop,
        "highest pruning ratio with an accuracy loss of at most so many points",
        variants=("points=10", "points=10,bn=recalibrated", "points=10,units=channels"),
    ),
    Attack(
        "fine_prune", pruning.fine_prune, "prune weights, then fine-tune", variants=("ratio=0.3/0.5/0.7/0.9",)
    ),
    Attack(
        "fine_prune_channels",
        pruning.fine_prune_channels,
        "prune channels, then fine-tune",
        variants=("ratio=0.2/0.3/0.5",),
    ),
    Attack(
        "overwrite",
        overwriting.overwrite,
        "second key embedded over the owner's",
        variants=("epochs=50/150/250/350",),
    ),
    Attack(
        "spoil",
        spoiling.spoil,
        "training on wrong labels with knowledge of key and head",
        variants=("steps=20/60/200",),
        fast=("steps=20",),
    ),
    Attack(
        "decorrelate",
        decorrelation.decorrelate,
        "response to carrier inputs decorrelated, without the key",
        variants=("steps=40/100/300", "steps=100,stages=3"),
        fast=("steps=40",),
    ),
    Attack(
        "reinit_early_layers",
        layer_reinit.reinit_early_layers,
        "first layers reinitialised and trained to the marked model's features",
        variants=("stages=1/2/3",),
    ),
    Attack(
        "tune",
        distilled_tuning.tune,
        "all weights tuned with Adam on the marked model's outputs and labels",
        variants=(
            "steps=500/1500,lr=0.003/0.01",
            "steps=1500,lr=0.01,weight_decay=0.0005/0.005",
            "steps=4500,lr=0.01,weight_decay=0.0005",
            "steps=1500,lr=0.01,ema_decay=0.99",
            "steps=1500,lr=0.01,mixup=0.5",
            "steps=750,lr=0.01,sam_radius=0.05",
            "steps=500,lr=0.003,labels=0,ewc=10",
        ),
        fast=("steps=20,lr=0.003",),
    ),
    Attack(
        "relearn",
        distilled_tuning.relearn,
        "whole network trained from random weights on the marked model's outputs and labels",
        variants=(
            "epochs=20",
            "epochs=20,start=shrink_perturb",
            "epochs=36,optimizer=adam,lr=0.01,weight_decay=0.005",
        ),
    ),
    Attack(
        "null_space",
        response_space.null_space,
        "directions that natural inputs do not excite removed or replaced by noise",
        variants=(
            "energy=0.98/0.97/0.95",
            "energy=0.97,noise=1",
            "energy=0.98,noise=3",
            "energy=0.97,noise=1,repair_steps=300,repair_lr=0.003",
            "energy=0.97,stages=1",
        ),
        fast=("energy=0.97",),
    ),
    Attack(
        "response_noise",
        response_space.response_noise,
        "noise that is large where natural inputs are weak",
        variants=("size=0.1/0.3", "size=0.3/0.6/1,repair_steps=300,repair_lr=0.003"),
        fast=("size=0.1",),
    ),
    Attack(
        "mean_shift",
        response_space.mean_shift,
        "response means shifted, which batch norms undo",
        variants=("size=0.1/0.3",),
    ),
    Attack(
        "low_rank",
        response_space.low_rank,
        "smallest singular values of kernels set to 0",
        variants=("share=0.5", "share=0.25,repair_steps=300,repair_lr=0.003"),
    ),
    Attack(
        "average_models",
        model_averaging.average_models,
        "mean of models marked from one W0 (--other-marked-models)",
    ),
    Attack(
        "unsketch",
        unsketching.unsketch,
        "parts of kernels that an opened reference shows put back to those of W0",
        fast=("",),
    ),
    Attack(
        "noise",
        weight_noise.noise,
        "Gaussian noise on the weights",
        variants=("sigma=0.1/0.2/0.4", "sigma=0.4,bn=recalibrated"),
        fast=("",),
    ),
    Attack("int8", quantisation.int8, "weights rounded to 8 bits per channel", fast=("",)),
    Attack("int4", quantisation.int4, "weights rounded to 4 bits per channel", fast=("",)),
    Attack(
        "bn_reparameterize",
        symmetries.bn_reparameterize,
        "batch norms reparametrised",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "bn_fold",
        symmetries.bn_fold,
        "batch norms folded into convolutions",
        "function_preserving",
        variants=("decoys=none/signs",),
        fast=("",),
    ),
    Attack(
        "scale_filters",
        symmetries.scale_filters,
        "kernel rows before batch norms scaled and sign-flipped",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "scale_inner_channels",
        channel_symmetries.scale_inner_channels,
        "channels that one kernel writes scaled",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "scale_residual_channels",
        channel_symmetries.scale_residual_channels,
        "residual channels scaled",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "permute_channels",
        channel_symmetries.permute_channels,
        "channels permuted",
        "function_preserving",
        variants=("which=inner/residual/both",),
        fast=("which=inner/both",),
    ),
    Attack(
        "mix_linear_channels",
        linear_channels.mix_linear_channels,
        "channels without an activation multiplied by a random matrix",
        "function_preserving",
    ),
    *TEXT_ATTACKS,
    *PRETRAINED_ATTACKS,
    *TOOLBOX_ATTACKS,
    Attack(
        "transpose_input",
        input_symmetries.transpose_input,
        "kernels and images transposed",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "turn_input",
        input_symmetries.turn_input,
        "kernels and images turned or mirrored",
        "function_preserving",
        variants=("kind=flipped_rows/flipped_columns/rotated",),
    ),
    Attack(
        "mix_input",
        input_symmetries.mix_input,
        "first kernels multiplied by an inverse colour matrix, images by the matrix",
        "function_preserving",
        variants=("kind=yuv/negate_one/negate/bgr/random",),
        fast=("kind=negate",),
    ),
    Attack(
        "negate_input",
        input_symmetries.negate_input,
        "first kernels and images negated",
        "function_preserving",
        fast=("",),
    ),
    Attack(
        "dummy_channels",
        extra_channels.dummy_channels,
        "channels added that no output depends on",
        "function_preserving",
        fast=("count=4",),
    ),
    Attack(
        "split_channels",
        extra_channels.split_channels,
        "copies of channels added, which share the columns of their originals",
        "function_preserving",
        variants=("kind=halves/random",),
        fast=("count=4",),
    ),
    Attack(
        "clique_channels",
        extra_channels.clique_channels,
        "pairs of equal channels added, which cancel",
        "function_preserving",
        fast=("count=4",),
    ),
    Attack(
        "rewrite_file",
        file_rewriting.rewrite_file,
        "file in another form: names, layouts, several tensors for a kernel, further tensors",
        "function_preserving",
        variants=(
            "form=prefix/half/names/anonymous/hwio/ohwi/flat/weight_norm/int8/padded/decoys/extra/lora/factors",
        ),
        fast=("form=prefix/weight_norm",),
    ),
    Attack(
        "ambiguity_trained_head",
        head_forgery.ambiguity_trained_head,
        "free head trained for another party's model: ambiguity, no removal",
        "ambiguity",
        fast=("",),
    ),
)

ATTACKS: dict[str, Attack] = {attack.name: attack for attack in _ALL}

#: Old names of attacks, which `--attacks` rejects with the new name.
RENAMED: dict[str, str] = {
    "annealed": "retrain",
    "prune_until": "prune_to_accuracy_drop",
    "fresh_early": "reinit_early_layers",
    "scrub": "decorrelate",
    "average": "average_models",
    "bn_gauge": "bn_reparameterize",
    "scale_rows": "scale_filters",
    "scale_inner": "scale_inner_channels",
    "scale_stream": "scale_residual_channels",
    "forge_head": "ambiguity_trained_head",
}

#: Old names of parameters, which `--attacks` rejects with the new name.
RENAMED_PARAMETERS: dict[str, str] = {"path": "schedule"}

#: Sequences that `all` runs besides the single attacks.
CHAINS = (
    "scale_inner_channels+scale_residual_channels+bn_reparameterize+bn_fold",
    "prune:ratio=0.3+ftal:epochs=3+int8",
    "scale_inner_channels+prune:ratio=0.5,bn=recalibrated+ftal:epochs=3",
    "dummy_channels+permute_channels+mix_input:kind=negate+rewrite_file:form=weight_norm",
    "prune:ratio=0.3+ftal:epochs=3+split_channels+transpose_input",
)

#: The strongest attacks of each kind, and `relearn` as a measure of their cost, as an `--attacks` list.
STANDARD = (
    "none,ftal:lr=quarter/full,retrain,fine_prune:ratio=0.5,prune_to_accuracy_drop:points=10,"
    "overwrite:epochs=350,int8,spoil:steps=60,decorrelate:steps=40,null_space:energy=0.95,noise=1,"
    "repair_steps=300,repair_lr=0.003,tune:steps=1500,lr=0.01,weight_decay=0/0.0005,relearn:epochs=20,unsketch,"
    "recurrent_symmetries,permute_vocabulary,attention_symmetries,rotate_stream,dummy_block,"
    "reorder_joint_matrices,permute_channels,transpose_input,mix_input:kind=negate,dummy_channels,split_channels,clique_channels"
)
