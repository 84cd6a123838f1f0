"""Estimate of a mix of linear channels from sketches, on random kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mtlsign.watermark.verification.alignment.assignment import Floats
from mtlsign.watermark.verification.alignment.layers import unit_rows
from mtlsign.watermark.verification.alignment.linear_fit import WrittenKernel, projected_mix, undone_mix
from mtlsign.watermark.verification.sketches import projection_matrix, sketch_size

CHANNELS, COLUMNS, ROWS = 20, 120, 240


def projection(fan_in: int) -> Floats:
    return projection_matrix(fan_in, sketch_size(fan_in))


def mixed_kernels(seed: int, noise: float) -> tuple[Floats, list[Floats], Floats, list[WrittenKernel]]:
    """Return W0's rows that read channels, kernels that write them, and a suspect's after a mix and noise.

    Every row of every suspect's kernel has a factor of random sign.
    """
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(CHANNELS, CHANNELS)))[0] for _ in range(2))
    mix = left @ np.diag(np.exp(0.5 * rng.normal(size=CHANNELS))) @ right
    reader, kernels = rng.normal(size=(ROWS, CHANNELS)), rng.normal(size=(3, CHANNELS, COLUMNS))

    def factors(count: int) -> Floats:
        drawn: Floats = rng.choice([-1.0, 1.0], count) * rng.uniform(0.5, 2.0, count)
        return drawn[:, None]

    def marked(kernel: Floats) -> Floats:
        changed: Floats = kernel + noise * rng.normal(size=kernel.shape)
        return changed

    rows = factors(ROWS) * (marked(reader) @ np.linalg.inv(mix))
    writers = [
        WrittenKernel(
            (factors(CHANNELS) * (mix @ (np.abs(factors(CHANNELS)) * marked(kernel))))[:, :, None],
            np.linalg.norm(unit_rows(kernel), axis=0),
            projection(COLUMNS)[:, None],
            unit_rows(unit_rows(kernel) @ projection(COLUMNS)),
        )
        for kernel in kernels
    ]
    return reader, list(kernels), rows, writers


def cosine(first: Floats, second: Floats) -> float:
    return float(np.abs((unit_rows(first) * unit_rows(second)).sum(1)).mean())


def directions(rows: Floats) -> Floats:
    return unit_rows(unit_rows(rows) @ projection(CHANNELS))


def test_projected_mix_makes_all_rows_parallel_to_their_sketches() -> None:
    reader, _, rows, _ = mixed_kernels(0, 0.0)
    fitted = rows @ projected_mix(rows, directions(reader))
    np.testing.assert_allclose(np.abs((unit_rows(fitted) * directions(reader)).sum(1)), 1.0, atol=1e-6)


def test_projected_mix_ignores_rows_in_a_wrong_order() -> None:
    reader, _, rows, _ = mixed_kernels(1, 0.1)
    wrong = rows.copy()
    wrong[:60] = np.roll(rows[:60], 1, 0)
    fitted = rows @ projected_mix(wrong, directions(reader))
    assert cosine(fitted, directions(reader)) > 0.98


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_undone_mix_restores_kernels_with_factors_of_unknown_sign(seed: int, noise: float) -> None:
    reader, kernels, rows, writers = mixed_kernels(seed, noise)
    undone = undone_mix(rows, directions(reader), projection(CHANNELS), writers)
    assert cosine(rows @ undone.reader, reader) > 0.9
    for kernel, writer, matrix in zip(kernels, writers, undone.writers, strict=True):
        assert cosine(writer.kernel[:, :, 0], kernel) < 0.4, "the mix hides the rows"
        assert cosine(matrix @ writer.kernel[:, :, 0], kernel) > 0.9


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_estimate_does_not_depend_on_the_scale_of_kernels(scale: float) -> None:
    reader, kernels, rows, writers = mixed_kernels(0, 0.2)
    scaled = [replace(writer, kernel=scale * writer.kernel) for writer in writers]
    undone = undone_mix(rows / scale, directions(reader), projection(CHANNELS), scaled)
    assert cosine(rows @ undone.reader, reader) > 0.9
    assert cosine(undone.writers[0] @ scaled[0].kernel[:, :, 0], kernels[0]) > 0.9


def test_estimate_is_the_same_again() -> None:
    reader, _, rows, writers = mixed_kernels(0, 0.2)
    first, second = (undone_mix(rows, directions(reader), projection(CHANNELS), writers) for _ in range(2))
    assert np.array_equal(first.reader, second.reader)
