"""Benchmarks of training: one step of phase 2 against its bare passes, and phase 2 against phase 1.

The benchmark runs `embed_watermark` itself, not an imitation. It passes a worker context whose
`all_reduce_sum` is called once a step with the gradients. There it stops the clock, runs the bare passes, and
starts the clock again.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from benchmarks.fixtures import BareForward, BenchmarkSetup
from benchmarks.measure import Cost, Row, cost, now, ratio, row, since
from mtlsign.config.embed import EmbedSettings
from mtlsign.watermark.embedding import loop
from mtlsign.watermark.embedding.loop import require_set
from mtlsign.watermark.embedding.phase1 import train_clean_model
from mtlsign.watermark.embedding.phase2 import embed_watermark, gradient_terms
from mtlsign.watermark.embedding.worker import SingleProcessContext

#: Steps before the first pair.
WARM_UP = 2
#: Steps of an epoch, and images of an evaluation, from which the whole phases are estimated.
_EPOCH_STEPS, _EVALUATION_IMAGES = 6, 256


class _StopBenchmark(BaseException):
    """Ends phase 2 after the last pair."""


class _TimedContext(SingleProcessContext):
    """Worker context that times each step and, between two steps, another function."""

    def __init__(self, pairs: int, other: Callable[[], object]) -> None:
        super().__init__()
        self.steps: list[Cost] = []
        self.others: list[Cost] = []
        self._remaining, self._other = WARM_UP + pairs, other
        self._started: Cost | None = None

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Stop the clock of the step, time the other function, and start the clock again."""
        if self._started is not None:
            self.steps.append(since(self._started))
            self.others.append(cost(self._other))
            self._remaining -= 1
            if not self._remaining:
                raise _StopBenchmark
        self._started = now()


def time_steps(
    setup: BenchmarkSetup, settings: EmbedSettings, pairs: int, other: Callable[[], object]
) -> tuple[list[Cost], list[Cost]]:
    """Time whole steps of phase 2, each followed by one call of another function.

    Args:
        setup: task, network and key.
        settings: settings of phase 2.
        pairs: number of steps to time, too few for phase 2 to write a checkpoint in between.
        other: the other function.

    Returns:
        The costs of the steps and those of the other function.
    """
    context = _TimedContext(pairs, other)
    many_steps = settings.updated({"phase2.steps": 10**6})
    with contextlib.suppress(_StopBenchmark):
        embed_watermark(copy.deepcopy(setup.model), setup.task, setup.detector, many_steps, context)
    return context.steps[WARM_UP:], context.others[WARM_UP:]


def steps_per_window(settings: EmbedSettings) -> int:
    """Return the steps after which the work of phase 2 repeats.

    Kinds of perturbed copies take turns, and some kinds start an inner loop again after `refresh_steps`. A
    median over single steps hides these loops.
    """
    if not settings.lambda2:
        return 1
    perturbation = settings.perturbation
    kinds = require_set(perturbation.kinds)
    turn = len(kinds) // math.gcd(len(kinds), perturbation.per_step)
    loops = {"fine_tuned", "decorrelated", "spoiled"} & set(kinds)
    return math.lcm(turn, require_set(perturbation.refresh_steps) if loops else 1)


def time_windows(
    setup: BenchmarkSetup, settings: EmbedSettings, windows: int, other: Callable[[], object]
) -> tuple[list[Cost], list[Cost]]:
    """Time whole windows of steps, see `steps_per_window`; the arguments are those of `time_steps`.

    Returns:
        The mean cost of a step in each window, and that of the calls of the other function after the steps.
    """
    size = steps_per_window(settings)
    if size == 1:
        return time_steps(setup, settings, windows, other)
    parts = [time_steps(setup, settings, size, other) for _ in range(windows)]
    return [_mean(steps) for steps, _ in parts], [_mean(others) for _, others in parts]


def _mean(costs: Sequence[Cost]) -> Cost:
    return sum(c[0] for c in costs) / len(costs), sum(c[1] for c in costs) / len(costs)


def step_over_parts(setup: BenchmarkSetup, pairs: int) -> list[Row]:
    """Compare steps with their bare passes, with the regularisers of the settings and without any."""
    rows = []
    bare = BareForward(setup)
    plain = setup.settings.updated({"lambda1": 0.0, "lambda2": 0.0})
    for name, settings, title in (
        ("step", setup.settings, "one phase-2 step / its bare forwards and backwards"),
        ("step-plain", plain, "the same with lambda1 = lambda2 = 0"),
    ):
        batches = len(gradient_terms(0, settings))
        steps, passes = time_windows(setup, settings, pairs, lambda n=batches: bare.run_step(n))  # type: ignore[misc]
        note = f"{batches} key batches a step, means over {steps_per_window(settings)} steps"
        rows.append(ratio(name, title, steps, passes, at_most=1.1, note=note))
    return rows


def phase_2_over_1(setup: BenchmarkSetup, pairs: int, *, estimate: bool) -> list[Row]:
    """Compare phase 2 with phase 1, run whole or estimated from steps and short epochs.

    Args:
        setup: task, network and key.
        pairs: number of pairs.
        estimate: estimate the ratio instead of running both phases whole.
    """
    title = "whole phase 2 / whole phase 1"
    if not estimate:
        a, b = _time_phases(setup, pairs)
        note = f"{setup.settings.phase2.steps} steps / {setup.settings.phase1.epochs} epochs, run whole"
        return [ratio("phases", title, a, b, at_most=2, note=note)]
    values, note = _estimate_phases(setup, pairs)
    return [row("phases", title, values, at_most=2, note=note)]


def _time_phases(setup: BenchmarkSetup, pairs: int) -> tuple[list[Cost], list[Cost]]:
    phase2: list[Cost] = []
    phase1: list[Cost] = []
    task, settings, context = setup.task, setup.settings, SingleProcessContext()
    for _ in range(pairs):
        model = copy.deepcopy(setup.model)
        phase1.append(cost(lambda m=model: train_clean_model(m, task, settings, context)))  # type: ignore[misc]
        phase2.append(
            cost(lambda m=model: embed_watermark(m, task, setup.detector, settings, context))  # type: ignore[misc]
        )
    return phase2, phase1


def _estimate_phases(setup: BenchmarkSetup, pairs: int) -> tuple[list[float], str]:
    """Estimate the ratio from interleaved steps and short epochs, and from closing evaluations."""
    settings, task, context = setup.settings, setup.task, SingleProcessContext()
    per_epoch = task.steps("train", settings.phase1.batch)
    share = max(1, round(task.size("validation") * _EPOCH_STEPS / per_epoch))
    small = setup.with_sizes(train=_EPOCH_STEPS * settings.phase1.batch, validation=share)
    one_epoch = settings.updated({"phase1.epochs": 1})
    clean, marked = copy.deepcopy(setup.model), copy.deepcopy(setup.model)
    small_test = setup.with_sizes(test=_EVALUATION_IMAGES)

    def short_epoch() -> None:
        train_clean_model(clean, small, one_epoch, context)

    steps, epochs = [], []
    for _ in range(pairs):
        steps += time_windows(setup, settings, 1, lambda: None)[0]
        epochs.append(cost(short_epoch))
    evaluations = [
        cost(lambda: loop.evaluate(marked, small_test, "test", settings, context))[0] for _ in range(pairs)
    ]
    images = 2 * (task.size("test") + task.size("validation"))
    ending = statistics.median(evaluations) / _EVALUATION_IMAGES * images
    epoch_count = (settings.phase1.epochs or 0) * per_epoch / _EPOCH_STEPS
    step_count = settings.phase2.steps or 0
    values = [(step_count * a[0] + ending) / (epoch_count * b[0]) for a, b in zip(steps, epochs, strict=True)]
    phase2_seconds = step_count * statistics.median(a[0] for a in steps) + ending
    phase1_seconds = epoch_count * statistics.median(b[0] for b in epochs)
    note = (
        f"ESTIMATED from {_EPOCH_STEPS}-step epochs with their share of validation, whole windows of steps, "
        f"and closing evaluations: {step_count} steps ~ {phase2_seconds:.0f} s, "
        f"{settings.phase1.epochs} epochs ~ {phase1_seconds:.0f} s of CPU"
    )
    return values, note
