"""The service under load: throughput against bare tapped forwards, a further claim's cost, latencies.

    python -m benchmarks.service --verifiers 1 --claims 200 --models 20           # here, without Ray
    python -m benchmarks.service --url http://127.0.0.1:8000 --token TOKEN …      # a running service

It makes its own models (ResNet-18 of `--width`, random: cost does not depend on the mark) and openings.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mtlsign import backbone
from mtlsign.carriers import qr
from mtlsign.client import Client, claim_of
from mtlsign.key import Identity, make_spec, sign_spec
from mtlsign.reference import make_reference
from mtlsign.service.bundles import take_bundle
from mtlsign.service.verifier import Question, Task, Verifier
from mtlsign.service.work import probe_of
from mtlsign.settings_service import ServiceSettings


def goods(
    folder: Path, models: int, keys: int, width: int, n: int, side: int
) -> tuple[list[str], list[dict[str, Any]]]:
    """Pointers to random models and opened claims, all of one architecture."""
    graph = backbone.graph_for("resnet18", channels=1, classes=10, width=width, stem="stock")
    torch.manual_seed(0)
    net = backbone.build(graph).eval()
    reference = make_reference(net, ["layer1"], torch.zeros(1, 1, side, side))
    pointers = []
    for i in range(models):
        torch.manual_seed(i)
        path = folder / f"m{i}.safetensors"
        save_file(dict(backbone.build(graph).state_dict()), path)
        pointers.append(f"file://{path}")
    identity, made = Identity.generate(), []
    for _ in range(keys):
        spec = make_spec(
            name="benchmark", n=n, carrier=qr.make_carrier(n, 1, side, side), taps=["layer1"],
            head={"kind": "keyed"}, statistic="count", graph=graph, reference=reference.digest,
        )  # fmt: skip
        made.append(claim_of("", sign_spec(identity, spec), reference.data)["bundle"])
    return pointers, made


def bare(pointer: str, bundle: dict[str, Any], repeats: int) -> list[float]:
    """Seconds of a tapped forward alone: what no service can do without."""
    from mtlsign.artifact import read_model

    probe = probe_of(take_bundle(bundle))
    tensors = read_model(pointer.removeprefix("file://")).tensors
    kernels = {name: tensors[name].float() for name in probe.graph.kernels}
    found = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            probe.head(probe.graph.features(kernels, probe.images))
            found.append(time.perf_counter() - start)
    return found[1:]


def further(verifier: Verifier, pointer: str, bundles: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of one further claim, each with a key not seen before, on a model that is here already."""
    found = []
    for i, bundle in enumerate(bundles):
        start = time.perf_counter()
        answer = verifier.answer(Task(pointer, None, (Question(json.dumps(bundle).encode()),)))
        assert "verdict" in answer.outcomes[0], answer.outcomes
        if i:
            found.append(time.perf_counter() - start)
    return found


def load(url: str, token: str, claims: Sequence[dict[str, Any]], batch: int, clients: int) -> dict[str, Any]:
    """Throughput and latencies of whole requests over `clients` connections."""
    parts = [claims[at : at + batch] for at in range(0, len(claims), batch)]

    def one(part: Sequence[dict[str, Any]]) -> tuple[float, int]:
        with Client(url, token) as client:
            start = time.perf_counter()
            results = client.verify(part, wait_s=30)
            return time.perf_counter() - start, sum("verdict" in r for r in results)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(one, parts))
    seconds = time.perf_counter() - start
    times = sorted(t for t, _ in done)
    return {
        "claims": len(claims), "verdicts": sum(k for _, k in done), "seconds": seconds,
        "claims_per_s": len(claims) / seconds, "p50_s": statistics.median(times),
        "p99_s": times[min(len(times) - 1, int(0.99 * len(times)))],
    }  # fmt: skip


async def _here(verifier: Verifier, claims: Sequence[dict[str, Any]]) -> float:
    """Seconds for all claims through the desk's grouping, in this process."""
    groups: dict[str, list[Question]] = {}
    for claim in claims:
        groups.setdefault(claim["model"], []).append(Question(json.dumps(claim["bundle"]).encode()))
    start = time.perf_counter()
    for model, questions in groups.items():
        for at in range(0, len(questions), 16):
            await asyncio.to_thread(verifier.answer, Task(model, None, tuple(questions[at : at + 16])))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("claims", 200), ("models", 20), ("keys", 20), ("width", 64), ("n", 1024), ("side", 32),
        ("batch", 50), ("clients", 4), ("verifiers", 1), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--url", help="a running service; its `allow` must cover --folder")
    parser.add_argument("--token", default="")
    parser.add_argument("--folder", type=Path, help="where the models are written")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (a.folder or Path(temporary) / "goods").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        pointers, bundles = goods(folder, a.models, a.keys, a.width, a.n, a.side)
        claims = [{"model": pointers[i % a.models], "bundle": bundles[i % a.keys]} for i in range(a.claims)]
        forward = statistics.median(bare(pointers[0], bundles[0], a.repeats))
        result: dict[str, Any] = {"forward_s": forward}
        s = ServiceSettings.of(
            {"state": Path(temporary) / "state", "allow": f"file://{folder}", "threads": 1}
        )
        one_more = statistics.median(further(Verifier(s), pointers[0], bundles[: a.repeats + 1]))
        result |= {"further_claim_s": one_more, "further_over_forward": one_more / forward}
        if a.url:
            result |= load(a.url, a.token, claims, a.batch, a.clients)
            result["efficiency"] = forward * result["claims_per_s"] / a.verifiers
        else:
            seconds = asyncio.run(_here(Verifier(s), claims))
            result |= {"claims": a.claims, "seconds": seconds, "claims_per_s": a.claims / seconds}
            result["efficiency"] = forward * a.claims / seconds
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
