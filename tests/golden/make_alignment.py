"""Writer of the golden vectors of aligned channels in format v1. Run it only to change the format.

The owner is the PUBLISHED TEST KEY of `make_vectors.py`: never mark a model with it.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.models import channel_groups
from mtlsign.models.channel_sets import ChannelStructure, channel_structure
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys import identity, spec
from mtlsign.watermark.keys import opening as key
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from tests.golden.make_recurrent import expected_results
from tests.golden.make_vectors import TEST_KIT_KEY, TEST_SEED, WARNING, sha256
from tests.unit.watermark.verification.spread_examples import images, mark

ALIGNMENT_FILE = Path(__file__).parent / "v1" / "alignment.json"
ARCHITECTURE, TAPS = "golden:alignment", ["head"]
#: Layers in execution order: module, and batch norm after it.
LAYERS = (
    ("stem", "stem_norm"), ("first", "first_norm"), ("depth", "depth_norm"), ("second", "second_norm"),
    ("point", None), ("hidden", None), ("head", None),
)  # fmt: skip


class Network(nn.Module):
    """Residual block of plain and depthwise convolutions, one without a batch norm, and linear layers.

    The first linear layer reads flattened positions.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(channels, 10, 3, stride=2, bias=False), nn.BatchNorm2d(10)
        self.first, self.first_norm = nn.Conv2d(10, 14, 3, padding=1, bias=False), nn.BatchNorm2d(14)
        self.depth, self.depth_norm = nn.Conv2d(14, 14, 3, padding=1, groups=14), nn.BatchNorm2d(14)
        self.second, self.second_norm = nn.Conv2d(14, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.point = nn.Conv2d(10, 12, 1)
        self.hidden, self.head = nn.Linear(48, 18), nn.Linear(18, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = torch.relu(self.stem_norm(self.stem(x)))
        inner = torch.relu(self.first_norm(self.first(x)))
        inner = torch.relu(self.depth_norm(self.depth(inner)))
        x = torch.relu(x + self.second_norm(self.second(inner)))
        x = torch.relu(self.point(x))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: Tensor = self.head(torch.relu(self.hidden(x)))
        return logits


def base_network(channels: int = 1) -> Network:
    """Return W0, with γ of both signs and 0, and running statistics of natural inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network(channels)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            gamma = [(byte - 128) / 64 for byte in hashlib.sha256(name.encode()).digest()]
            module.weight.data = torch.tensor(gamma[: module.num_features])
            module.weight.data[1] = 0.0
    model.train()(images(channels=channels))
    return model.eval()


def make_opening(reference_digest: str, channels: int = 1) -> key.KeyOpening:
    """Return the signed opening."""
    data = spec.make_spec(
        name="test alignment", nonce=sha256(b"alignment"), n=128, taps=TAPS,
        carrier=qr.make_carrier(128, channels, 21, 21), head={"kind": "spread"}, statistic="count",
        reference=reference_digest, architecture={"arch": f"custom/{ARCHITECTURE}"},
    )  # fmt: skip
    return key.sign_spec(identity.Identity(TEST_SEED, TEST_KIT_KEY), data)


def make_detector(opening: key.KeyOpening, reference: Reference, channels: int = 1) -> WatermarkDetector:
    """Return the package's detector of an opening."""
    return WatermarkDetector(opening, reference, factories={ARCHITECTURE: lambda: Network(channels)})


def structure_of(structure: ChannelStructure) -> dict[str, Any]:
    """Return layers and channel sets as a reader of the network's graph has them.

    `window` is the height and width of a kernel, or of the positions that a linear layer reads of each
    channel. `columns` are numbers of input channels, counted over positions.
    """
    modules = dict(Network().named_modules())
    windows = {"hidden": [2, 2]}
    return {
        "layers": [
            {
                "module": name,
                "batch_norm": norm,
                "groups": getattr(modules[name], "groups", 1),
                "window": windows.get(name, list(getattr(modules[name], "kernel_size", (1, 1)))),
                "reads_inputs": f"{name}.weight" in structure.input_kernels,
            }
            for name, norm in LAYERS
        ],
        "sets": [
            {
                "size": members.size,
                "rows": {n.removesuffix(".weight"): x.tolist() for n, x in members.rows.items()},
                "columns": {
                    n.removesuffix(".weight"): (x[:, 0] // x.shape[1]).tolist()
                    for n, x in members.columns.items()
                },
            }
            for members in structure.sets
        ],
    }


def permuted(model: nn.Module, structure: ChannelStructure, seed: int) -> nn.Module:
    """Return a copy in which the channels of every set have changed places."""
    generator, changed = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    orders = channel_groups.random_orders(structure.sets, lambda members: True, generator)
    channel_groups.permute_channels(changed, structure.sets, orders)
    return changed


def turned(model: nn.Module) -> nn.Module:
    """Return a copy for transposed and negated images; rows of batch norms have other signs as well."""
    changed = copy.deepcopy(model)
    for name, norm in LAYERS:
        module = changed.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.transpose(2, 3).contiguous()
        if norm is not None:
            module.weight.data[::3] *= -1
            changed.get_submodule(norm).weight.data[::3] *= -1  # type: ignore[operator]
    changed.stem.weight.data.neg_()  # type: ignore[union-attr,operator]
    hidden = changed.hidden.weight.data  # type: ignore[union-attr]
    hidden = hidden.reshape(18, 12, 2, 2).transpose(2, 3)  # type: ignore[operator]
    changed.hidden.weight.data = hidden.reshape(18, 48).contiguous()  # type: ignore[union-attr]
    return changed


def pruned(model: nn.Module) -> nn.Module:
    """Return a copy without the smaller half of each kernel's numbers."""
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        if parameter.dim() > 1:
            parameter.data[parameter.abs() < parameter.abs().median()] = 0.0
    return changed


def suspects(model: nn.Module, detector: WatermarkDetector, structure: ChannelStructure) -> dict[str, bytes]:
    """Return the suspects' files: kernels and the weights of batch norms."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marked = copy.deepcopy(model)
    marked.load_state_dict(state | mark(state, detector, steps=10, size=0.04))
    networks = {
        "marked": marked,
        "permuted": permuted(marked, structure, 1),
        "permuted and turned": turned(permuted(marked, structure, 2)),
        "pruned": pruned(marked),
        "pruned and permuted": permuted(pruned(marked), structure, 3),
        "base": model,
        "base, permuted": permuted(model, structure, 4),
    }
    read = {f"{name}.weight" for layer in LAYERS for name in layer if name is not None}
    return {
        name: serialize_safetensors({n: t.clone() for n, t in network.state_dict().items() if n in read})
        for name, network in networks.items()
    }


def part_of(channels: int = 1) -> tuple[dict[str, Any], dict[str, bytes], WatermarkDetector]:
    """Return structure, opening and reference of a network, its suspects and its detector.

    Args:
        channels: input channels.
    """
    model, inputs = base_network(channels), images(channels=channels)
    bases = response_bases(model, TAPS, inputs)
    reference = make_reference(model, TAPS, inputs[:2], bases=bases)
    opening = make_opening(reference.digest, channels)
    structure = channel_structure(model, TAPS, inputs[:1])
    detector = make_detector(opening, reference, channels)
    part = {
        "structure": structure_of(structure),
        "opening": json.loads(opening.to_json()),
        "reference": base64.b64encode(reference.raw_bytes).decode("ascii"),
    }
    return part, suspects(model, detector, structure), detector


def build_golden() -> dict[str, Any]:
    """Return the content of `alignment.json`."""
    part, files, detector = part_of()
    return {"warning": WARNING, **part, "suspects": expected_results(detector, files)}


if __name__ == "__main__":
    text = json.dumps(build_golden(), indent=1, ensure_ascii=False) + "\n"
    ALIGNMENT_FILE.write_text(text, encoding="utf-8")
    print(f"wrote {ALIGNMENT_FILE}")
