"""YAML files of settings: names, groups, limits and malformed files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtlsign.config.embed import EmbedSettings
from mtlsign.config.yaml_file import MAX_CONFIG_BYTES, read_config
from mtlsign.errors import SettingsError


def test_read_config_accepts_hyphens_and_groups(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lambda1: 0.5\nkey-size: 256\nperturbation: {max-prune-ratio: 0.5}\ndata: null\n")
    values = {"lambda1": 0.5, "key_size": 256, "perturbation": {"max_prune_ratio": 0.5}, "data": None}
    assert read_config(path) == values
    assert EmbedSettings.of(read_config(path)).perturbation.max_prune_ratio == 0.5
    path.write_text("")
    assert read_config(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", "not a mapping"),
        (b"1: 2\n", "not a mapping"),
        (b"a: [\n", r"not YAML \(line 2\)"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"a: !!python/object/apply:os.system [true]\n", "not YAML"),
        (b"#" * (MAX_CONFIG_BYTES + 1), "over"),
        (b"[" * 5_000, "not YAML"),
    ],
)
def test_read_config_malformed_file_raises_settings_error(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^config: .*{message}"):
        read_config(path)
    with pytest.raises(SettingsError, match=r"^config: .* cannot be read"):
        read_config(tmp_path / "absent.yaml")
