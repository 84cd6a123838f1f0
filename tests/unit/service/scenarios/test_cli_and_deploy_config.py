"""Commands in the documents, and the YAML files that Ray reads."""

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

ROOT = Path(__file__).resolve().parents[4]


PAGES = ("README.md", "jobs/README.md", "docs/service.md")


FENCE = re.compile(r"^```(?:sh|bash)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """Return (script or module, arguments) of each command line in a fence, also of `ray job submit`."""
    commands_in_pages = []
    for page in PAGES:
        for fence in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
            for line in fence.splitlines():
                match = re.search(r"(jobs/[a-z_]+\.py|-m mtlsign\.service)\b(.*)", line)
                if match and ("uv run" in line or "python" in line):
                    arguments = shlex.split(match[2].partition(" && ")[0].rstrip('"'))
                    commands_in_pages.append((match[1].removeprefix("-m "), arguments))
    return commands_in_pages


@cache
def help_of(script: str) -> str:
    """Return the complete help of a command and of its variants."""
    is_service = script == "mtlsign.service"
    name = "mtlsign.service.__main__" if is_service else script[:-3].replace("/", ".")
    main = importlib.import_module(name).main
    out = io.StringIO()
    for command in (main, *getattr(main, "variants", {}).values()):
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            command(["--help" if is_service else "--help-all"])
    return out.getvalue()


def test_documents_show_every_job() -> None:
    scripts = {script for script, _ in commands()}
    assert {"jobs/serve.py", "jobs/verify_batch.py", "jobs/embed.py", "mtlsign.service"} <= scripts
    every = {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py") if path.name[0] != "_"}
    assert not every - scripts - {"jobs/identity.py"}, "a job without a documented command"


@pytest.mark.parametrize(("script", "arguments"), commands(), ids=lambda v: v if isinstance(v, str) else "")
def test_documented_command_has_its_flags(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file() or script == "mtlsign.service"
    known = set(re.findall(r"--[a-z0-9][a-z0-9-]*", help_of(script)))
    assert known
    unknown = [flag for flag in arguments if flag.startswith("--") and flag.partition("=")[0] not in known]
    assert not unknown


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_serve_yaml_is_accepted_by_ray_and_settings() -> None:
    from ray.serve.schema import ServeDeploySchema

    loaded = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(loaded)
    (application,) = schema.applications
    assert application.import_path == "mtlsign.distributed.serve:build"
    settings = ServiceSettings.of(application.args)
    assert schema.http_options.host == "127.0.0.1" == settings.host
    assert schema.http_options.request_timeout_s >= settings.upload_timeout_s
    assert not {"signing_key", "identity"} & set(application.args)


def test_cluster_yaml_starts_proxy_with_body_limits() -> None:
    from mtlsign.distributed.serve import PROXY_SETTING, PROXY_VALUE

    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    options = cluster["docker"]["run_options"]
    assert f"--env {PROXY_SETTING}={PROXY_VALUE}" in options
    (path,) = [o.partition("PYTHONPATH=")[2] for o in options if "PYTHONPATH=" in o]
    assert cluster["file_mounts"][f"{path}/mtlsign"] == "mtlsign"
    assert [o for o in options if re.fullmatch(r"--env MTLSIGN_STATE_DIR=/home/ray/[a-z-]+", o)]
    assert cluster["idle_timeout_minutes"] > 0 and "--env RAY_AUTH_MODE=token" in options


def test_replica_settings_have_no_secret_and_no_job_setting() -> None:
    from mtlsign.config.service import BatchSettings
    from mtlsign.distributed.serve_verifier import replica_settings

    settings = BatchSettings.of({"claims": "c.jsonl", "signing_key": "ab" * 64, "min_evidence_bits": 100})
    sent = replica_settings(settings)
    assert (
        ServiceSettings.of(sent).min_evidence_bits == 100
        and "ab" * 64 not in str(sent)
        and Path(sent["state_dir"]).is_absolute()
    )
