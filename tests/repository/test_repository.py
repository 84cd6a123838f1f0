"""Tests of the repository: README commands, CI script, requirements, cluster file, contents of the tree."""

from __future__ import annotations

import copy
import json
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tune_spaces import smoke

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Written in pieces, because the tests below search this file too.
PLACES = re.compile("/(wor" + "k|far" + "m)/|/roo" + "t/|/ho" + "me/(?!ray/)[a-z]+/")
REGISTRIES = re.compile(
    "py" + r"pi\.org|python" + r"hosted|registry\.npm" + r"js|deb\.deb" + r"ian|download\.py" + "torch"
)


def tree() -> list[Path]:
    """Return every file that is or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:  # an unpacked archive
        paths = [path for path in ROOT.rglob("*") if ".venv" not in path.parts and ".git" not in path.parts]
    return [path for path in paths if path.is_file() and path.name != "uv.lock"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_readme_begins_with_its_two_commands() -> None:
    first, second = FENCE.findall(text("README.md"))[:2]
    assert first == "python -m pip install uv && uv run jobs/embed.py\n"
    assert second == "python -m pip install uv && uv run --dev pytest\n"


def test_ci_runs_the_readme_verbatim() -> None:
    second = FENCE.findall(text("README.md"))[1].strip()
    script = ROOT / ".ci" / "run"
    assert f"test_command='{second}'" in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_runs_every_check() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = re.findall(r"^ *step (\w+) ", script, re.MULTILINE)
    assert steps == ["lint", "format", "types", "imports", "tests", "docs"]
    assert f"= {len(steps)} ]" in script, "CI passes only if every step has passed"


def test_tours_are_short_and_document_links_resolve() -> None:
    architecture = text("docs/concepts/architecture.md")
    tours = architecture.split("## Follow one value")[1].split("\n### ")[1:]
    lengths = [len(re.findall(r"^\d+\. ", tour, re.MULTILINE)) for tour in tours]
    assert 1 <= lengths[0] <= 8 and min(lengths) >= 1 and max(lengths) <= 9
    for page in ("README.md", "jobs/README.md", *(f"docs/decisions/{p.name}" for p in decisions())):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text(page)):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def decisions() -> list[Path]:
    return sorted((ROOT / "docs" / "decisions").glob("0*.md"))


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(path.name[:4]) for path in decisions()] == list(range(1, len(decisions()) + 1))


def test_tree_contains_no_registry_address_and_no_machine_path() -> None:
    for path in tree():
        data = path.read_bytes()
        if b"\0" in data[:4096]:
            continue
        content = data.decode("utf-8")
        for pattern in (PLACES, REGISTRIES):
            match = pattern.search(content)
            assert match is None, f"{path.relative_to(ROOT)}: {match.group(0) if match else ''}"


def test_tree_contains_no_package_and_no_large_file() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tree()}
    assert not [name for name, size in sizes.items() if name.endswith((".whl", ".tar.gz")) or size > 2**20]


def test_requirements_are_hash_locked_and_name_no_index() -> None:
    logical = text("jobs/requirements.txt").replace("\\\n", " ").splitlines()
    lines = [line for line in logical if line.strip() and not line.startswith("#")]
    assert len(lines) > 50
    for line in lines:
        assert re.match(r"^[a-z0-9._-]+(\[[a-z,]+\])?==[^ ]+ ", line) and "--hash=sha256:" in line, line
    assert "://" not in text("jobs/requirements.txt")
    assert not re.search(r"^\s*-(?!-hash)", text("jobs/requirements.txt"), re.MULTILINE)


def test_requirements_cover_every_dependency_of_the_package() -> None:
    import tomllib

    project = tomllib.loads(text("pyproject.toml"))["project"]
    locked = {
        line.split("==")[0].split("[")[0]
        for line in text("jobs/requirements.txt").splitlines()
        if "==" in line
    }
    required = {re.split(r"[\[<>=!~; ]", name)[0].lower() for name in project["dependencies"]}
    assert required <= locked


def test_commands_of_the_readme_install_test_tools_for_tests_only() -> None:
    import tomllib

    project = tomllib.loads(text("pyproject.toml"))
    assert project["tool"]["uv"]["default-groups"] == ["full"]
    assert project["dependency-groups"]["full"] == ["mtlsign[all]"]
    runs = re.findall(r"uv run [^\n]*", text("README.md") + text("docs/quickstart.md"))
    assert len(runs) > 5 and {"pytest" in run for run in runs if "--dev" in run} == {True}


def test_rayignore_excludes_history_data_and_secrets() -> None:
    ignored = text(".rayignore").splitlines()
    assert {"/.git/", "/.venv/", "/kits/", "/runs/", "/mtlsign-store/", "identity.json"} <= set(ignored)
    needed = ("/mtlsign/", "/jobs/", "/tune_spaces/", "/pyproject.toml")
    assert not set(needed) & set(ignored)
    environment = yaml.safe_load(text("jobs/runtime_env.yaml"))
    assert set(environment) == {"env_vars", "excludes"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    assert not [name for name in environment["env_vars"] if "AWS" in name or "TOKEN" in name]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load(text("cluster.yaml"))
    assert isinstance(loaded, dict)
    return loaded


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    """Validate the file with Ray's schema and checks, without a cloud."""
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    full: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(full)
    return full


def test_cluster_file_is_accepted_by_ray(cluster: dict[str, Any]) -> None:
    full = validate(cluster)
    assert (
        full["setup_commands"] == cluster["setup_commands"]
    )  # nothing inherited: Ray's default is a nightly
    assert "nightly" not in json.dumps(full) and "ray-wheels" not in json.dumps(full)
    assert full["available_node_types"]["gpu"]["resources"]["GPU"] == 1


def test_cluster_file_with_mistakes_is_rejected(cluster: dict[str, Any]) -> None:
    for broken in (cluster | {"idle_timeout": 5}, cluster | {"head_node_type": "gone"}):
        with pytest.raises(Exception, match=r"idle_timeout|gone|head_node_type"):
            validate(broken)


def test_cluster_file_is_pinned_locked_and_authenticated(cluster: dict[str, Any]) -> None:
    version = re.search(r"^ray==([0-9.]+)", text("jobs/requirements.txt"), re.MULTILINE)
    assert version and f"ray:{version.group(1)}-py311" in cluster["docker"]["image"]
    assert [c for c in cluster["setup_commands"] if "--require-hashes" in c and "requirements.txt" in c]
    mounted = cluster["file_mounts"]["/home/ray/mtlsign-jobs"]
    assert (ROOT / mounted / "requirements.txt").is_file()
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["idle_timeout_minutes"] > 0
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] >= 1 and types["gpu"]["max_workers"] >= 2


def test_smoke_space_has_four_cells_of_known_settings() -> None:
    from mtlsign.config.embed import EmbedSettings

    space = smoke()
    cells = 1
    for name, value in space.items():
        choices = value["grid_search"] if isinstance(value, dict) else [value]
        cells *= len(choices)
        for choice in choices:
            EmbedSettings.of({name: choice})
    assert cells == 4
