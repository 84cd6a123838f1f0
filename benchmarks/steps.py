"""Phase 2's step against its bare forwards and backwards, and phase 2 against phase 1.

The step is not imitated: `phases.watermark` itself runs, as a rank whose `sum` (called once a step, with the
gradients) stops the clock, runs the bare parts in between, and starts the clock again.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable

from torch import Tensor

from benchmarks.measure import Cost, Row, cost, now, ratio, row, since
from benchmarks.scene import Bare, Scene
from mtlsign.config.embed import EmbedSettings
from mtlsign.watermark.embedding import loop, training
from mtlsign.watermark.embedding.worker import SingleProcessContext

#: Steps before the first pair.
WARM_UP = 2


class _Enough(BaseException):
    """Ends phase 2 after the last pair."""


class _Clocked(SingleProcessContext):
    def __init__(self, pairs: int, other: Callable[[], object]) -> None:
        super().__init__()
        self.steps: list[Cost] = []
        self.others: list[Cost] = []
        self._left, self._other = WARM_UP + pairs, other
        self._started: Cost | None = None

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        if self._started is not None:
            self.steps.append(since(self._started))
            self.others.append(cost(self._other))
            self._left -= 1
            if not self._left:
                raise _Enough
        self._started = now()


def clocked(
    scene: Scene, settings: EmbedSettings, pairs: int, other: Callable[[], object]
) -> tuple[list[Cost], list[Cost]]:
    """Costs of `pairs` whole steps of phase 2, each followed by one call of `other`."""
    # Never a multiple of the checkpoint's interval within the pairs: reports are not part of a step.
    rank = _Clocked(pairs, other)
    model = copy.deepcopy(scene.model)
    with contextlib.suppress(_Enough):
        training.embed_watermark(
            model, scene.task, scene.detector, settings.model_copy(update={"steps": 10**6}), rank
        )
    return rank.steps[WARM_UP:], rank.others[WARM_UP:]


def step_over_parts(scene: Scene, pairs: int) -> list[Row]:
    """(a) with the settings' regularisers, (b) with λ1 = λ2 = 0."""
    rows = []
    bare = Bare(scene)
    plain = scene.settings.model_copy(update={"lambda1": 0.0, "lambda2": 0.0})
    for name, s, what in (
        ("step", scene.settings, "one phase-2 step / its bare forwards and backwards"),
        ("step-plain", plain, "the same with lambda1 = lambda2 = 0"),
    ):
        batches = len(training.gradient_terms(0, s))
        a, b = clocked(scene, s, pairs, lambda n=batches: bare.step(n))  # type: ignore[misc]
        rows.append(ratio(name, what, a, b, at_most=1.1, note=f"{batches} key batches a step"))
    return rows


def phase_2_over_1(scene: Scene, pairs: int, *, whole: bool) -> list[Row]:
    """(c) both phases whole, or estimated from interleaved steps and evaluations."""
    what, s = "whole phase 2 / whole phase 1", scene.settings
    if whole:
        a: list[Cost] = []
        b: list[Cost] = []
        for _ in range(pairs):
            model = copy.deepcopy(scene.model)
            b.append(
                cost(lambda m=model: training.train_clean_model(m, scene.task, s, SingleProcessContext()))
            )  # type: ignore[misc]
            a.append(
                cost(
                    lambda m=model: training.embed_watermark(
                        m, scene.task, scene.detector, s, SingleProcessContext()
                    )
                )
            )  # type: ignore[misc]
        return [
            ratio("phases", what, a, b, at_most=2, note=f"{s.steps} steps / {s.epochs} epochs, run whole")
        ]
    few = 6
    per_epoch = scene.task.steps("train", s.batch)
    share = max(1, round(scene.task.size("validation") * few / per_epoch))
    small = scene.fewer(train=few * s.batch, validation=share)
    one_epoch = s.model_copy(update={"epochs": 1})
    clean, marked = copy.deepcopy(scene.model), copy.deepcopy(scene.model)
    images = 256
    some = scene.fewer(test=images)
    evaluations: list[float] = []

    def phase_1() -> None:
        training.train_clean_model(clean, small, one_epoch, SingleProcessContext())

    steps, epochs = clocked(scene, s, pairs, phase_1)
    for _ in range(pairs):
        evaluations.append(cost(lambda: loop.evaluate(marked, some, "test", s, SingleProcessContext()))[0])
    seen = 2 * (scene.task.size("test") + scene.task.size("validation"))
    ending = statistics.median(evaluations) / images * seen
    total = (s.epochs or 0) * per_epoch / few
    count = s.steps or 0
    values = [(count * a[0] + ending) / (total * b[0]) for a, b in zip(steps, epochs, strict=True)]
    note = (
        f"ESTIMATED from {few}-step epochs with their share of validation, single steps, and closing "
        f"evaluations: "
        f"{count} steps ~ {count * statistics.median(a[0] for a in steps) + ending:.0f} s, "
        f"{s.epochs} epochs ~ {total * statistics.median(b[0] for b in epochs):.0f} s of CPU"
    )
    return [row("phases", what, values, at_most=2, note=note)]
