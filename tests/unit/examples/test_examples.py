"""The scripts in `examples/` run on files of the other programs' form."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch

from mtlsign.schemes.other_formats import write_toolbox_file
from mtlsign.schemes.uchida import UchidaScheme
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import load_task
from tests.unit.attacks.helpers import Maker

ROOT = Path(__file__).resolve().parents[3]
FACTORY = """
from mtlsign.models import architectures

def network():
    fields = {"channels": 1, "classes": 10, "width": 8, "stem": "stock"}
    return architectures.build(architectures.architecture_for("resnet18", **fields))
"""


def script(name: str) -> types.ModuleType:
    """Import a script of `examples/`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_their_model_is_attacked_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirnetworks.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import theirnetworks  # type: ignore[import-not-found]

    model, scheme = theirnetworks.network(), UchidaScheme(key_size=64)
    key = scheme.generate_key(model, load_task("digits"), 1)
    write_toolbox_file(tmp_path / "best.pth", model.state_dict(), key)
    script("attack_their_model").main(
        [str(tmp_path / "best.pth"), "--program", "wrt", "--factory", "theirnetworks:network",
         "--task", "digits", "--attacks", "int8,permute_channels:which=both"]
    )  # fmt: skip
    unattacked, int8, permuted = capsys.readouterr().out.splitlines()
    matched = scheme.verify(model, key).matched
    assert unattacked.startswith("as read") and f"matched={matched}, n=64" in unattacked
    assert int8.startswith("int8") and permuted.startswith("permute_channels")


@pytest.mark.parametrize("program", ["wrt", "diction"])
def test_our_model_is_exported_and_read_back(tmp_path: Path, tiny_model: Maker, program: str) -> None:
    state = tiny_model().state_dict()
    (tmp_path / "ours.safetensors").write_bytes(serialize_safetensors(state))
    main = script("export_our_model").main
    main([str(tmp_path / "ours.safetensors"), str(tmp_path / "best.pth"), "--program", program])
    content = torch.load(tmp_path / "best.pth", weights_only=True)
    tiny_model(1).load_state_dict(content["model" if program == "wrt" else "net"])
    main([str(tmp_path / "best.pth"), str(tmp_path / "back.safetensors"), "--program", program, "--back"])
    back = parse_safetensors((tmp_path / "back.safetensors").read_bytes())
    assert set(back) == set(state) and all(torch.equal(back[name], t) for name, t in state.items())
