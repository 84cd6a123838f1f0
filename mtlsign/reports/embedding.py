"""Report of an embedding run: one self-contained HTML page with figures of the recorded values.

The page holds no script and loads nothing, which its Content-Security-Policy enforces. Every value is
escaped. The page belongs to the run folder, which is secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mtlsign.reports import figures, formatting
from mtlsign.reports.formatting import number, words
from mtlsign.reports.pages import render_page
from mtlsign.reports.provenance import provenance

#: The verifier's default policy, used if the result carries no verdict.
DEFAULT_POLICY_BITS = 120.0


def render_embedding_report(
    result: Mapping[str, Any],
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    scores: Mapping[str, Sequence[float]],
) -> str:
    """Render the page. Missing, empty or non-finite data leave out their part and raise nothing.

    Args:
        result: the fields of ``result.json``. Optional are ``matches``, ``accepted``, ``status``,
            ``primary_samples`` (size of the held-out split, for the intervals) and ``deviation_by_layer``
            (layer name -> L2 norm of the change).
        history: ``phase1`` rows (epoch, loss, train_accuracy, validation_accuracy, seconds) and ``phase2``
            rows (step, wm_loss, snapshot_loss, distillation_loss, deviation_l2, wm_accuracy,
            snapshot_accuracy, validation_accuracy, seconds).
        scores: ``marked``, ``w0`` and ``wrong_key``, each N floats; positive agrees with the key's bit.

    Returns:
        The HTML text.
    """
    names = [words(result[name]) for name in ("task", "model") if result.get(name) is not None]
    return render_page(
        "embedding.html.j2",
        kind="MTLSign embedding report",
        subject=" · ".join(names),
        tone=_tone(result),
        headline=_headline(result),
        task_sentence=_task_sentence(result),
        warnings=[
            words(text, 600) for text in (result.get("problem"), *(result.get("warnings") or ())) if text
        ],
        facts=_facts(result),
        provenance=provenance(result),
        figures={name: Markup(svg) for name, svg in figures.draw(result, history, scores).items()},
    )


def _tone(result: Mapping[str, Any]) -> str:
    """Return ``good``, ``open`` (not decided) or ``bad``: the colour of the verdict."""
    bits = number(result.get("evidence_bits"))
    status = result.get("status")
    if status in ("needs_commitment", "not_verifiable") or (bits is None and "accepted" not in result):
        return "open"
    accepted = result.get("accepted")
    if not isinstance(accepted, bool):
        accepted = bits is not None and bits >= DEFAULT_POLICY_BITS
    return "good" if accepted else "bad"


def _headline(result: Mapping[str, Any]) -> str:
    bits = number(result.get("evidence_bits"))
    if result.get("status") == "not_verifiable":
        return "This model could not be verified. That does not mean that it carries no watermark."
    if bits is None:
        return "No verdict was recorded for this run."
    matching = _matching_bits(result)
    if result.get("status") == "needs_commitment":
        return (
            f"The trained head reads {matching} correctly. This is evidence only if head and key were "
            "committed before the model was released."
        )
    if _tone(result) == "good":
        sentence = (
            "The watermark is in the weights: {} match the key. For a key fixed in advance, the probability "
            "of this by chance is {}."
        )
    else:
        sentence = (
            "The watermark is too weak to count: {} match the key. The probability of this by chance is {}. "
            f"The evidence of {bits:,.1f} bits is below the required level "
            f"({DEFAULT_POLICY_BITS:g} bits by default)."
        )
    return Markup(sentence).format(matching, _power(bits))


def _matching_bits(result: Mapping[str, Any]) -> str:
    matches, n, rate = (number(result.get(name)) for name in ("matches", "n", "wm_accuracy"))
    if matches is None and n is not None and rate is not None:
        matches = round(rate * n)
    if matches is None or n is None:
        return "the watermark bits"
    return f"{int(matches):,} of {int(n):,} watermark bits"


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
    """Return `format_p` with a raised exponent."""
    base, caret, exponent = formatting.format_p(bits).partition("^")
    return Markup("{}<sup>{}</sup>").format(base, exponent.replace("-", "−")) if caret else Markup(base)


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table's rows in reading order, without the values that the result lacks."""
    bits = number(result.get("evidence_bits"))

    def plain(name: str, pattern: str = "{:g}") -> str | None:
        value = number(result.get(name))
        return None if value is None else pattern.format(value)

    def text(name: str) -> str | None:
        return None if result.get(name) is None else words(result[name], 300)

    rows = [
        ("Task", text("task")),
        ("Model", text("model")),
        ("Seed", text("seed")),
        ("λ₁ (weight of R_func, keeps the network near W0)", plain("lambda1")),
        ("λ₂ (weight of R_DA, robustness to changes)", plain("lambda2")),
        ("N (number of bits)", plain("n", "{:,.0f}")),
        ("Task accuracy before embedding", _share(result, "primary_clean")),
        ("Task accuracy after embedding", _share(result, "primary_marked")),
        *(
            (f"{score.capitalize()}, before and after embedding", text)
            for score, text in formatting.further_scores(result)
        ),
        ("Matching bits, marked model", _share(result, "wm_accuracy")),
        ("Matching bits, unmarked model W0", _share(result, "wm_accuracy_on_clean")),
        ("Evidence", None if bits is None else f"{bits:,.1f} bits"),
        ("p-value (exact binomial tail)", None if bits is None else _power(bits)),
        ("Verdict", text("status")),
        ("Parameter deviation ‖W − W0‖₂", plain("deviation_l2", "{:.4g}")),
        ("Duration of phase 1", _duration(result.get("seconds_phase1"))),
        ("Duration of phase 2", _duration(result.get("seconds_phase2"))),
        ("Model digest", text("model_digest")),
        ("Owner kit (secret)", text("kit")),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _share(result: Mapping[str, Any], name: str) -> str | None:
    """Return a rate as a percentage, task metrics with their 95 % interval."""
    value, samples = number(result.get(name)), number(result.get("primary_samples"))
    if value is None:
        return None
    if not 0 <= value <= 1:
        return f"{value:.4g}"
    is_mean = result.get("primary_is_mean", True)
    if not name.startswith("primary") or not is_mean or samples is None or samples < 1:
        return f"{value:.2%}"
    low, high = formatting.wilson(value, int(samples))
    return f"{value:.2%} (95 % interval {low:.2%} … {high:.2%}, {int(samples):,} samples)"


def _duration(value: object) -> str | None:
    seconds = number(value)
    if seconds is None or seconds < 0:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
