"""Study of crafted references: whether the author of a reference can choose it so that a network passes.

    uv run python -m benchmarks.crafted_references OUT.csv --task digits --width 8

One network is trained and marked by its owner. A forger who holds it crafts references and keys:
`extreme` (numbers at and beyond the format's limits), `copied` (from the suspect's kernels), `fitted` (to the
labels of a chosen key), `layers` (lists and sizes of layers), `replayed` (foreign references and openings)
and `trained head`. Each is given to the verifier as the bytes of a claim. Rows are appended to the file; a
second call continues after the last one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.extreme_references import copies, extremes
from benchmarks.reference_forger import Attempt, Forger, LabelFitter, choose_layers, replays
from mtlsign.claims import owner as owners
from mtlsign.claims.judging.admissibility import inadmissibility_reasons
from mtlsign.claims.judging.judge import DetectorClaimVerifier
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.types import Claim, Publish, Register
from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings
from mtlsign.models import loading
from mtlsign.models.architectures import build, default_taps
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.tasks import load_task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference

#: References of each family in a full study; 1,000 in all.
COUNTS = {"extreme": 250, "copied": 180, "fitted": 270, "layers": 100, "replayed": 180, "trained head": 20}
FITS = ("fixed", "signed", "gradient", "repeated", "several", "ground")
COLUMNS = (
    *("family", "number", "method", "status", "matches", "n", "evidence_bits", "tries"),
    *("target_bits", "reason", "seconds"),
)
STATUSES = ("inadmissible", "rejected", "unrelated", "not_verifiable", "needs_commitment", "accepted")
REQUIRED_BITS = 120
#: The families take turns, so that a study that was stopped has references of all of them.
TURNS = 4
_OWNER, _OTHERS = "owner of the study", 3


def make_forger(settings: EmbedSettings) -> Forger:
    """Train and mark the owner's network, and return a forger who holds it and three other references.

    Args:
        settings: complete settings of the embedding.
    """
    task = load_task(settings.task, data=settings.data, seed=settings.seed)
    architecture = loading.architecture_from_settings(settings, task.input_spec)
    context, owner = SingleProcessContext(), _identity(_OWNER)

    def committed(weights: dict[str, Tensor]) -> tuple[KeyOpening, Reference]:
        network = build(architecture)
        bases = measure_response_bases(network, weights, task, settings)
        (opening,), reference = commit_keys(
            network, weights, architecture, task.input_spec, settings, owner, bases=bases
        )
        return opening, reference

    base_weights = pipeline.run_phase1(settings, architecture, context)[0]
    opening, reference = committed(base_weights)
    marked = pipeline.run_phase2(settings, base_weights, [opening], reference, context).tensors
    others = []
    for index in range(_OTHERS):
        torch.manual_seed(10_000 + index)
        others.append(committed(copy.deepcopy(build(architecture)).state_dict())[1])
    suspect = {name: tensor.detach().clone() for name, tensor in marked.items()}
    return Forger(suspect, committed(dict(suspect))[1], opening, reference, tuple(others))


def attempts(forger: Forger, family: str, start: int, count: int) -> Iterator[Attempt]:
    """Yield the attempts of a family from number `start` to number `count` − 1.

    Args:
        forger: holder of the suspect.
        family: a key of `COUNTS`.
        start: number of the first attempt.
        count: number after the last one.
    """
    if family in ("extreme", "copied", "replayed"):
        endless = {"extreme": extremes, "copied": copies, "replayed": replays}[family](forger)
        yield from itertools.islice(endless, start, count)
    elif family == "fitted":
        for index in range(start, count):
            yield LabelFitter(forger, index).attempt(FITS[index % len(FITS)])
    elif family == "layers":
        for index in range(start, count):
            attempt = choose_layers(forger, index, tries=8)
            assert attempt is not None
            yield attempt
    else:
        for index in range(start, count):
            yield trained_head(forger, index)


def trained_head(forger: Forger, seed: int) -> Attempt:
    """Return a claim whose free head was trained on the suspect after the key was chosen."""
    head = {"kind": "free", "hidden": 64, "features": "pooled"}
    template = build(dict(forger.opening.parse().architecture))
    carrier = WatermarkDetector(forger.opening, forger.reference).spec.carrier
    sample = torch.zeros(2, carrier.channels, carrier.height, carrier.width)  # type: ignore[union-attr]
    opening = forger.sign(
        forger.own.raw_bytes, f"head {seed}", head=head, taps=list(default_taps(template, "free", sample))
    )
    detector = WatermarkDetector(opening, forger.own)
    readout = detector.feature_readout
    kernels = readout.read(detector.select_weights(forger.suspect))
    with torch.no_grad():
        features = readout.model.features(kernels, readout.inputs, pooled=True)
    optimizer = torch.optim.Adam(readout.trained, lr=0.02)
    signs = readout.labels.double() * 2 - 1
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.softplus(1 - 4 * readout.head(features) * signs).mean().backward()
        optimizer.step()
    return Attempt(
        "trained head", "fitted to the key", opening, forger.own.raw_bytes, head=detector.head_bytes()
    )


def judge(forger: Forger, attempt: Attempt) -> dict[str, object]:
    """Return the columns of the verdict on an attempt, as a council member reaches it.

    Args:
        forger: the claimant.
        attempt: the claim.
    """
    started = time.process_time()
    reason = ledger_reason(forger, attempt.opening) if attempt.by_owner else None
    if reason is not None:
        columns = {"status": "inadmissible", "matches": 0, "n": 0, "evidence_bits": 0.0, "reason": reason}
    else:
        result = DetectorClaimVerifier().judge_opening(
            attempt.opening,
            attempt.reference,
            attempt.head,
            serialize_safetensors(forger.suspect),
            REQUIRED_BITS,
        )
        columns = {
            "status": result.status,
            "matches": result.matches,
            "n": result.n,
            "evidence_bits": round(result.evidence_bits, 3),
            "reason": result.reason,
        }
    target = None if attempt.target_bits is None else round(attempt.target_bits, 1)
    seconds = round(time.process_time() - started, 3)
    return {"family": attempt.family, "method": attempt.method, "tries": attempt.tries,
            "target_bits": target, "seconds": seconds, **columns}  # fmt: skip


def ledger_reason(forger: Forger, opening: KeyOpening) -> str | None:
    """Return why a ledger does not admit the forger's claim with the owner's opening; None if it does.

    The forger commits to the opened key under another name, registers the suspect, and opens the key.

    Args:
        forger: the claimant.
        opening: the key that the owner opened before.
    """
    with tempfile.TemporaryDirectory(prefix="mtlsign-forger-") as folder:
        ledger = open_ledger(f"sqlite:///{folder}/ledger.db", create=True)
        author = owners.Owner(forger.identity, ledger, Path(folder) / "witness.json")
        owners.create_ledger(author, [_identity("member").public_key])
        salt, signer = bytes(32), forger.identity.public_key
        suspect = hashlib.sha256(serialize_safetensors(forger.suspect)).digest()
        common = {"signer": signer, "ledger": ledger.origin(), "time": author.now()}
        publication = Publish(
            **common,  # type: ignore[arg-type]
            nonce=salt,
            keys_root=commitments.keys_root([commitments.commit_key(salt, opening.key())]),
            keys_count=1,
            heads=commitments.commit_heads(salt, signer, [None]),
            model=commitments.commit_model(salt, signer, suspect),
        )
        publish = author.append(publication)
        registration = author.append(
            Register(**common, models=(("suspect", suspect),))  # type: ignore[arg-type]
        )
        claim = Claim(
            **common,  # type: ignore[arg-type]
            publish=publish, register=registration, suspect=suspect, opening=opening, key_index=0,
            key_salt=salt, key_path=(), heads=(None,), heads_salt=salt, model=suspect, model_salt=salt,
        )  # fmt: skip
        entry = author.append(claim)
        view = author.view()
        reasons = inadmissibility_reasons(view, view.entries[entry.index], claim)
    return ", ".join(reason.code for reason in reasons) or None


def _identity(name: str) -> Identity:
    return Identity(hashlib.sha256(name.encode()).digest(), bytes(32))


def rows(forger: Forger, present: dict[str, int], counts: dict[str, int]) -> Iterator[dict[str, object]]:
    """Yield the rows that the file does not have.

    Args:
        forger: holder of the suspect.
        present: rows of each family in the file.
        counts: attempts of each family.
    """
    control = Attempt("control", "owner's claim", forger.opening, forger.reference.raw_bytes)
    if not present.get("control"):
        yield {"number": 0, **judge(forger, control)}
    for family, count in counts.items():
        start = present.get(family, 0)
        for number, attempt in enumerate(attempts(forger, family, start, count), start):
            yield {"number": number, **judge(forger, attempt)}


def main() -> None:
    """Append rows to the file; settings of the embedding follow those of the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="share of the 1,000 references")
    parser.add_argument("--summary", type=Path, help="write a table of the rows in the file, and stop")
    options, embed_flags = parser.parse_known_args()
    if options.summary is not None:
        write_summary(options.output, options.summary)
        return
    settings = cli.parse(EmbedSettings, embed_flags, description="").with_defaults()
    torch.set_num_threads(1)
    forger = make_forger(settings.updated({"insecure_test_key": True}))
    if not options.output.exists():
        options.output.write_text(",".join(COLUMNS) + "\n")
    for turn in range(1, TURNS + 1):
        share = options.share * turn / TURNS
        counts = {family: max(1, round(count * share)) for family, count in COUNTS.items()}
        present = dict(Counter(row["family"] for row in read_rows(options.output)))
        with options.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            for row in rows(forger, present, counts):
                writer.writerow(row)
                file.flush()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file of the study."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_summary(rows_path: Path, path: Path) -> None:
    """Write a table with a row for each family: how many references, their verdicts, most evidence.

    Args:
        rows_path: file of the study.
        path: CSV file.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for row in read_rows(rows_path):
        groups.setdefault(row["family"], []).append(row)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ("references", *STATUSES, "most evidence", "tries of it", "evidence without the digest")
        writer.writerow(("family", *columns, "CPU seconds (most)"))
        for family, own in groups.items():
            statuses = Counter(row["status"] for row in own)
            best = max(own, key=lambda row: float(row["evidence_bits"]))
            targets = [float(row["target_bits"]) for row in own if row["target_bits"]]
            seconds = [float(row["seconds"]) for row in own]
            writer.writerow((
                family, len(own), *(statuses[status] for status in STATUSES),
                f"{float(best['evidence_bits']):.1f}", best["tries"],
                f"{min(targets):.0f} … {max(targets):.0f}" if targets else "",
                f"{statistics.mean(seconds):.2f} ({max(seconds):.2f})",
            ))  # fmt: skip


if __name__ == "__main__":
    main()
