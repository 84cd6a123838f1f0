"""Random keys on an unmarked network (paper, section 4.1), compared with the exact binomial distribution."""

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
from mtlsign.models.loading import architecture_from_settings, cpu_state
from mtlsign.tasks import load_task
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.scores import matching_bits

#: Number of keys after which the accuracies so far are stored.
_KEYS_PER_CHECKPOINT = 100


def random_key_accuracies(
    settings: ReproduceSettings,
    head: str,
    base_weights: Mapping[str, torch.Tensor],
    *,
    accuracies: Sequence[float] = (),
    on_checkpoint: Callable[[list[float]], None] = lambda _: None,
) -> list[float]:
    """Measure the accuracies of `settings.keys` random keys on an unmarked network.

    A free head is not trained, as in the paper.

    Args:
        settings: task, network, seed and number of keys.
        head: `keyed` or `free`.
        base_weights: W0 by name.
        accuracies: accuracies of the first keys, from an interrupted call.
        on_checkpoint: called with all accuracies so far, every 100 keys.

    Returns:
        One accuracy for each key, 0 to 1.
    """
    values = {name: getattr(settings, name) for name in ("task", "data", "model", "width", "seed")}
    embedding = EmbedSettings.of({**values, "head": head, "insecure_test_key": True}).with_defaults()
    task = load_task(
        embedding.task,
        data=embedding.data,
        download=settings.download,
        tokenizer=embedding.tokenizer,
        seed=embedding.seed,
    )
    architecture = architecture_from_settings(embedding, task.input_spec)
    network = build(architecture)
    network.load_state_dict(dict(base_weights))
    tensors = cpu_state(network)
    owner = Identity(bytes(31) + b"\x01", bytes(32))
    bases = measure_response_bases(build(architecture), tensors, task, embedding)
    (opening,), reference = commit_keys(
        build(architecture), tensors, architecture, task.input_spec, embedding, owner, bases=bases
    )
    detector = WatermarkDetector(opening, reference)
    with torch.no_grad():
        (reading,) = detector.read_untrusted(tensors)  # W0 itself, which is aligned as it stands
    measured = list(accuracies)
    for index in range(len(measured), settings.keys):
        control = detector.with_control_key(index)
        with torch.no_grad():
            scores = control.score(reading.values).cpu()
        measured.append(float(matching_bits(scores, control.labels.cpu()).float().mean()))
        if len(measured) % _KEYS_PER_CHECKPOINT == 0:
            on_checkpoint(measured)
    return measured


def compare_with_binomial(accuracies: Sequence[float], n: int) -> dict[str, Any]:
    """Compare accuracies of random keys with Binomial(n, 1/2): mean, sd, extremes, χ² test of the counts."""
    from scipy import stats

    counts = [round(a * n) for a in accuracies]
    keys = len(counts)
    low, high = evidence.control_band(n, 1 / keys)
    # Bins of about equal probability, with at least 20 keys in each.
    bins = max(2, min(40, keys // 20))
    edges = sorted({int(stats.binom.ppf(i / bins, n, 0.5)) for i in range(1, bins)})
    chances = [float(x) for x in stats.binom.cdf([*edges, n], n, 0.5)]
    expected = [keys * (b - a) for a, b in itertools.pairwise([0.0, *chances])]
    observed = [sum(a < c <= b for c in counts) for a, b in itertools.pairwise([-1, *edges, n])]
    test = stats.chisquare(observed, expected)
    return {
        "keys": keys, "N": n, "mean": statistics.fmean(accuracies),
        "sd of keys": statistics.pstdev(accuracies),
        "sd of Binomial(N, 1/2)": math.sqrt(0.25 / n), "lowest": min(accuracies), "highest": max(accuracies),
        "one key in all is expected outside": f"{low / n:.4f} ... {high / n:.4f}",
        "the paper's band": "0.425 ... 0.575 (N = 600, 5,000 keys)",
        "chi square": float(test.statistic), "degrees of freedom": len(observed) - 1, "p": float(test.pvalue),
    }  # fmt: skip
