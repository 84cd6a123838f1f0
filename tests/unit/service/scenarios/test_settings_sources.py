"""Sources of the service's settings, up to the processes that use them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtlsign.config import cli
from mtlsign.config.service import ServiceSettings
from mtlsign.errors import SettingsError
from mtlsign.service import state
from mtlsign.service.auth.signing import ServiceKeys
from mtlsign.service.http.body_limits import BodyLimitMiddleware
from mtlsign.watermark.keys.identity import Identity
from tests.unit.service.fixtures import ServiceFactory, serve_on_socket

SECRET = "ab" * 64


#: Variables that `start` sets for the proxy.
PROXY_VARIABLES = [
    "MTLSIGN_MAX_BODY_MB",
    "MTLSIGN_BODY_TIMEOUT_S",
    "MTLSIGN_UPLOAD_TIMEOUT_S",
    "MTLSIGN_UPLOAD_RATE_MB_S",
    "MTLSIGN_MAX_MODEL_MB",
]


def from_flags(*flags: str) -> ServiceSettings:
    return cli.parse(ServiceSettings, flags, description="")


def test_flags_precede_environment_and_environment_precedes_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("min_evidence_bits: 60\ngamma: 0.8\nmax_claims: 9\n")
    for name, value in {"MIN_EVIDENCE_BITS": "50", "GAMMA": "0.9", "CONTROL_KEYS": "7"}.items():
        monkeypatch.setenv(f"MTLSIGN_{name}", value)
    settings = from_flags("--config", str(config), "--min-evidence-bits", "70")
    assert (settings.min_evidence_bits, settings.gamma, settings.control_keys) == (70, 0.9, 7)
    assert settings.max_claims == 9
    settings = ServiceSettings.load(config, base={"min_replicas": 3, "max_claims": 8})
    assert (settings.min_evidence_bits, settings.gamma, settings.control_keys) == (50, 0.9, 7)
    assert (settings.max_claims, settings.min_replicas) == (9, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_flags_of_job_reach_ingress_and_verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` binds the resolved settings; the environment of the replicas does not change them."""
    from mtlsign.distributed import serve

    bound: list[Any] = []
    monkeypatch.setattr(serve.cluster, "connect", lambda: None)
    monkeypatch.setattr(serve, "serve", SimpleNamespace(**vars(serve.serve)))
    monkeypatch.setattr(serve.serve, "start", lambda **_: None)
    monkeypatch.setattr(serve.serve, "run", lambda app, **_: bound.append(app))
    for name in PROXY_VARIABLES:
        monkeypatch.setenv(name, "9")  # `start` sets them; monkeypatch restores them
    for name in (serve.PROXY_SETTING, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"):
        monkeypatch.setenv(name, "unchanged")
    for name, value in {"MIN_EVIDENCE_BITS": "50", "STATE_DIR": "/nowhere", "PORT": "1"}.items():
        monkeypatch.setenv(f"MTLSIGN_{name}", value)
    serve.start(from_flags("--min-evidence-bits", "70", "--state-dir", str(tmp_path), "--port", "8123"))
    ingress, verifier_application = bound[0]._bound_deployment.init_args
    assert verifier_application._bound_deployment.init_args[0] == ingress
    assert (ingress["min_evidence_bits"], ingress["state_dir"]) == (70, str(tmp_path))
    assert ingress["port"] == 8123
    opened: list[ServiceSettings] = []
    monkeypatch.setattr(state.AppState, "open", lambda s, *_: opened.append(s))
    monkeypatch.setattr(serve, "RayMetrics", lambda: None)
    monkeypatch.setenv("MTLSIGN_SIGNING_KEY", SECRET)
    serve.IngressDeployment(ingress, None)  # type: ignore[arg-type]
    assert (opened[0].min_evidence_bits, opened[0].state_dir) == (70, tmp_path)
    assert opened[0].signing_key and opened[0].signing_key.get_secret_value() == SECRET
    deployed = serve.build(ServiceSettings.of({"min_evidence_bits": 70}))._bound_deployment.init_args[0]
    assert deployed["min_evidence_bits"] == 50  # the environment takes precedence over `args`


def test_signing_key_is_accepted_from_environment_only(
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
    settings = from_flags("--state-dir", str(tmp_path))
    assert ServiceKeys.load(settings).current.public_key == Identity(b"\xab" * 32, b"\xab" * 32).public_key
    own = Identity.generate()
    own.save(tmp_path / "own.json", None)
    settings = from_flags("--state-dir", str(tmp_path), "--identity", str(tmp_path / "own.json"))
    assert ServiceKeys.load(settings).current.public_key == own.public_key


def test_proxy_limits_bodies_distinguishes_proxy_from_app(start_service: ServiceFactory) -> None:
    """The application refuses such a body, too; a header distinguishes the two."""
    from mtlsign.distributed import serve

    service = start_service()
    app = service.client.app
    for proxy in (True, False):
        service_behind_proxy = SimpleNamespace(
            client=SimpleNamespace(
                app=BodyLimitMiddleware(app, service.state.settings, True) if proxy else app
            )
        )
        with serve_on_socket(service_behind_proxy) as url:
            settings = ServiceSettings.of({"port": int(url.rpartition(":")[2]), "host": "0.0.0.0"})
            assert serve.proxy_limits_bodies(settings) is proxy
    assert not serve.proxy_limits_bodies(settings)  # no server is running


@pytest.mark.parametrize(("joined", "bounded", "warns"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_start_on_cluster_without_body_limits_warns(
    joined: int,
    bounded: int,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mtlsign.distributed import serve

    for name in (serve.PROXY_SETTING, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", *PROXY_VARIABLES):
        monkeypatch.setenv(name, "1")
    for owner, name, value in (
        (serve.cluster, "cluster_address_set", joined), (serve.cluster, "connect", None),
        (serve, "make_application", None), (serve, "proxy_limits_bodies", bounded),
        (serve, "_serve_is_running", False), (serve, "reserve_port", None),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *_, value=value: value)
    monkeypatch.setattr(serve, "serve", SimpleNamespace(start=lambda **_: None, run=lambda *_, **__: None))
    serve.start(ServiceSettings.of({}))
    message = capsys.readouterr().err
    assert (serve.PROXY_SETTING in message) is warns
    assert len(message.splitlines()) == warns + 3, "three lines of progress"
