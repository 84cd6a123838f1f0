"""Attack and verify a model that the Watermark-Robustness-Toolbox or the code of DICTION marked.

    uv run examples/attack_their_model.py best.pth --program wrt --scheme uchida \
        --factory networks:resnet --task cifar10 --data DATA --attacks prune:ratio=0.5,ftal

The file is read as data. `--factory` names a function of the user's that builds the network, in a module on
PYTHONPATH; its names must be those of the other program's architecture. Prints one line for each attack:
matching bits or key samples, evidence in bits, and whether the claim is accepted.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from mtlsign.attacks import AttackerResources, parse_attacks
from mtlsign.schemes.other_formats import read_diction_file, read_toolbox_file
from mtlsign.tasks import load_task


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify the model, attack it, and verify each attacked model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, help="best.pth of the toolbox, or a marked model of DICTION's code"
    )
    parser.add_argument("--program", choices=("wrt", "diction"), required=True)
    parser.add_argument("--scheme", default="uchida", help="wrt: scheme of the key")
    parser.add_argument("--factory", required=True, help="module:function that builds the network")
    parser.add_argument("--task", required=True, help="primary task, as of jobs/attack.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--attacks", default="prune:ratio=0.5", help="as of jobs/attack.py")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of the model's training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    module, _, function = options.factory.partition(":")
    task = load_task(options.task, data=options.data, seed=options.seed)
    if options.program == "wrt":
        marked = read_toolbox_file(options.file, options.scheme, classes=task.classes)
    else:
        marked = read_diction_file(options.file)
    network = marked.load_into(getattr(importlib.import_module(module), function)())
    resources = AttackerResources(training_lr=options.lr, scheme=marked.scheme, key=marked.key)
    print(f"{'as read':40} {marked.scheme.verify(network, marked.key)}")
    for plan in parse_attacks(options.attacks):
        outcome = plan.run(network, task, resources, options.seed)
        detection = marked.scheme.verify(outcome.model, marked.key, outcome.tensors)
        print(f"{plan.name:40} {detection}")


if __name__ == "__main__":
    main()
