"""Attacks of the Watermark-Robustness-Toolbox: extraction, transfer, other objectives, triggers."""

from __future__ import annotations

from mtlsign.attacks import extraction, regularised_tuning, transfer, trigger_removal
from mtlsign.attacks.base import Attack

TOOLBOX_ATTACKS = (
    Attack(
        "extract",
        extraction.extract,
        "network trained from random weights on the marked model's answers, without labels",
        variants=(
            "answers=probabilities/classes",
            "queries=mixtures",
            "network=small",
        ),
    ),
    Attack(
        "transfer",
        transfer.transfer,
        "new last layer, trained on half of the classes or on another task (--transfer-task)",
        variants=("to=half", "to=half,lr=full", "to=task"),
        fast=("epochs=1",),
    ),
    Attack(
        "adversarial_training",
        regularised_tuning.adversarial_training,
        "fine-tuning on adversarial images",
    ),
    Attack("label_smoothing", regularised_tuning.label_smoothing, "fine-tuning on smoothed labels"),
    Attack("regularize", regularised_tuning.regularize, "fine-tuning with a large penalty on the weights"),
    Attack(
        "shift_weights",
        regularised_tuning.shift_weights,
        "mean filters subtracted and noise added, then fine-tuning",
    ),
    Attack("neural_cleanse", trigger_removal.neural_cleanse, "reconstructed trigger unlearned"),
    Attack(
        "preprocess_input",
        trigger_removal.preprocess_input,
        "queries smoothed or quantised",
        variants=("kind=smoothed", "kind=quantised,strength=4"),
        fast=("",),
    ),
    Attack(
        "remove_outputs", trigger_removal.remove_outputs, "outputs besides the classes removed", fast=("",)
    ),
)
