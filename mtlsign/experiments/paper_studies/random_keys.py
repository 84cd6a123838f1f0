"""The band of random guesses (paper §4.1): random keys on an unmarked network beside the binomial."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mtlsign.config.embed import EmbedSettings
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.models.architectures import build
from mtlsign.models.loading import InputSpec, architecture_from_settings, cpu_state
from mtlsign.tasks import load_task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.detector import WatermarkDetector, matching_bits


def random_key_accuracies(
    settings: ReproduceSettings, head: str, base_weights: Mapping[str, torch.Tensor], *, done: Sequence[float] = (),
    tick: Callable[[list[float]], None] = lambda _: None,
) -> list[float]:  # fmt: skip
    """Accuracies of `s.keys` random keys on an unmarked network; a free head is untrained, as in the paper.

    `done` are accuracies of an interrupted call; `tick` gets the list every 100 keys.
    """
    e = EmbedSettings.of(
        {"task": settings.task, "data": settings.data, "model": settings.model, "width": settings.width, "head": head, "seed": settings.seed,
         "insecure_test_key": True}
    ).resolved()  # fmt: skip
    task = load_task(e.task, data=e.data, download=settings.download, seed=e.seed)
    graph = architecture_from_settings(e, InputSpec(task.channels, task.height, task.width, task.classes))
    network = build(graph)
    network.load_state_dict(dict(base_weights))
    owner = Identity(bytes(31) + b"\x01", bytes(32))
    geometry = (task.channels, task.height, task.width)
    opening, reference = pipeline.commit_key(build(graph), cpu_state(network), graph, geometry, e, owner)
    detector = WatermarkDetector(opening, reference)
    found = list(done)
    tensors = cpu_state(network)
    for index in range(len(found), settings.keys):
        other = detector.with_control_key(index)
        scores, _ = other.score_state_dict(tensors)
        assert scores is not None, "an unmarked network of the spec's own architecture can be read"
        found.append(float(matching_bits(scores, other.labels).float().mean()))
        if len(found) % 100 == 0:
            tick(found)
    return found


def compare_with_binomial(accuracies: Sequence[float], n: int) -> dict[str, Any]:
    """Random guesses beside the exact binomial: mean, sd, extremes, and a χ² test of the counts."""
    from scipy import stats

    counts = [round(a * n) for a in accuracies]
    keys = len(counts)
    low, high = evidence.control_band(n, 1 / keys)
    # Cells of about equal probability, at least 20 keys in each.
    cells = max(2, min(40, keys // 20))
    edges = sorted({int(stats.binom.ppf(i / cells, n, 0.5)) for i in range(1, cells)})
    chances = [float(x) for x in stats.binom.cdf([*edges, n], n, 0.5)]
    expected = [keys * (b - a) for a, b in itertools.pairwise([0.0, *chances])]
    seen = [sum(a < c <= b for c in counts) for a, b in itertools.pairwise([-1, *edges, n])]
    test = stats.chisquare(seen, expected)
    return {
        "keys": keys, "N": n, "mean": statistics.fmean(accuracies),
        "sd of keys": statistics.pstdev(accuracies),
        "sd of Binomial(N, 1/2)": math.sqrt(0.25 / n), "lowest": min(accuracies), "highest": max(accuracies),
        "one key in all is expected outside": f"{low / n:.4f} ... {high / n:.4f}",
        "the paper's band": "0.425 ... 0.575 (N = 600, 5,000 keys)",
        "chi square": float(test.statistic), "degrees of freedom": len(seen) - 1, "p": float(test.pvalue),
    }  # fmt: skip
