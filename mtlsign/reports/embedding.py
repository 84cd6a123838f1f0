"""What an owner reads after a run: one self-contained HTML page, with figures drawn from the recorded rows.

The page holds no script and loads nothing (a Content-Security-Policy says so), and every value from outside
is escaped. Parts whose data are missing are left out. The page belongs to the run folder, which is secret.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from mtlsign.reports import figures, formatting
from mtlsign.reports.formatting import number, words

#: The verifier's default policy (design decision 3), used where the result carries no verdict of its own.
DEFAULT_POLICY_BITS = 120.0


def format_p(bits: float | None) -> str:
    """Write the p-value 2^-bits as a power of ten, which no float could hold: ``1024`` -> ``'10^-308.3'``.

    Args:
        bits: evidence in bits, that is -log2 of the exact one-sided tail (design decision 3).

    Returns:
        ``'10^-x.y'``; a plain decimal for less than ten bits; ``'not available'`` for None, NaN or infinity.
    """
    if bits is None or not math.isfinite(bits):
        return "not available"
    if bits < 10:
        return f"{2.0 ** -max(bits, 0.0):.3g}"
    return f"10^-{bits * math.log10(2):.1f}"


def render_embedding_report(
    result: Mapping[str, Any],
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    scores: Mapping[str, Sequence[float]],
) -> str:
    """Render the page.

    Args:
        result: the fields of ``result.json``; beside the required ones it may hold ``matches``, ``accepted``,
            ``status``, ``primary_samples`` (size of the held-out split, for the intervals) and
            ``deviation_by_layer`` (name -> L2 norm of the change).
        history: ``phase1`` rows (epoch, loss, train_accuracy, validation_accuracy, seconds) and ``phase2``
            rows (step, wm_loss, snapshot_loss, distillation_loss, deviation_l2, wm_accuracy,
            snapshot_accuracy, validation_accuracy, seconds).
        scores: ``marked``, ``w0`` and ``wrong_key``, each N floats; positive agrees with the key's label.

    Returns:
        The HTML text. Missing, empty or non-finite data leave their part out and raise nothing.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("mtlsign.reports").joinpath("templates", "embedding.html.j2").read_text("utf-8")
    drawn = {name: Markup(svg) for name, svg in figures.draw(result, history, scores).items()}
    return environment.from_string(source).render(
        tone=_tone(result),
        headline=_headline(result),
        task_sentence=_task_sentence(result),
        rows=_rows(result),
        figures=drawn,
        subject=" · ".join(words(result[name]) for name in ("task", "model") if result.get(name) is not None),
    )


def _tone(result: Mapping[str, Any]) -> str:
    """``good``, ``open`` (not decided) or ``bad``: the colour of the verdict."""
    bits = number(result.get("evidence_bits"))
    status = result.get("status")
    if status in ("needs_commitment", "not_verifiable") or (bits is None and "accepted" not in result):
        return "open"
    accepted = result.get("accepted")
    if not isinstance(accepted, bool):
        accepted = bits is not None and bits >= DEFAULT_POLICY_BITS
    return "good" if accepted else "bad"


def _headline(result: Mapping[str, Any]) -> str:
    bits, n, rate = (number(result.get(name)) for name in ("evidence_bits", "n", "wm_accuracy"))
    if result.get("status") == "not_verifiable":
        return "This model could not be verified. That does not mean that it carries no mark."
    if bits is None:
        return "No verdict was recorded for this run."
    matches = number(result.get("matches"))
    if matches is None and n is not None and rate is not None:
        matches = round(rate * n)
    counted = "the hidden questions"
    if matches is not None and n is not None:
        counted = f"{int(matches):,} of {int(n):,} hidden questions"
    if result.get("status") == "needs_commitment":
        return (
            f"The trained head answers {counted} as the key says. "
            "That counts only if head and key were committed before the model left its owner."
        )
    if _tone(result) == "good":
        told = (
            "The mark is in the weights: the model answers {} as the key says. "
            "For a key fixed beforehand, chance does as well with probability {}."
        )
    else:
        told = (
            "The mark is too weak to count: the model answers {} as the key says, "
            "which chance reaches with probability {}."
        )
    return Markup(told).format(counted, _power(bits))


def _task_sentence(result: Mapping[str, Any]) -> str:
    clean, marked = number(result.get("primary_clean")), number(result.get("primary_marked"))
    if clean is None or marked is None:
        return ""
    if not (0 <= clean <= 1 and 0 <= marked <= 1):
        return f"The task's metric on held-out data went from {clean:.4g} to {marked:.4g}."
    points = round((marked - clean) * 100, 2)
    change = "did not change" if points == 0 else f"{'rose' if points > 0 else 'fell'} by {abs(points):.2f}"
    change += " points" if points else ""
    return f"The task's accuracy on held-out data {change}: {clean:.2%} before, {marked:.2%} after."


def _power(bits: float) -> Markup:
    """`format_p` with a raised exponent."""
    base, caret, exponent = format_p(bits).partition("^")
    return Markup("{}<sup>{}</sup>").format(base, exponent.replace("-", "−")) if caret else Markup(base)


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table's rows, in reading order; what the result lacks is left out."""
    bits = number(result.get("evidence_bits"))
    samples = number(result.get("primary_samples"))

    def share(name: str) -> str | None:
        value = number(result.get(name))
        if value is None:
            return None
        if not 0 <= value <= 1:
            return f"{value:.4g}"
        if not name.startswith("primary") or samples is None or samples < 1:
            return f"{value:.2%}"
        low, high = formatting.wilson(value, int(samples))
        return f"{value:.2%} (95 %: {low:.2%} … {high:.2%}, {int(samples):,} samples)"

    def plain(name: str, pattern: str = "{:g}") -> str | None:
        value = number(result.get(name))
        return None if value is None else pattern.format(value)

    def text(name: str) -> str | None:
        return None if result.get(name) is None else words(result[name], 300)

    rows = [
        ("Task", text("task")),
        ("Model", text("model")),
        ("Seed", text("seed")),
        ("λ₁ (stay near W0)", plain("lambda1")),
        ("λ₂ (survive changes)", plain("lambda2")),
        ("N (key samples)", plain("n", "{:,.0f}")),
        ("Task before marking", share("primary_clean")),
        ("Task after marking", share("primary_marked")),
        ("Mark", share("wm_accuracy")),
        ("Mark on the clean model", share("wm_accuracy_on_clean")),
        ("Evidence", None if bits is None else f"{bits:,.1f} bits"),
        ("p-value (exact tail)", None if bits is None else _power(bits)),
        ("Status", text("status")),
        ("Parameter deviation ‖W − W0‖₂", plain("deviation_l2", "{:.4g}")),
        ("Phase 1", _duration(result.get("seconds_phase1"))),
        ("Phase 2", _duration(result.get("seconds_phase2"))),
        ("Model digest", text("model_digest")),
        ("Owner kit (secret)", text("kit")),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _duration(value: object) -> str | None:
    seconds = number(value)
    if seconds is None or seconds < 0:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
