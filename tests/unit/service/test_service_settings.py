"""Where the service's settings come from, up to the processes that use them; the signing key's one door."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_service_page import served  # type: ignore[import-not-found]

from mtlsign.config import cli
from mtlsign.config.service import ServiceSettings
from mtlsign.errors import SettingsError
from mtlsign.service import state
from mtlsign.service.auth.signing import Keys
from mtlsign.service.http.body_limits import BodyLimitMiddleware
from mtlsign.watermark.keys.identity import Identity
from tests.unit.service.fixtures import Start

SECRET = "ab" * 64
#: What `start` sets for the proxy that it starts.
BOUNDS = [f"MTLSIGN_{name}" for name in ("MAX_BODY_MB", "BODY_S", "UPLOAD_S", "UPLOAD_MB_S", "MAX_MODEL_MB")]


def from_flags(*flags: str) -> ServiceSettings:
    return ServiceSettings.merged(cli.parse(ServiceSettings, flags, description=""))


def test_flags_win_over_the_file_and_both_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("bits: 60\ngamma: 0.8\n")
    for name in ("BITS", "GAMMA", "CONTROLS"):
        monkeypatch.setenv(f"MTLSIGN_{name}", {"BITS": "50", "GAMMA": "0.9"}.get(name, "7"))
    s = from_flags("--config", str(config), "--bits", "70")
    assert (s.bits, s.gamma, s.controls) == (70, 0.8, 7)
    s = ServiceSettings.load(config, base={"verifiers": 3})
    assert (s.bits, s.gamma, s.controls, s.verifiers) == (50, 0.9, 7, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_a_job_s_flags_reach_ingress_and_verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `start` binds is what was resolved; the environment of the processes changes none of it."""
    from mtlsign.distributed import serve

    bound: list[Any] = []
    monkeypatch.setattr(serve.cluster, "connect", lambda: None)
    monkeypatch.setattr(serve, "serve", SimpleNamespace(**vars(serve.serve)))
    monkeypatch.setattr(serve.serve, "start", lambda **_: None)
    monkeypatch.setattr(serve.serve, "run", lambda app, **_: bound.append(app))
    for name in BOUNDS:
        monkeypatch.setenv(name, "9")  # `start` sets them: back to what they were afterwards
    for name in (serve.PROXY_SETTING, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"):
        monkeypatch.setenv(name, "as it was")
    for name, value in {"BITS": "50", "STATE": "/nowhere", "PORT": "1"}.items():
        monkeypatch.setenv(f"MTLSIGN_{name}", value)
    serve.start(from_flags("--bits", "70", "--state", str(tmp_path), "--port", "8123"))
    gate, verify = (
        bound[0]._bound_deployment.init_args[0],
        bound[0]._bound_deployment.init_args[1]._bound_deployment.init_args[0],
    )
    assert gate == verify and (gate["bits"], gate["state"], gate["port"]) == (70, str(tmp_path), 8123)
    opened: list[ServiceSettings] = []
    monkeypatch.setattr(state.AppState, "open", lambda s, *_: opened.append(s))
    monkeypatch.setattr(serve, "RayMetrics", lambda: None)
    monkeypatch.setenv("MTLSIGN_SIGNING_KEY", SECRET)
    serve.IngressDeployment(gate, None)  # type: ignore[arg-type]
    assert (opened[0].bits, opened[0].state) == (70, tmp_path)
    assert opened[0].signing_key and opened[0].signing_key.get_secret_value() == SECRET
    deployed = serve.build(ServiceSettings.of({"bits": 70}))._bound_deployment.init_args[0]
    assert deployed["bits"] == 50  # there the environment wins


def test_the_signing_key_comes_from_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"signing_key: {SECRET}\n")
    for call in (
        lambda: from_flags("--signing-key", SECRET),
        lambda: from_flags("--config", str(config)),
        lambda: ServiceSettings.load(config),
        lambda: ServiceSettings.load(base={"signing_key": SECRET}),
    ):
        with pytest.raises(SettingsError, match="MTLSIGN_SIGNING_KEY") as caught:
            call()
        assert "abab" not in str(caught.value)
    monkeypatch.setenv("MTLSIGN_SIGNING_KEY", SECRET)
    s = from_flags("--state", str(tmp_path))
    assert Keys.load(s).current.public_key == Identity(b"\xab" * 32, b"\xab" * 32).public_key
    own = Identity.generate()
    own.save(tmp_path / "own.json", None)
    s = from_flags("--state", str(tmp_path), "--identity", str(tmp_path / "own.json"))
    assert Keys.load(s).current.public_key == own.public_key


def test_whether_a_proxy_bounds_bodies_is_seen_from_outside(start: Start) -> None:
    """The app behind refuses such a body too: only who refuses tells."""
    from mtlsign.distributed import serve

    service = start()
    app = service.client.app
    for proxy in (True, False):
        behind = SimpleNamespace(
            client=SimpleNamespace(app=BodyLimitMiddleware(app, service.office.settings, True) if proxy else app)
        )
        with served(behind) as url:
            settings = ServiceSettings.of({"port": int(url.rpartition(":")[2]), "host": "0.0.0.0"})
            assert serve.bounds_bodies(settings) is proxy
    assert not serve.bounds_bodies(settings)  # nobody is there


@pytest.mark.parametrize(("joined", "bounded", "warns"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_joining_a_cluster_without_bounds_warns(
    joined: int,
    bounded: int,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mtlsign.distributed import serve

    for name in (serve.PROXY_SETTING, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", *BOUNDS):
        monkeypatch.setenv(name, "1")
    for place, name, value in (
        (serve.cluster, "attached", joined), (serve.cluster, "connect", None), (serve, "application", None),
        (serve, "bounds_bodies", bounded),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, lambda *_, value=value: value)
    monkeypatch.setattr(serve, "serve", SimpleNamespace(start=lambda **_: None, run=lambda *_, **__: None))
    serve.start(ServiceSettings.of({}))
    said = capsys.readouterr().err
    assert (serve.PROXY_SETTING in said) is warns and len(said.splitlines()) == warns
