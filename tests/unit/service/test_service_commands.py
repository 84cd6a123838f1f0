"""Every command that the documents show is one: its script is there and knows its flags. And the YAML files
that Ray reads are what Ray takes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from mtlsign.config.service import ServiceSettings

ROOT = Path(__file__).resolve().parents[3]
PAGES = ("README.md", "jobs/README.md", "docs/service.md")
FENCE = re.compile(r"^```(?:sh|bash)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """(script or module, arguments) of every line in a fence that runs one of ours, also through Ray."""
    found = []
    for page in PAGES:
        for fence in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
            for line in fence.splitlines():
                at = re.search(r"(jobs/[a-z_]+\.py|-m mtlsign\.service)\b(.*)", line)
                if (at and "uv run" in line) or (at and "python" in line):
                    assert at is not None
                    found.append(
                        (at[1].removeprefix("-m "), shlex.split(at[2].partition(" && ")[0].rstrip('"')))
                    )
    return found


@cache
def help_of(script: str) -> str:
    """What `--help` prints."""
    name = "mtlsign.service.__main__" if script == "mtlsign.service" else script[:-3].replace("/", ".")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
    return out.getvalue()


def test_there_are_commands() -> None:
    scripts = {script for script, _ in commands()}
    assert {"jobs/serve.py", "jobs/verify_batch.py", "jobs/embed.py", "mtlsign.service"} <= scripts
    every = {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py") if path.name[0] != "_"}
    assert not every - scripts - {"jobs/identity.py"}, "a job that no page shows"


@pytest.mark.parametrize(("script", "arguments"), commands(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_shown_command_knows_its_flags(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file() or script == "mtlsign.service"
    known = set(re.findall(r"--[a-z0-9][a-z0-9-]*", help_of(script)))
    assert known
    unknown = [flag for flag in arguments if flag.startswith("--") and flag.partition("=")[0] not in known]
    assert not unknown


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_serve_yaml_is_what_ray_and_the_service_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    loaded = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(loaded)
    (application,) = schema.applications
    assert application.import_path == "mtlsign.distributed.serve:build"
    settings = ServiceSettings.of(application.args)
    assert schema.http_options.host == "127.0.0.1" == settings.host
    assert schema.http_options.request_timeout_s >= settings.upload_s
    assert not {"signing_key", "identity"} & set(application.args)


def test_the_cluster_starts_serve_with_our_bounds() -> None:
    from mtlsign.distributed.serve import PROXY_SETTING, PROXY_VALUE

    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    options = cluster["docker"]["run_options"]
    assert f"--env {PROXY_SETTING}={PROXY_VALUE}" in options
    (path,) = [o.partition("PYTHONPATH=")[2] for o in options if "PYTHONPATH=" in o]
    assert cluster["file_mounts"][f"{path}/mtlsign"] == "mtlsign"
    assert [o for o in options if re.fullmatch(r"--env MTLSIGN_STATE=/home/ray/[a-z-]+", o)]
    assert cluster["idle_timeout_minutes"] > 0 and "--env RAY_AUTH_MODE=token" in options


def test_settings_travel_to_replicas_without_secrets_and_without_a_job_s_own() -> None:
    from mtlsign.config.service import BatchSettings
    from mtlsign.distributed.serve import _plain

    given = BatchSettings.of({"claims": "c.jsonl", "signing_key": "ab" * 64, "bits": 100})
    sent = _plain(given)
    assert (
        ServiceSettings.of(sent).bits == 100
        and "ab" * 64 not in str(sent)
        and Path(sent["state"]).is_absolute()
    )
