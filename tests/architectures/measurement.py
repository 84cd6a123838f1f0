"""Measurement of one architecture: embed, save three files, verify with a fresh build in another process.

The module is also the program of that process: it reads one JSON request per line and answers each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

import mtlsign
from mtlsign.errors import MTLSignError
from mtlsign.models.architectures import default_taps
from mtlsign.models.residual_stream import residual_stream
from mtlsign.models.taps import TappedLayer
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.tasks import from_tensors
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.response_bases import readable_layers
from tests.architectures.zoo import CLASSES, ZOO, Entry

OWNER = mtlsign.Identity(bytes(range(32)), bytes(range(32, 64)))
ROOT = Path(__file__).resolve().parents[2]
KEY_SIZE = 128
#: The time of the eigenvectors bounds the marked layers: their number, and the inputs of one row.
MOST_LAYERS, MOST_INPUTS = 6, 640
#: Networks whose six widest layers have few coordinates: number of marked layers and steps.
LARGER_EMBEDDINGS = {
    "timm/mobilenetv4_conv_small": (16, 96), "timm/dla46_c": (16, 96), "torchvision/mnasnet0_5": (10, 96),
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "key_size": KEY_SIZE,
    "phase2.steps": 16,
    "phase2.batch": 4,
    "phase2.lr": 0.02,
    "insecure_test_key": True,
}


@dataclass(frozen=True)
class Row:
    """Row of the table; the numbers are matching bits of 128.

    Attributes:
        architecture: name in the zoo.
        first_stage: tap of a keyed head.
        last_stage: tap of a spread head.
        layers: number of layers before the tap that a spread head can mark.
        unmarked: W0.
        embedded: the marked network in the process of the owner.
        file: its file, read by a fresh build in another process.
        bf16: the same in bfloat16.
        prefixed: the same with the prefix `module.`.
        refusal: the error as a single line, instead of the numbers.
    """

    architecture: str
    first_stage: str = ""
    last_stage: str = ""
    layers: int | None = None
    unmarked: int | None = None
    embedded: int | None = None
    file: int | None = None
    bf16: int | None = None
    prefixed: int | None = None
    refusal: str = ""


def measure(name: str, folder: Path, verifier: Verifier) -> Row:
    """Embed into the architecture and verify its files.

    Args:
        name: name in the zoo.
        folder: folder for the files of the kit and the models.
        verifier: the other process.
    """
    entry = ZOO[name]
    torch.manual_seed(0)
    model = entry.build().eval()
    gen = torch.Generator().manual_seed(1)
    x = torch.rand(30, 3, entry.side, entry.side, generator=gen)
    task = from_tensors(x, torch.arange(30) % CLASSES, classes=CLASSES, logits_of=entry.logits_of)
    architecture = {"arch": f"custom/tests.architectures.zoo:{_identifier(name)}", "channels": 3}
    first_stage, last_stage, count = "", "", 0
    most_layers, steps = LARGER_EMBEDDINGS.get(name, (MOST_LAYERS, SETTINGS["phase2.steps"]))
    options = SETTINGS | {"phase2.steps": steps}
    if entry.refusal is None:
        layers, first_stage, last_stage, count = _marked_layers(model, x[:2], most_layers)
        options["layers"] = ",".join(layers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = mtlsign.embed(
                model, task, trained=True, identity=OWNER, architecture=architecture, **options
            )
    except MTLSignError as error:
        return Row(name, refusal=" ".join(str(error).split()))
    (folder / "opening.json").write_text(done.kit.opening.to_json())
    (folder / "reference.safetensors").write_bytes(done.kit.reference)
    matches = {
        file: verifier.matches(name, folder, _write(folder / f"{file}.safetensors", tensors))
        for file, tensors in _files(done.tensors).items()
    }
    unmarked = round(KEY_SIZE * done.result["wm_accuracy_on_clean"])
    return Row(name, first_stage, last_stage, count, unmarked, done.verdict.matches, **matches)


def _marked_layers(model: nn.Module, sample: Tensor, most: int) -> tuple[list[str], str, str, int]:
    """Return the layers with most rows and few inputs, the two default taps, and the number of all layers."""
    (first_stage,), (last_stage,) = (default_taps(model, kind, sample) for kind in ("keyed", "spread"))
    stream, modules = residual_stream(model, (last_stage,), sample), dict(model.named_modules())
    layers = readable_layers(model, (last_stage,), sample, stream)

    def size(layer: TappedLayer) -> tuple[int, int]:
        """Return rows and inputs of a layer."""
        if layer.kind == "attention":
            assert stream is not None
            return stream.size, stream.size
        weight = modules[layer.conv].weight
        assert isinstance(weight, Tensor)
        return len(weight), weight[0].numel()

    small = [layer for layer in layers if size(layer)[1] <= MOST_INPUTS]
    widest = sorted(small, key=lambda layer: -size(layer)[0])[:most]
    return [layer.key for layer in small if layer in widest], first_stage, last_stage, len(layers)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        "file": dict(tensors),
        "bf16": {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()},
        "prefixed": {f"module.{n}": t for n, t in tensors.items()},
    }


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.write_bytes(serialize_safetensors(tensors))
    return path


def _identifier(name: str) -> str:
    return name.replace("/", "_")


class Verifier:
    """Other process that builds each architecture afresh and verifies files."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.architectures.measurement"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def matches(self, name: str, folder: Path, model: Path) -> int | None:
        """Return the number of matching bits; None if the file cannot be verified."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"name": name, "folder": str(folder), "model": str(model)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return None if answer["status"] == "not_verifiable" else int(answer["matches"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer the requests of a `Verifier`; random weights differ from those of the owner."""
    torch.set_num_threads(1)
    torch.manual_seed(4711)
    for line in requests:
        request = json.loads(line)
        entry: Entry = ZOO[request["name"]]
        folder = Path(request["folder"])
        opening = KeyOpening.from_json((folder / "opening.json").read_bytes())
        reference = mtlsign.Reference.from_bytes((folder / "reference.safetensors").read_bytes())
        path = f"tests.architectures.zoo:{_identifier(request['name'])}"
        detector = mtlsign.WatermarkDetector(opening, reference, factories={path: entry.build})
        verdict = mtlsign.verify(mtlsign.read_model(request["model"]).tensors, detector, bits=40)
        answers.write(json.dumps({"status": verdict.status, "matches": verdict.matches}) + "\n")
        answers.flush()


def as_record(row: Row) -> dict[str, Any]:
    """Return the row as a JSON object."""
    return asdict(row)


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print while they build networks
    _serve(sys.stdin, answers)
